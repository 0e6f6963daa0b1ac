"""One program for many policies: every choice gives what the policy with the same rules gives."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import precision_lab as pl
from precision_lab.policy import Policy
from precision_lab.rewrite import call_with_choices, choosable

QUANTIZED = "weight=int4@channel,activation=int8@token,attention=int8@token,embedding=int4@channel"
POLICIES = [Policy.parse("float32"), Policy.parse(QUANTIZED)]
KEYS = jax.random.split(jax.random.key(0), 4)
PARAMS = {
    "table": jax.random.normal(KEYS[0], (7, 8)),
    "stack": jax.random.normal(KEYS[1], (3, 8, 8)) / 3,
    "head": jax.random.normal(KEYS[2], (8, 5)),
}
TOKENS = jnp.asarray([[1, 2, 3, 0], [6, 5, 4, 1]])


def net(params, tokens):
    x = jnp.take(params["table"], tokens, axis=0)
    x = jax.lax.scan(jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None)), x, params["stack"])[0]
    scores = jax.jit(lambda a: jnp.einsum("btd,bsd->bts", a, a))(x)
    return jnp.einsum("bts,bsd->btd", jax.nn.softmax(scores), x) @ params["head"]


def test_every_choice_is_the_policy_with_the_same_rules():
    sites = choosable(net, POLICIES, PARAMS, (TOKENS,), {}).sites
    assert len(sites) == 5
    run = jax.jit(
        lambda numbers: call_with_choices(net, POLICIES, dict(zip(sites, numbers, strict=True)), PARAMS, (TOKENS,), {})
    )
    reference = np.asarray(net(PARAMS, TOKENS))

    outputs = {choice: run(jnp.asarray(choice)) for choice in itertools.product((0, 1), repeat=len(sites))}

    for choice in [(0, 0, 0, 0, 0), (1, 1, 1, 1, 1), *(tuple(row) for row in np.eye(5, dtype=int))]:
        policy = POLICIES[1]
        for site, number in zip(sites, choice, strict=True):
            if not number:
                policy = policy.with_rule(site, weight=None, activation=None, attention=None, embedding=None)
        expected = pl.apply_policy(net, policy)(PARAMS, TOKENS)
        np.testing.assert_allclose(outputs[choice], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(outputs[0, 0, 0, 0, 0], reference, rtol=1e-5, atol=1e-6)
    assert len({np.asarray(out).tobytes() for out in outputs.values()}) == 2 ** len(sites)


def test_a_site_without_a_choice_follows_the_first_policy():
    out = call_with_choices(net, POLICIES[::-1], {}, PARAMS, (TOKENS,), {})

    np.testing.assert_array_equal(out, pl.apply_policy(net, QUANTIZED)(PARAMS, TOKENS))


def test_several_policies_are_chosen_by_number():
    policies = [Policy.parse("float32"), *(Policy.parse(f"weight=int{bits}@channel") for bits in (2, 4, 8))]

    def product(params, x):
        return x @ params["head"]

    x = jax.random.normal(KEYS[3], (4, 8))
    for number, policy in enumerate(policies):
        out = call_with_choices(product, policies, {"head": jnp.int32(number)}, PARAMS, (x,), {})

        np.testing.assert_array_equal(out, pl.apply_policy(product, policy)(PARAMS, x))


def test_products_inside_a_custom_derivative_keep_the_first_policy_and_are_named():
    @jax.custom_jvp
    def inside(w, x):
        return x @ w

    inside.defjvp(lambda primals, tangents: (inside(*primals), tangents[1] @ primals[0]))

    def fn(params, x):
        return inside(params["stack"][0], x) @ params["head"]

    found = choosable(fn, POLICIES, PARAMS, (jnp.ones((2, 8)),), {})

    assert (found.sites, found.kept) == (("head",), ("stack",))


def test_what_no_choice_can_be_made_of_is_refused():
    with pytest.raises(ValueError, match="changes other operations than products and lookups"):
        choosable(net, [POLICIES[0], Policy.parse("compute=bfloat16,ops=autocast")], PARAMS, (TOKENS,), {})
    with pytest.raises(ValueError, match="no choice at 'tail'; the policies differ at table:gather#0, stack"):
        call_with_choices(net, POLICIES, {"tail": 1}, PARAMS, (TOKENS,), {})
    with pytest.raises(ValueError, match="matched no site: 'tail'"):
        choosable(net, [POLICIES[0], POLICIES[1].with_rule("tail", weight=None)], PARAMS, (TOKENS,), {})

"""Laws of policies over models that know nothing of them, in Linen and in NNX.

Every model is traced once without a policy and once under each, and compiled without and under bfloat16_mixed.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import pytest

from precision_lab.nn import apply_policy, sites
from tests.jaxprs import assert_same_bits, products, products_in
from tests.zoo.zoo import INPUTS, LEFT_ALONE, Program, build, program

MODELS = [(kind, name) for kind in ("linen", "nnx") for name in INPUTS]
# Of module scope: all tests of one model stand together, so that two workers do not both compile it.
every_model = pytest.mark.parametrize(("kind", "name"), MODELS, ids="-".join, scope="module")


@functools.cache
def cached(kind: str, name: str, policy: str | None) -> Program:
    return program(kind, name, policy)


@functools.cache
def traced(kind: str, name: str, policy: str | None) -> Any:
    """Returns the loss, (outputs, state) and gradients as they are traced."""
    one = cached(kind, name, policy)
    return jax.jit(jax.value_and_grad(one.loss, has_aux=True)).trace(one.params)


@functools.cache
def measured(kind: str, name: str, policy: str | None) -> Any:
    """Returns ((loss, (outputs, state)), gradients), compiled."""
    return traced(kind, name, policy).lower().compile()(cached(kind, name, policy).params)


def found(kind: str, name: str, policy: str | None) -> list[tuple[str, str, str]]:
    """Returns the products of the loss and its gradients."""
    return products_in(traced(kind, name, policy).jaxpr)


def without_keys(tree: Any) -> Any:
    """Returns a tree with its random keys as plain arrays."""
    is_key = lambda leaf: jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key)  # noqa: E731
    return jax.tree.map(lambda leaf: jax.random.key_data(leaf) if is_key(leaf) else leaf, tree)


@every_model
@pytest.mark.parametrize(("policy", "low"), [("bfloat16_mixed", "bfloat16"), ("float16_mixed", "float16")])
def test_every_product_forward_and_backward_is_low_but_those_to_be_left_alone(kind, name, policy, low):
    plain, under = found(kind, name, None), found(kind, name, policy)

    assert len(under) == len(plain)
    assert {dtypes for dtypes in under if dtypes != (low, low, "float32")} == {
        dtypes for dtypes in plain if dtypes in LEFT_ALONE.get(name, ())
    }
    assert under.count((low, low, "float32")) >= len(plain) - 1


@every_model
def test_float32_is_bit_identical_to_no_policy(kind, name):
    """The same program text, or else the same bits of outputs, gradients and everything that the call changed."""
    plain, under = (traced(kind, name, policy).lower().as_text() for policy in (None, "float32"))

    if plain != under:
        assert_same_bits(*(without_keys(measured(kind, name, policy)) for policy in ("float32", None)))


@every_model
def test_bfloat16_gradients_and_outputs_are_float32_and_close(kind, name):
    (_, (out, _)), gradients = measured(kind, name, None)
    (_, (low_out, _)), low_gradients = measured(kind, name, "bfloat16_mixed")

    exact, low = (np.concatenate([np.ravel(g) for g in jax.tree.leaves(tree)]) for tree in (gradients, low_gradients))
    assert {str(leaf.dtype) for leaf in jax.tree.leaves((low_gradients, low_out))} == {"float32"}
    assert jax.tree.structure((out, gradients)) == jax.tree.structure((low_out, low_gradients))
    assert 0 < np.linalg.norm(low - exact) < 0.02 * np.linalg.norm(exact)


@every_model
def test_state_moves_as_without_a_policy(kind, name):
    """Counts and keys of random streams to the bit; batch statistics as close as their inputs are."""
    (_, (_, state)), _ = measured(kind, name, None)
    (_, (_, low_state)), _ = measured(kind, name, "bfloat16_mixed")

    assert jax.tree.structure(state) == jax.tree.structure(low_state)
    for one, low in zip(jax.tree.leaves(without_keys(state)), jax.tree.leaves(without_keys(low_state)), strict=True):
        assert one.dtype == low.dtype
        if np.issubdtype(one.dtype, np.integer):
            assert_same_bits(low, one)
        np.testing.assert_allclose(low, one, rtol=0.02, atol=0.01)


@every_model
def test_sites_cover_every_product_and_name_the_modules_around_it(kind, name):
    model = build(kind, name)
    given = INPUTS[name]
    if kind == "linen":
        rngs = {stream: jax.random.key(0) for stream in ("params", "dropout", "noise")}
        variables = jax.eval_shape(model.init, rngs, *given)
        table = sites(model, variables, *given, policy="bfloat16_mixed", rngs=rngs, mutable=["batch_stats"])
    else:
        table = sites(model, *given, policy="bfloat16_mixed")

    assert [site.reason for site in table.untouched] == ["int32 operand"] * (name in LEFT_ALONE)
    assert all(site.module.split("/")[0] == name for site in table)
    dense = [
        site for site in table if site.has_parameter and site.op == "dot_general" and "embed" not in site.path.lower()
    ]
    assert all(len(site.module.split("/")) > 1 for site in dense)


@every_model
def test_the_tree_of_parameters_is_the_one_without_a_policy(kind, name):
    plain, under = (cached(kind, name, policy).params for policy in (None, "bfloat16_mixed"))

    assert jax.tree.structure(plain) == jax.tree.structure(under)
    assert_same_bits(under, plain)


@pytest.mark.parametrize("kind", ["linen", "nnx"])
@pytest.mark.parametrize("policy", ["dots_saveable", "dots_with_no_batch_dims_saveable", "nothing_saveable"])
def test_remat_policies_save_as_many_products_as_without_a_policy(kind, policy):
    def count(precision):
        one = program(kind, "GPT", precision, saved=policy)
        return len(products(jax.grad(one.loss, has_aux=True), one.params))

    assert count("bfloat16_mixed") == count(None)


@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_a_model_works_inside_every_transformation(kind):
    """Outputs keep the dtype and products the formats, whatever is around the model."""
    one = cached(kind, "MLP", "bfloat16_mixed")
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec()

    def loss(params):
        return one.loss(params)[0]

    around = {
        "jit": jax.jit(loss),
        "vmap": lambda p: jax.vmap(loss)(jax.tree.map(lambda x: jax.numpy.stack([x, x]), p)).sum(),
        "scan": lambda p: jax.lax.scan(lambda c, _: (c + loss(p), None), 0.0, None, length=2)[0],
        "while": lambda p: jax.lax.fori_loop(0, 2, lambda _, c: c + loss(p), 0.0),
        "cond": lambda p: jax.lax.cond(loss(p) > 0, loss, lambda p: 2 * loss(p), p),
        "checkpoint": jax.checkpoint(loss),
        "shard_map": jax.shard_map(loss, mesh=mesh, in_specs=(spec,), out_specs=spec),
    }
    for name, fn in around.items():
        shape = jax.eval_shape(fn, one.params)
        assert (name, str(shape.dtype)) == (name, "float32")
        assert (name, set(products(jax.grad(fn), one.params))) == (name, {("bfloat16", "bfloat16", "float32")})


def test_an_encoder_decoder_generates_with_its_cache_as_without_a_policy():
    """Linen: `encode` and `decode` by `method=`, the cache a mutable collection. Token by token equals all at once."""
    source, target = INPUTS["Translator"]
    model = build("linen", "Translator", decoding=True)
    params = cached("linen", "Translator", None).params
    empty = jax.eval_shape(model.init, jax.random.key(0), source, target)["cache"]
    start = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), empty)

    def generate(model):
        encoded = model.apply({"params": params}, source, method="encode")
        step = lambda cache, token: model.apply(  # noqa: E731
            {"params": params, "cache": cache}, encoded, source, token[:, None], method="decode", mutable=["cache"]
        )[::-1]

        def body(cache, token):
            new, logits = step(cache, token)
            return new["cache"], logits[:, 0]

        cache, logits = jax.lax.scan(body, start, target.T)
        return cache, logits.swapaxes(0, 1)

    plain = jax.jit(lambda: generate(model))()
    same = jax.jit(lambda: generate(apply_policy(model, "float32")))()
    low = jax.jit(lambda: generate(apply_policy(model, "bfloat16_mixed")))()

    assert_same_bits(same, plain)
    whole = build("linen", "Translator").apply({"params": params}, source, target)
    np.testing.assert_allclose(plain[1], whole, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(low[1], whole, rtol=0.05, atol=0.1)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(low)} == {"float32", "int32"}

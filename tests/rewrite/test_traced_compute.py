"""The numbers of a compute format as data: a sweep over formats is one program, and each format what it is alone."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from precision_lab import formats
from precision_lab.nn import apply_policy
from precision_lab.policy import Policy
from precision_lab.rewrite.adapters import Adapter
from precision_lab.rewrite.api import call

RNG = np.random.default_rng(0)
PARAMS = {
    "in": RNG.standard_normal((16, 12), np.float32) / 4,
    "out": RNG.standard_normal((12, 4), np.float32),
    "filter": RNG.standard_normal((3, 3, 1, 2), np.float32),
}
X = RNG.standard_normal((8, 16), np.float32)
COMMON = "params=float32,compute=float8_e4m3fn,output=float32"


def under(name):
    return COMMON.replace("float8_e4m3fn", name)


def loss(params, x):
    """Products of weights and of activations alone, in a checkpoint and a scan, a convolution, and a narrow operand."""

    @jax.checkpoint
    def layer(x):
        return jax.nn.relu(x @ params["in"])

    hidden = lax.scan(lambda h, _: (jnp.tanh((h @ h.T) @ h), None), layer(x), None, length=2)[0]
    numbers = ("NHWC", "HWIO", "NHWC")
    image = lax.conv_general_dilated(
        x.reshape(-1, 4, 4, 1), params["filter"], (1, 1), "SAME", dimension_numbers=numbers
    )
    narrow = hidden.astype(jnp.bfloat16) @ params["out"].astype(jnp.bfloat16)
    return jnp.mean((hidden @ params["out"]) ** 2) + jnp.mean(image**2) + jnp.sum(narrow.astype(jnp.float32))


def short(params, x):
    """A product with each of two weights, and one of activations alone."""
    hidden = x @ params["in"]
    return jnp.mean((jnp.sin(hidden @ hidden.T) @ hidden @ params["out"]) ** 2)


def gradients(params, x, run):
    return jax.value_and_grad(run, (0, 1))(params, x)


def of_higher_order(params, x, run):
    """Returns tangents of the gradient, which has second derivatives, and the gradient of a batch."""
    batch = jax.grad(lambda params: jax.vmap(lambda row: run(params, row))(x[:, None]).sum())(params)
    return jax.jvp(jax.grad(run), (params, x), (params, x)), batch


@pytest.mark.parametrize(
    ("what", "fn", "names"),
    [
        (gradients, loss, ["float8_e5m2", "tf32"]),
        (gradients, short, ["float4_e2m1fn", "float6_e3m2fn", "float8_e4m3fn", "e4m7", "e8m16"]),
        (of_higher_order, short, ["float8_e5m2", "e6m9"]),
    ],
)
def test_a_sweep_of_formats_is_one_program_and_each_is_bit_for_bit_itself(what, fn, names):
    traces = []

    @jax.jit
    def of_data(fmt, params, x):
        traces.append(1)
        return what(params, x, apply_policy(fn, COMMON, numbers={"compute": fmt}))

    for name in names:
        found = of_data(formats.format(name).params(), PARAMS, X)

        alone = jax.jit(functools.partial(what, run=apply_policy(fn, under(name))))(PARAMS, X)
        jax.tree.map(np.testing.assert_array_equal, found, alone)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(found))
    assert len(traces) == 1


def test_a_batch_of_formats_is_the_loop():
    """In the derivative of a batch and in the batch of derivatives alike."""
    names = ["float8_e5m2", "tf32"]
    stacked = formats.stack_formats(names)

    def run(fmt, params):
        return apply_policy(short, COMMON, numbers={"compute": fmt})(params, X)

    inside = jax.jit(jax.vmap(jax.grad(run, 1), (0, None)))(stacked, PARAMS)
    outside = jax.jit(jax.jacrev(lambda params: jax.vmap(run, (0, None))(stacked, params)))(PARAMS)

    for n, name in enumerate(names):
        alone = jax.jit(jax.grad(run, 1))(formats.format(name).params(), PARAMS)
        for found, key in itertools.product((inside, outside), ("in", "out")):
            np.testing.assert_allclose(found[key][n], alone[key], rtol=1e-4, atol=1e-4 * np.abs(alone[key]).max())


@jax.custom_jvp
def by_tangents(x, w):
    return x @ w


by_tangents.defjvp(lambda primals, t: (by_tangents(*primals), t[0] @ primals[1] + primals[0] @ t[1]))


@jax.custom_vjp
def by_cotangents(x, w):
    return x @ w


by_cotangents.defvjp(lambda x, w: (by_cotangents(x, w), (x, w)), lambda kept, ct: (ct @ kept[1].T, kept[0].T @ ct))


@pytest.mark.parametrize("product", [by_tangents, by_cotangents])
@pytest.mark.parametrize("rule", ["", ";in:compute=float32"])
def test_derivatives_by_hand_multiply_in_the_format_of_the_function_that_they_are_of(product, rule):
    def fn(params, x):
        return jnp.sum(jnp.sin(product(x, params["in"])) @ params["out"])

    common, alone = COMMON + rule, under("e5m3") + rule
    fmt = formats.format("e5m3").params()
    found = jax.jit(lambda fmt, p, x: jax.grad(apply_policy(fn, common, numbers={"compute": fmt}))(p, x))(
        fmt, PARAMS, X
    )

    expected = jax.jit(jax.grad(apply_policy(fn, alone)))(PARAMS, X)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_numbers_reach_products_that_would_be_left_alone():
    """A product in float32 is as the policy has it, and would not be looked at again."""
    fmt = formats.format("float8_e5m2").params()

    found = apply_policy(lambda w, x: x @ w, "float32", numbers={"compute": fmt})(PARAMS["in"], X)

    expected = apply_policy(lambda w, x: x @ w, under("float8_e5m2"))(PARAMS["in"], X)
    np.testing.assert_array_equal(found, expected)


def test_an_adapter_runs_in_the_same_format():
    low = [RNG.standard_normal(shape, np.float32) for shape in ((16, 2), (2, 12))]
    adapters = {"in": Adapter(*low, np.float32(0.5))}

    def run(policy, **options):
        options |= {"adapters": adapters}
        return jax.jit(lambda p, x: call(lambda p, x: x @ p["in"], Policy.parse(policy), p, (x,), {}, **options))

    found = run(COMMON, numbers={"compute": formats.format("e5m3").params()})(PARAMS, X)

    np.testing.assert_array_equal(found, run(under("e5m3"))(PARAMS, X))


@pytest.mark.parametrize(
    "policy",
    ["compute=e5m3,weight=int8@channel", "compute=e5m3,wgrad=bfloat16", "compute=float8_e5m2,execution=native"],
)
def test_products_that_do_not_follow_one_simulated_format_refuse_numbers(policy):
    run = apply_policy(lambda p, x: x @ p["in"], policy, numbers={"compute": formats.format("e5m3").params()})

    with pytest.raises(ValueError, match="'in': numbers= of compute= are for products that are simulated"):
        run(PARAMS, X)


def test_numbers_for_no_setting_are_refused():
    with pytest.raises(ValueError, match=r"numbers= are for the settings weight, .*, compute"):
        apply_policy(loss, COMMON, numbers={"accum": formats.format("e5m3").params()})

"""Batches of quantized products: a batched function and its derivatives are the loop over its examples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from precision_lab.policy import Policy
from precision_lab.rewrite import apply_to_function


def normal(shape, seed, spread=False):
    """Returns numbers, in examples of very different magnitude so that a common scale would lose the small ones."""
    x = np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)
    return x * np.float32(10) ** np.arange(-1, shape[0] - 1).reshape(-1, *[1] * (len(shape) - 1)) if spread else x


SPECS = [
    "weight=int8@tensor,activation=int8@tensor,gradient=int4@tensor",
    "weight=int8@tensor,activation=int8@tensor,gradient=int8@tensor,execution=native",
    "int8_training,compute=float32",
    "float8_hybrid",
    "mxfp8,compute=float32",
    "weight=nvfp4_2d,activation=nvfp4,gradient=nvfp4",
    "switchback,wgrad=float32",
    "weight=int4@channel,activation=int8@token,backward=requantized",
    "gradient=int8@tensor,accum=float32@step4",
]
SIZES = {"vector": (16,), "matrix": (5, 16)}


def product(w, x, t):
    return jnp.sum((x @ w) * t)


def each(fn, axes, args):
    """Returns `fn` of every example, stacked, taken one after the other."""

    def one(i):
        return fn(*(x if axis is None else jnp.asarray(x)[i] for x, axis in zip(args, axes, strict=True)))

    return jax.jit(lambda: lax.map(one, jnp.arange(3)))()


def assert_close(found, expected):
    """Checks to the order of float32 sums."""
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=2e-6 * float(np.abs(expected).max()))


@pytest.mark.parametrize(
    ("size", "spec", "shared"),
    [("matrix", spec, shared) for spec in SPECS for shared in (None, 0)]
    + [("vector", SPECS[1], 0), ("matrix", SPECS[0], 1), ("matrix", SPECS[1], 1)],
)
def test_the_gradient_of_a_batch_is_the_sum_of_the_gradients_of_its_examples(spec, size, shared):
    """There was one scale for the whole batch in the gradient, and one for each example in the product."""
    w = normal((16, 6) if shared == 0 else (3, 16, 6), 0)
    x = normal(SIZES[size] if shared == 1 else (3, *SIZES[size]), 1, spread=shared != 1)
    t = normal((3, *SIZES[size][:-1], 6), 2, spread=True)
    axes = (None if shared == 0 else 0, None if shared == 1 else 0, 0)
    under = apply_to_function(product, Policy.parse(spec))

    found = jax.jit(jax.grad(lambda w, x: jax.vmap(under, axes)(w, x, t).sum(), (0, 1)))(w, x)

    for operand, gradients in enumerate(each(jax.grad(under, (0, 1)), axes, (w, x, t))):
        assert_close(found[operand], np.sum(gradients, 0) if shared == operand else np.asarray(gradients))


def convolution(w, x, t):
    return jnp.sum(lax.conv_general_dilated(x, w, (1, 1), "SAME") * t)


@pytest.mark.parametrize("spec", [SPECS[0], "float8_hybrid,compute=float32", "weight=nvfp4,activation=nvfp4"])
@pytest.mark.parametrize("axes", [(None, 0, 0), (0, 0, 0), (0, None, 0)])
def test_the_gradient_of_a_batch_of_convolutions_is_that_of_its_examples(axes, spec):
    w = normal((4, 3, 3, 3) if axes[0] is None else (3, 4, 3, 3, 3), 0)
    x = normal((2, 3, 5, 5) if axes[1] is None else (3, 2, 3, 5, 5), 1)
    t = normal((3, 2, 4, 5, 5), 2, spread=True)
    under = apply_to_function(convolution, Policy.parse(spec))

    found = jax.jit(jax.grad(lambda w, x: jax.vmap(under, axes)(w, x, t).sum(), (0, 1)))(w, x)

    for operand, gradients in enumerate(each(jax.grad(under, (0, 1)), axes, (w, x, t))):
        assert_close(found[operand], np.sum(gradients, 0) if axes[operand] is None else np.asarray(gradients))


def test_a_batch_of_batches_has_a_scale_for_each_example():
    under = apply_to_function(product, Policy.parse(SPECS[0]))
    w, x = normal((16, 6), 0), normal((3, 2, 5, 16), 1, spread=True)
    t = normal((3, 2, 5, 6), 2, spread=True)

    twice = jax.vmap(jax.vmap(under, (None, 0, 0)), (None, 0, 0))
    found = jax.jit(jax.grad(lambda w, x: twice(w, x, t).sum(), (0, 1)))(w, x)

    of_one = lambda pair: jax.grad(under, (0, 1))(w, *pair)  # noqa: E731
    gradients = jax.jit(lambda: lax.map(lambda row: lax.map(of_one, row), (x, t)))()
    assert_close(found[0], np.sum(gradients[0], (0, 1)))
    assert_close(found[1], np.asarray(gradients[1]))


@pytest.mark.parametrize("spec", [SPECS[0], SPECS[1]])
def test_tangents_and_second_derivatives_of_a_batch_are_those_of_its_examples(spec):
    under = apply_to_function(lambda w, x, t: jnp.sum(jnp.sin(x @ w) * t), Policy.parse(spec))
    w, x, t = normal((16, 6), 0), normal((3, 5, 16), 1), normal((3, 5, 6), 2)
    v, axes = normal((16, 6), 3), (None, 0, 0)

    def tangent(fn):
        return lambda w, x, t: jax.jvp(lambda w: fn(w, x, t), (w,), (v,))[1]

    of_batch = jax.jit(tangent(jax.vmap(under, axes)))(w, x, t)
    second = jax.jit(tangent(jax.grad(lambda w, x, t: jax.vmap(under, axes)(w, x, t).sum())))(w, x, t)
    assert_close(of_batch, np.asarray(each(tangent(under), axes, (w, x, t))))
    assert_close(second, np.sum(each(tangent(jax.grad(under)), axes, (w, x, t)), 0))


def test_the_gradient_of_a_shared_weight_takes_no_memory_for_each_example():
    under = apply_to_function(product, Policy.parse(SPECS[0]))
    like = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((256, 256), (64, 256), (64, 256))]

    gradient = jax.jit(jax.grad(lambda w, x, t: jax.vmap(under, (None, 0, 0))(w, x, t).sum()))
    temporary = gradient.lower(*like).compile().memory_analysis().temp_size_in_bytes

    assert temporary < 4 * 64 * 256 * 256 / 4  # a gradient for each example would be four times as much


def test_the_gradient_of_an_empty_batch_is_zero():
    under = apply_to_function(product, Policy.parse(SPECS[1]))
    w, none = normal((16, 6), 0), jnp.zeros((0, 5))

    found = jax.grad(lambda w: jax.vmap(under, (None, 0, 0))(w, none[..., None] * jnp.ones(16), none[..., :1]).sum())(w)

    assert np.array_equal(found, np.zeros((16, 6)))

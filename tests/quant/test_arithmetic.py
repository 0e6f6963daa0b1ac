"""Divisions and sums have the bits of IEEE 754 in every program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from precision_lab.quant.arithmetic import divide, multiply, ordered_mean, ordered_sum

RNG = np.random.default_rng(0)
X = RNG.normal(size=(512, 256)).astype(np.float32)
SCALES = {
    "number": np.float32(0.0123457),
    "one": np.array([[0.0123457]], np.float32),
    "row": np.abs(RNG.normal(size=(1, 256))).astype(np.float32),
    "column": np.abs(RNG.normal(size=(512, 1))).astype(np.float32),
}


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_division_by_a_scale_is_true_division_in_every_program(scale):
    expected = X / scale

    for quotient in (
        divide(X, scale),
        jax.jit(divide)(X, scale),
        jax.jit(lambda x: divide(x, scale))(X),
        jax.jit(lambda s: divide(X, s))(scale),
        jax.jit(lambda: divide(X, scale))(),
        jax.jit(lambda x, s: divide(x, jnp.max(s[None], axis=0)))(X, scale),
        jax.jit(jax.vmap(divide, (0, None)))(X[None], scale)[0],
    ):
        np.testing.assert_array_equal(quotient, expected)


def test_the_reciprocal_would_be_something_else():
    """The witness that the test above can fail: a product with the reciprocal differs in a third of the values."""
    scale = SCALES["number"]

    assert np.mean(np.float32(1) / scale * X != X / scale) > 0.2


@pytest.mark.parametrize("scale", SCALES.values(), ids=SCALES)
def test_a_product_is_rounded_before_it_is_added_to_something(scale):
    c = RNG.normal(size=X.shape).astype(np.float32)

    np.testing.assert_array_equal(jax.jit(lambda x, s, c: multiply(x, s) + c)(X, scale, c), X * scale + c)


def test_division_by_zero_leaves_the_value_and_nan_stays():
    quotient = divide(jnp.asarray([1.0, 0.0, np.nan, np.inf]), jnp.float32(0))

    np.testing.assert_array_equal(quotient, np.array([1, 0, np.nan, np.inf], np.float32))


@pytest.mark.parametrize("shape", [(1, 3), (7, 3), (9, 2), (1000, 2), (70_001, 1)])
def test_ordered_sums_are_sums_and_do_not_depend_on_the_program(shape):
    x = RNG.normal(size=shape).astype(np.float32)

    total = ordered_sum(jnp.asarray(x), (0,))
    fused = jax.jit(lambda x: ordered_sum(jnp.abs(x * 2) * 0.5 * jnp.sign(x), (0,)))(x)

    np.testing.assert_allclose(total, x.sum(0, dtype=np.float64, keepdims=True), atol=1e-6 * np.abs(x).sum())
    np.testing.assert_array_equal(total, fused)


def test_the_mean_of_nothing_is_zero():
    np.testing.assert_array_equal(ordered_mean(jnp.zeros((0, 3)), (0,)), np.zeros((1, 3), np.float32))

"""Gradients: each estimator against its paper's formula, worked by hand, and its surrogate by finite differences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from precision_lab.quant import fake_quantize, quantize, quantizer
from precision_lab.quant.dorefa import dorefa_gradient
from precision_lab.quant.estimators import SURROGATES, Point

# In units of a scale of 0.5 and int3, whose grid ends at 3: below, at and within the range, and above.
X = jnp.asarray([-2.0, -1.5, -0.6, 0.0, 0.2, 0.85, 1.45, 1.5, 1.9], jnp.float32)
V = np.asarray(X) / 0.5
Q = np.array([-3, -3, -1, 0, 0, 2, 3, 3, 3])
G = jnp.asarray([1.0, -2.0, 0.5, 3.0, -1.0, 2.0, -0.25, 1.0, 4.0], jnp.float32)


def gradients(spec, x=X, g=G, axis=None, **given):
    """Returns the gradients of sum(g * fake) with respect to x and what is given."""
    return jax.grad(lambda x, given: jnp.sum(g * fake_quantize(x, spec, axis=axis, **given)), (0, 1))(x, given)


def test_values_are_the_same_whatever_the_estimator():
    for estimator in ("ste", "clipped", "zero", "tanh", "ewgs", "lsq", "pact"):
        fake = fake_quantize(X, f"int3,{estimator}", scale=0.5)
        np.testing.assert_array_equal(fake, np.float32(0.5) * Q)


def test_straight_through_is_the_identity_everywhere():
    """Check 11 of JAX quantization."""
    np.testing.assert_array_equal(gradients("int3", scale=jnp.float32(0.5))[0], G)
    np.testing.assert_array_equal(gradients("int3,affine,mse")[0], G)
    np.testing.assert_array_equal(gradients("mxfp4")[0], G)
    np.testing.assert_array_equal(gradients("int3,zero")[0], np.zeros_like(G))


def test_clipped_is_zero_outside_the_range_exactly():
    """Checks 11 and 12 of JAX quantization."""
    inside = np.abs(V) <= 3
    np.testing.assert_array_equal(gradients("int3,clipped", scale=jnp.float32(0.5))[0], np.where(inside, G, 0))

    x = jnp.asarray(np.random.default_rng(0).normal(size=4096).astype(np.float32))
    gradient = gradients("int8,clip=0.5,clipped", x, 1.0)[0]
    assert np.mean(gradient == 0) == np.mean(np.abs(x) > np.abs(x).max() / 2)

    static = gradients("int8,clipped", jnp.asarray([100.0, 0.5]), 1.0, scale=jnp.float32(1 / 127))[0]
    np.testing.assert_array_equal(static, [0, 1])


def test_clipped_follows_the_range_of_an_affine_grid():
    # Codes -4 to 3 about a zero point of -2: values from -2 to 5 in units of the scale.
    x = jnp.asarray([-2.1, -1.9, 4.9, 5.1])

    gradient = gradients("int3,affine,clipped", x, 1.0, scale=jnp.float32(1), zero_point=jnp.float32(-2))[0]

    np.testing.assert_array_equal(gradient, [0, 1, 1, 0])


def test_tanh_has_the_slope_of_differentiable_soft_quantization():
    """DSQ with alpha = 0.2: k = log 9, s = 1.25; slope k s / 2 (1 - tanh(k (v - m))**2) about the centre m."""
    k = np.log(9)
    slope = k * 1.25 / 2 * (1 - np.tanh(k * (V - np.floor(V) - 0.5)) ** 2)

    gradient = gradients("int3,tanh", scale=jnp.float32(0.5))[0]

    np.testing.assert_allclose(gradient, np.where(np.abs(V) <= 3, G * slope, 0), rtol=1e-5)


def test_ewgs_scales_by_the_error_with_the_sign_of_the_cotangent():
    """EWGS, equation 5, x normalized to [0, 1]: a range of 6 steps; 1 + 0.3 sign(g) (x_n - x_q)."""
    expected = np.asarray(G) * (1 + 0.3 * np.sign(G) * (V - Q) / 6)

    gradient = gradients("int3,ewgs=0.3", scale=jnp.float32(0.5))[0]

    np.testing.assert_allclose(gradient, np.where(np.abs(V) <= 3, expected, 0), rtol=1e-6)


def test_ewgs_of_strength_zero_is_clipped_exactly():
    """Check 39."""
    np.testing.assert_array_equal(
        gradients("int3,ewgs=0", scale=jnp.float32(0.5))[0], gradients("int3,clipped", scale=jnp.float32(0.5))[0]
    )


def test_lsq_learns_its_scale():
    """Checks 37, and 14 of JAX quantization: q - v inside, the ends outside, times 1 / sqrt(N Q_P)."""
    inside = np.abs(V) < 3
    slope = np.where(inside, Q - V, np.clip(V, -3, 3))

    dx, given = gradients("int3,lsq", scale=jnp.float32(0.5))

    np.testing.assert_array_equal(dx, np.where(inside, G, 0))
    np.testing.assert_allclose(given["scale"], np.sum(np.asarray(G) * slope) / np.sqrt(9 * 3), rtol=1e-5)


def test_lsq_learns_one_scale_for_each_group():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32))
    scale = jnp.full((3, 3), 0.4, jnp.float32)

    given = gradients("int3@group4,lsq", x, 1.0, axis=0, scale=scale)[1]

    v = np.asarray(x) / 0.4
    slope = np.where(np.abs(v) < 3, np.round(v) - v, np.clip(v, -3, 3))
    groups = np.stack([part.sum(0) for part in (slope[:4], slope[4:8], slope[8:])])
    # N is the mean number of elements that share a scale, 30 / 9 with the ragged last group.
    np.testing.assert_allclose(given["scale"], groups / np.sqrt(30 / 9 * 3), rtol=1e-4, atol=1e-6)


def test_lsq_plus_learns_an_offset():
    """LSQ+, equations 4 and 5: outside the range d/d beta is 1, inside 0."""
    offset = 0.25
    v = (np.asarray(X) - offset) / 0.5
    inside = np.abs(v) < 3
    slope = np.where(inside, np.round(v) - v, np.clip(v, -3, 3))

    value = fake_quantize(X, "int3,lsq+", scale=0.5, offset=offset)
    dx, given = gradients("int3,lsq+", scale=jnp.float32(0.5), offset=jnp.float32(offset))

    np.testing.assert_allclose(value, np.clip(np.round(v), -3, 3) * 0.5 + offset)
    np.testing.assert_array_equal(dx, np.where(inside, G, 0))
    np.testing.assert_allclose(given["scale"], np.sum(np.asarray(G) * slope) / np.sqrt(27), rtol=1e-5)
    np.testing.assert_allclose(given["offset"], np.sum(np.where(inside, 0, G)) / np.sqrt(27), rtol=1e-5)


def test_pact_learns_its_clip_from_what_it_clips():
    """Check 39: the gradient of alpha is the sum of cotangents where x >= alpha; alpha = 1.5, uint2 steps of 0.5."""
    x = jnp.asarray([-1.0, 0.0, 0.7, 1.49, 1.5, 2.0])
    g = jnp.asarray([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])

    def loss(x, alpha):
        return jnp.sum(g * fake_quantize(x, "uint2,pact", scale=alpha / 3))

    dx, dalpha = jax.grad(loss, (0, 1))(x, jnp.float32(1.5))

    np.testing.assert_allclose(fake_quantize(x, "uint2,pact", scale=0.5), [0, 0, 0.5, 1.5, 1.5, 1.5])
    np.testing.assert_array_equal(dx, [0, 2, 4, 8, 0, 0])
    np.testing.assert_allclose(dalpha, 48, rtol=1e-6)


def test_dorefa_weights_follow_equation_9():
    w = np.array([-2.0, -0.3, 0.0, 0.1, 0.7, 1.5], np.float32)
    unit = np.tanh(w) / (2 * np.abs(np.tanh(w)).max()) + 0.5
    expected = 2 * np.round(unit * 7) / 7 - 1

    np.testing.assert_allclose(fake_quantize(jnp.asarray(w), "uint3,dorefa"), expected, atol=1e-6)

    gradient = jax.grad(lambda w: jnp.sum(fake_quantize(w, "uint3,dorefa")[1:]))(jnp.asarray(w))
    slope = (1 - np.tanh(w) ** 2) / np.abs(np.tanh(w)).max()
    np.testing.assert_allclose(gradient[1:], slope[1:], rtol=1e-5)


def test_dorefa_gradients_are_unbiased_on_their_grid():
    """Equation 12: 2 m (q - 1/2), m for each example; four standard errors of a uniform step."""
    g = jnp.broadcast_to(jnp.asarray([[0.3, -1.0, 0.05, 0.77], [3.0, 8.0, -5.5, 0.0]]), (2, 4))
    many = jax.vmap(lambda key: dorefa_gradient(g, 4, key=key))(jax.random.split(jax.random.key(0), 4096))

    steps = (np.asarray(many) / np.array([[2.0], [16.0]]) + 0.5) * 15
    np.testing.assert_allclose(steps, np.round(steps), atol=1e-4)
    standard_error = np.array([[2.0], [16.0]]) / 15 / 2 / np.sqrt(4096)
    interior = np.abs(np.asarray(g)) < np.array([[1.0], [8.0]])
    assert np.all((np.abs(many.mean(0) - g) < 4 * standard_error)[interior])


@pytest.mark.parametrize("name", ["clipped", "tanh", "lsq", "lsq+", "pact"])
def test_surrogates_have_the_derivatives_of_finite_differences(name):
    """With q - v and the side of the range held fixed, as each paper has it; away from the ends."""
    v = np.array([-4.0, -1.2, 0.3, 2.2, 5.0])

    def surrogate(x, scale, offset):
        fixed = jnp.asarray(v, jnp.float32)
        q = jnp.clip(jnp.round(fixed), -3, 3)
        return SURROGATES[name](Point(x, fixed, q, -3.0, 3.0, jnp.float32(0.5), scale, offset, 0.2))

    at = (jnp.asarray(v * 0.5, jnp.float32), jnp.float32(0.5), jnp.float32(0.0))
    inside = np.abs(v) <= 3
    step = 1e-3
    dx = jax.jvp(lambda x: surrogate(x, *at[1:]), at[:1], (jnp.ones(5),))[1]
    numeric = (surrogate(at[0] + step, *at[1:]) - surrogate(at[0] - step, *at[1:])) / (2 * step)
    np.testing.assert_allclose(dx[inside], numeric[inside], rtol=2e-3)
    for place in (1, 2):

        def of(value, place=place):
            return surrogate(*(value if i == place else each for i, each in enumerate(at)))

        exact = jax.jacfwd(of)(at[place])
        numeric = (of(at[place] + step) - of(at[place] - step)) / (2 * step)
        np.testing.assert_allclose(exact, numeric, atol=2e-3)


@pytest.mark.parametrize(("bits", "ratio"), [(2, 1.52), (3, 1.53), (4, 1.78), (8, 4.5)])
def test_where_lsq_starts_is_wider_than_the_best_step(bits, ratio):
    """Check 38: 2 E|x| / sqrt(Q_P) over the step of least error on the full grid that LSQ has, found by trying all.

    The notes have 1.51, 1.58, 1.82 and 5.4. The last contradicts check 20, whose clip of 4.01 deviations gives 4.49.
    """
    x = np.random.default_rng(0).normal(size=1 << 16).astype(np.float32)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

    start, best = (
        float(quantize(jnp.asarray(x), f"int{bits},full,{name}").scale[0]) for name in ("calibration=lsq", "mse")
    )

    tried = best * np.linspace(0.8, 1.25, 91)
    errors = [np.mean((np.clip(np.round(x / step), low, high) * step - x) ** 2) for step in tried]
    assert errors[np.argmin(abs(tried - best))] <= 1.002 * min(errors)
    assert start == pytest.approx(2 * np.abs(x).mean() / np.sqrt(high), rel=1e-5)
    assert start / best == pytest.approx(ratio, rel=0.03)


@pytest.mark.parametrize("estimator", ["ste", "clipped", "zero", "tanh", "ewgs", "lsq"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_work_under_jit_vmap_and_remat(estimator, dtype):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 5, 4))).astype(dtype)

    def loss(x):
        return jnp.sum(fake_quantize(x, quantizer(f"int4@channel,{estimator}"), axis=0).astype(jnp.float32) ** 2)

    each = jnp.stack([jax.grad(loss)(row) for row in x])
    together = jax.jit(jax.vmap(jax.grad(jax.checkpoint(loss))))(x)

    assert together.dtype == dtype
    tolerance = 1e-5 if dtype == jnp.float32 else 2**-7
    np.testing.assert_allclose(*(g.astype(jnp.float32) for g in (together, each)), rtol=tolerance, atol=1e-6)

"""Outlier features are multiplied as they are: LLM.int8's decomposition against two products in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import precision_lab as pl
from precision_lab.nn.numbers import apart
from precision_lab.policy import Policy
from precision_lab.policy.deriving import with_static_scales, without_quantizers

VECTORWISE = "weight=int8@channel,activation=int8@token"
DECOMPOSED = f"{VECTORWISE},outliers=6.0"


def product(params, x):
    return x @ params["w"]


def operands(outliers=(3, 10), tokens=9):
    rng = np.random.default_rng(0)
    x, w = rng.uniform(-5, 5, (tokens, 16)), rng.normal(size=(16, 5))
    for feature in outliers:
        x[feature % tokens, feature] = 80.0  # one token is enough to make the feature one
    return np.float32(x), np.float32(w)


def int8(x, axis):
    """Returns x on the grid of absmax int8, by token or by channel, in float64."""
    scale = np.abs(x).max(axis=axis, keepdims=True) / 127
    return np.round(x / np.where(scale == 0, 1, scale)) * scale


def as_in_the_paper(x, w, threshold=6.0):
    """Equation 8: the outlier columns in 16 bits and up, the others in int8, added."""
    x, w = np.float64(x), np.float64(w)
    out = np.flatnonzero(np.abs(x).max(axis=0) >= threshold)
    rest = np.setdiff1d(np.arange(x.shape[1]), out)
    return x[:, out] @ w[out] + int8(x[:, rest], 1) @ int8(w[rest], 0)


@pytest.mark.parametrize("outliers", [(), (3,), (3, 10)])
def test_a_product_is_the_sum_of_the_two_of_the_paper(outliers):
    x, w = operands(outliers)

    out = pl.apply_policy(product, DECOMPOSED)({"w": w}, x)

    np.testing.assert_allclose(out, as_in_the_paper(x, w), rtol=1e-5, atol=1e-5)


def test_without_outliers_it_is_the_vectorwise_product():
    x, w = operands(())

    with_threshold, without = (pl.apply_policy(product, policy)({"w": w}, x) for policy in (DECOMPOSED, VECTORWISE))

    np.testing.assert_allclose(with_threshold, without, rtol=1e-6, atol=1e-6)


def test_with_outliers_the_error_is_that_of_ordinary_features():
    x, w = operands()
    exact = np.float64(x) @ np.float64(w)

    errors = [
        np.abs(pl.apply_policy(product, policy)({"w": w}, x) - exact).max() for policy in (DECOMPOSED, VECTORWISE)
    ]

    # Half a step of each operand, 5/127 and amax(w)/127, over 16 terms, is the most that ordinary features can lose.
    assert errors[0] < 16 * (5 / 254 * np.abs(w).max() + np.abs(w).max() / 254 * 5)
    assert errors[1] > 2 * errors[0]


def test_outliers_have_the_compute_format():
    x, w = operands((3,))
    x[:] = 0
    x[3, 3] = 80.3

    out = pl.apply_policy(product, f"compute=bfloat16,output=float32,{DECOMPOSED}")({"w": w}, x)

    rounded = np.asarray(jnp.asarray(x).astype(jnp.bfloat16), np.float64) @ np.asarray(
        jnp.asarray(w).astype(jnp.bfloat16), np.float64
    )
    np.testing.assert_allclose(out, rounded, rtol=1e-6)


def test_gradients_go_straight_through_and_multiply_what_the_product_multiplied():
    x, w = operands()

    fn = pl.apply_policy(product, DECOMPOSED)
    dx, dw = jax.grad(lambda x, w: jnp.sum(fn({"w": w}, x)), argnums=(0, 1))(x, w)

    features = np.abs(x).max(axis=0) >= 6
    rest_x, rest_w = np.where(features, 0, np.float64(x)), np.where(features[:, None], 0, np.float64(w))
    used_x, used_w = np.where(features, x, int8(rest_x, 1)), np.where(features[:, None], w, int8(rest_w, 0))
    np.testing.assert_allclose(dx, np.broadcast_to(used_w.sum(axis=1), dx.shape), rtol=1e-5)
    np.testing.assert_allclose(dw, np.broadcast_to(used_x.sum(axis=0)[:, None], dw.shape), rtol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_numbers_of_its_quantizers_may_be_arguments(bits):
    x, w = operands()
    policy = Policy.parse(DECOMPOSED.replace("int8", f"int{bits}"))
    structure, numbers, _ = apart(policy)

    traced = jax.jit(lambda numbers, x: pl.apply_policy(product, structure, numbers=numbers)({"w": w}, x))(numbers, x)

    assert set(numbers) == {"weight", "activation"}
    np.testing.assert_allclose(traced, pl.apply_policy(product, policy)({"w": w}, x), rtol=1e-6, atol=1e-5)


def test_products_without_a_parameter_have_no_outliers():
    x, _ = operands()
    policy = f"{DECOMPOSED},attention=int8@token"

    out = pl.apply_policy(lambda params, x: x @ x.T + params["w"][0, 0], policy)({"w": np.zeros((1, 1))}, x)

    np.testing.assert_allclose(out, int8(np.float64(x), 1) @ int8(np.float64(x), 1).T, rtol=1e-4)


def test_the_setting_reads_back_and_goes_with_the_quantizers():
    policy = Policy.parse(DECOMPOSED)

    assert Policy.parse(str(policy)) == policy
    assert policy.outliers == 6.0
    assert without_quantizers(policy) == Policy.parse("float32")
    assert Policy.parse(f"{DECOMPOSED};head:weight=none,activation=none,outliers=none").at("head").outliers is None


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        ("weight=int8@channel,outliers=6", "which are not both given"),
        (f"{DECOMPOSED};head:weight=none", "weight=none in rule 'head'; say outliers= in rule 'head' too"),
        (f"{DECOMPOSED},execution=native", "is simulated, but execution=native"),
        (f"{DECOMPOSED},backward=original", "backward can only be quantized"),
        (f"{VECTORWISE},outliers=0", "must be a positive number"),
        (f"{VECTORWISE},outliers=inf", "must be a positive number"),
    ],
)
def test_what_cannot_be_taken_apart_is_refused(policy, words):
    with pytest.raises(ValueError, match=words):
        Policy.parse(policy)


def test_convolutions_stored_weights_and_static_scales_are_refused():
    image, kernel = np.ones((1, 4, 4, 2), np.float32), np.ones((3, 3, 2, 3), np.float32)

    def convolve(params, x):
        return lax.conv_general_dilated(x, params["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    x, w = operands()
    with pytest.raises(ValueError, match="leave a convolution out by a rule"):
        pl.apply_policy(convolve, DECOMPOSED)({"w": kernel}, image)
    packed, params = pl.convert(product, DECOMPOSED, x, params={"w": w})
    with pytest.raises(ValueError, match="these are stored quantized"):
        packed(params, x)
    with pytest.raises(ValueError, match="none is static"):
        with_static_scales(Policy.parse(DECOMPOSED))

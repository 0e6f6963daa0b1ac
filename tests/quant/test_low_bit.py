"""Binary and ternary quantizers against the formulas of their papers; numbers in docstrings are checks of the notes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from precision_lab.quant import fake_quantize, observer, quantize, quantizer

RNG = np.random.default_rng(11)
NORMAL = RNG.normal(size=1 << 18).astype(np.float32)
W = (RNG.normal(size=(3, 3, 5, 7)) * 0.7 + 0.1).astype(np.float32)
BY = {"tensor": ((0, 1, 2, 3), 0), "channel": ((0, 1, 2), (0, 1, 2))}


def gradient(spec, x, g, **options):
    return jax.grad(lambda x: jnp.sum(g * fake_quantize(x, spec, **options)))(jnp.asarray(x))


def relative_mse(spec):
    error = np.asarray(fake_quantize(jnp.asarray(NORMAL), spec), np.float64) - NORMAL
    return np.mean(error**2) / np.mean(NORMAL.astype(np.float64) ** 2)


def test_binary_without_a_scale_is_the_sign_with_plus_one_at_zero():
    """BinaryConnect, equation 1."""
    x = jnp.asarray([-3.0, -1e-45, -0.0, 0.0, 1e-45, 0.2, 7.0])

    np.testing.assert_array_equal(fake_quantize(x, "binary,unscaled"), [-1, -1, 1, 1, 1, 1, 1])
    np.testing.assert_array_equal(gradient("binary,unscaled", x, 2.0), np.full(7, 2))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_check_40_stochastic_binary_has_the_weight_as_its_mean(dtype):
    """E[b] = clip(w, -1, 1), within four standard errors, which are at most 4 / sqrt(20,000) = .028."""
    w = jnp.asarray([-2.0, -1.0, -0.6, 0.0, 0.01, 0.9, 1.0, 1.3], dtype)
    many = jnp.broadcast_to(w, (20_000, 8))

    drawn = np.asarray(fake_quantize(many, "binary,unscaled,stochastic", key=jax.random.key(3)), np.float64)

    expected = np.clip(np.asarray(w, np.float64), -1, 1)
    assert set(np.unique(drawn)) == {-1.0, 1.0}
    assert np.all(np.abs(drawn.mean(0) - expected) <= 4 * np.sqrt((1 - expected**2) / 20_000))
    assert np.std(drawn[:, 3]) > 0.9


def test_stochastic_ternary_goes_to_a_neighbouring_level():
    """At scale 2: -0.5 is -2 or 0 with mean -0.5; four standard errors of values 2 apart."""
    x = jnp.broadcast_to(jnp.asarray([-0.5, 1.5, 2.0, 9.0]), (20_000, 4))

    drawn = np.asarray(fake_quantize(x, "ternary,stochastic", scale=2.0, key=jax.random.key(0)))

    assert set(np.unique(drawn[:, 0])) == {-2.0, 0.0}
    assert set(np.unique(drawn[:, 1])) == {0.0, 2.0}
    np.testing.assert_allclose(drawn.mean(0), [-0.5, 1.5, 2, 2], atol=4 * 1 / np.sqrt(20_000))
    assert np.all(drawn[:, 2:] == 2)


def test_check_25_no_other_alpha_is_nearer_to_the_weights():
    """The minimum over alpha of |w - alpha sign(w)|, found by golden section in float64, is mean |w| within 1e-6."""
    w = NORMAL[:4096].astype(np.float64)
    low, high = 0.0, 3.0
    for _ in range(60):
        a, b = high - (high - low) / 1.618033988749895, low + (high - low) / 1.618033988749895
        errors = [np.sum((w - alpha * np.sign(w)) ** 2) for alpha in (a, b)]
        low, high = (low, b) if errors[0] < errors[1] else (a, high)

    alpha = float(quantize(jnp.asarray(NORMAL[:4096]), "binary").scale[0])

    assert alpha == pytest.approx((low + high) / 2, abs=1e-6)


@pytest.mark.parametrize("terms", [1, 2, 3])
def test_check_25_greedy_sums_of_binary_terms(terms):
    """Against the integrals over the normal density: 1 - 2/pi, .1305, .0584.

    The notes have .127 and .055 for two and three terms, which is what blocks of about 64 give; one alpha does not.
    """
    x = np.linspace(-10, 10, 400_001)
    density, left = np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi) * (x[1] - x[0]), x
    for _ in range(terms):
        left = left - np.sum(np.abs(left) * density) * np.sign(left)
    expected = np.sum(left**2 * density)

    rest = jnp.asarray(NORMAL)

    for _ in range(terms):
        rest = rest - fake_quantize(rest, "binary")

    assert float(jnp.mean(rest**2)) / np.mean(NORMAL**2) == pytest.approx(expected, rel=0.015)
    assert expected == pytest.approx({1: 1 - 2 / np.pi, 2: 0.1305, 3: 0.0584}[terms], abs=1e-4)


def test_check_26_b158_on_normal_weights():
    """Entropy of (.310, .345, .345): 1.583 bit; error .2133 with the least-squares scale, 1.068 deviations.

    That is the mean of the magnitudes above t = E|x| / 2, 2 phi(t) / P(|x| > t), and 1.339 times the scale of b1.58.
    """
    codes = quantize(jnp.asarray(NORMAL), "ternary")
    values = np.asarray(codes.dequantize(), np.float64)
    shares = np.bincount(np.asarray(codes.codes).ravel(), minlength=3) / NORMAL.size

    factor = np.sum(values * NORMAL) / np.sum(values**2)
    rescaled = np.asarray(fake_quantize(jnp.asarray(NORMAL), "ternary"), np.float64) * factor

    assert -np.sum(shares * np.log2(shares)) == pytest.approx(1.583, abs=0.003)
    assert factor * float(codes.scale[0]) == pytest.approx(1.068, abs=0.004)
    assert np.mean((rescaled - NORMAL) ** 2) / np.mean(NORMAL**2) == pytest.approx(0.2133, rel=0.01)


def test_checks_26_and_27_twn_lies_between_b158_and_the_optimum():
    best, twn, b158 = (relative_mse(spec) for spec in ("ternary,mse", "ternary,twn", "ternary"))

    assert twn == pytest.approx(0.1919, rel=0.01)
    assert best <= twn < b158


@pytest.mark.parametrize("shared", BY)
def test_twn_is_the_formula_of_the_paper(shared):
    """Threshold 0.7 E|w|, alpha the mean above it, in float64; no code differs."""
    axes, axis = BY[shared]
    w = W.astype(np.float64)
    delta = 0.7 * np.abs(w).mean(axes, keepdims=True)
    kept = np.abs(w) > delta
    alpha = np.sum(np.abs(w) * kept, axes, keepdims=True) / kept.sum(axes, keepdims=True)

    fake = fake_quantize(jnp.asarray(W), f"ternary@{shared},twn", axis=axis)

    np.testing.assert_array_equal(np.sign(fake), np.sign(w) * kept)
    np.testing.assert_allclose(fake, np.sign(w) * kept * alpha, rtol=1e-6)


def test_twn_drops_a_magnitude_at_the_threshold_and_keeps_the_next_number():
    """Mean 1, threshold float32(0.7): the other two values make up for it."""
    at = np.float32(0.7)
    above = np.nextafter(at, np.float32(1))
    dropped, kept = (
        np.asarray(fake_quantize(jnp.asarray([x, 1.15, 1.15], jnp.float32), "ternary,twn", scale=1.0))
        for x in (at, above)
    )

    assert np.float32(np.float32(at + np.float32(1.15)) + np.float32(1.15)) / np.float32(3) == 1
    assert dropped.tolist() == [0, 1, 1]
    assert kept.tolist() == [1, 1, 1]


@pytest.mark.parametrize("shared", BY)
def test_centred_is_the_sign_about_the_mean_times_the_mean_magnitude(shared):
    """BitNet, equations 1 to 3."""
    axes, axis = BY[shared]
    w = W.astype(np.float64)
    expected = np.where(w > w.mean(axes, keepdims=True), 1, -1) * np.abs(w).mean(axes, keepdims=True)

    fake = fake_quantize(jnp.asarray(W), f"binary@{shared},centred", axis=axis)

    np.testing.assert_allclose(fake, expected, rtol=1e-6)
    assert np.any(np.sign(fake) != np.sign(W))


def test_hard_tanh_stops_the_gradient_outside_of_one_whatever_the_scale():
    """BinaryNet, equation 4: 1[|x| <= 1], times what the sign is multiplied by."""
    x = jnp.asarray([-1.5, -1.0, -0.2, 0.0, 0.999, 1.0, 1.001])
    g = jnp.asarray([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0])
    inside = np.array([0, 1, 1, 1, 1, 1, 0])

    np.testing.assert_array_equal(gradient("binary,unscaled,hard_tanh", x, g), inside * g)
    np.testing.assert_allclose(gradient("binary,hard_tanh", x, g), inside * g * np.abs(x).mean(), rtol=1e-6)


@pytest.mark.parametrize("shared", BY)
def test_xnor_weights_have_the_gradient_of_the_paper(shared):
    """XNOR-Net, section 3.1: g (1/n + alpha 1[|w| <= 1]), n weights sharing alpha."""
    axes, axis = BY[shared]
    w, g = W.astype(np.float64), RNG.normal(size=W.shape)
    alpha, n = np.abs(w).mean(axes, keepdims=True), np.prod([W.shape[a] for a in axes])

    found = gradient(f"binary@{shared},xnor", W, jnp.asarray(g, jnp.float32), axis=axis)

    assert np.any(np.abs(w) > 1)
    np.testing.assert_allclose(found, g * (1 / n + alpha * (np.abs(w) <= 1)), rtol=1e-5)


SPECS = ["binary,unscaled", "binary@channel", "binary@channel,centred", "ternary@channel", "ternary,twn", "ternary,mse"]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("spec", [*SPECS, "binary,unscaled,stochastic"])
def test_what_is_stored_has_the_values_that_were_computed_with_and_the_bits_that_were_promised(spec, dtype):
    """1 bit, or five ternary codes to the byte, and 4 bytes for each scale; 1.58 bits are 1.6 here."""
    x = jnp.asarray(RNG.normal(size=(250, 16)), dtype)
    key = {"key": jax.random.key(1)} if "stochastic" in spec else {}

    stored = quantize(x, spec, axis=0, **key)

    np.testing.assert_array_equal(stored.dequantize(), fake_quantize(x, spec, axis=0, **key))
    scales = 16 if "@channel" in spec else 1
    assert stored.nbytes == (4000 // 8 if "binary" in spec else 4000 // 5) + 4 * scales


@pytest.mark.parametrize("spec", ["ternary@group7,twn", "binary@group7,centred", "binary@channel,centred"])
def test_ragged_zero_and_constant_groups(spec):
    x = jnp.asarray(RNG.normal(size=(17, 4)), jnp.float32).at[:, 1].set(0).at[:, 2].set(3)

    fake = np.asarray(fake_quantize(x, spec, axis=0))

    assert not fake[:, 1].any()
    np.testing.assert_allclose(fake[:, 2], 3, rtol=1e-6)
    np.testing.assert_array_equal(fake, quantize(x, spec, axis=0).dequantize())
    if "group" in spec:  # each for itself, the last with three rows
        np.testing.assert_array_equal(fake[14:], fake_quantize(x[14:], spec, axis=0))


@pytest.mark.parametrize("spec", ["ternary@channel,twn", "binary@channel,centred", "binary,unscaled"])
def test_a_nan_is_seen(spec):
    x = jnp.asarray(RNG.normal(size=(6, 4)), jnp.float32).at[3, 1].set(np.nan)

    assert np.isnan(fake_quantize(x, spec, axis=0)[3, 1])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("int4,twn", "calibration 'twn' is for 'ternary'"),
        ("binary,twn", "calibration 'twn' is for 'ternary'"),
        ("ternary,centred", "calibration 'centred' is for 'binary'"),
        ("ternary,twn,clip=0.5", "leave out clip and rounding"),
        ("ternary,twn,stochastic", "leave out clip and rounding"),
        ("binary,unscaled,absmax", "nothing to calibrate"),
        ("binary@channel,unscaled", "no scales for granularity channel"),
        ("ternary,hard_tanh", "estimator 'hard_tanh' is for 'binary'"),
        ("binary,unscaled,xnor", "say 'binary@channel,xnor', or 'hard_tanh'"),
        ("binary,centred,xnor", "differentiates a mean magnitude"),
        ("binary,toward_zero", "a codebook takes the nearest level"),
    ],
)
def test_what_cannot_be_honoured_is_refused_with_the_way_out(spec, message):
    with pytest.raises(ValueError, match=message):
        quantizer(spec)


@pytest.mark.parametrize("spec", ["ternary,twn", "binary,centred"])
def test_thresholds_of_their_own_have_no_static_scale(spec):
    with pytest.raises(ValueError, match="has no static scale; say 'mse'"):
        observer(spec)

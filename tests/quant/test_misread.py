"""Numbers in the wrong format: bits read as another format, values cast to one; and the largest of a block."""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm

import precision_lab as pl
from precision_lab.quant import quantize

RNG = np.random.default_rng(3)
BFLOAT16, FLOAT16 = pl.format("bfloat16"), pl.format("float16")


@pytest.mark.parametrize(("block", "notes"), [(32, 2.349), (64, 2.601), (128, 2.833), (256, 3.050)])
def test_the_mean_largest_magnitude_of_a_block(block, notes):
    """Check 9; by the integral of P(max > t) = 1 - (2 Phi(t) - 1)**n, which the notes' numbers are within .01 of."""
    x = jnp.asarray(RNG.normal(size=(1 << 18,)).astype(np.float32).reshape(-1, block))

    largest = np.asarray(quantize(x, "int8@channel", axis=1).scale, np.float64) * 127

    expected = quad(lambda t: 1 - (2 * norm.cdf(t) - 1) ** block, 0, 10)[0]
    assert expected == pytest.approx(notes, abs=0.01)
    assert largest.mean() == pytest.approx(expected, abs=4 * largest.std() / np.sqrt(largest.size))


def read_as_float16(x):
    return np.asarray(FLOAT16.decode(BFLOAT16.encode(pl.round_to(jnp.asarray(x, jnp.float32), "bfloat16"))), np.float64)


def test_bfloat16_bits_read_as_float16_look_like_weights():
    """Check 44: no NaN gives it away."""
    weights = RNG.normal(0, 0.02, 1 << 18)

    misread = read_as_float16(weights)

    np.testing.assert_allclose(read_as_float16([1.0, 0.02]), [1.875, 1.160], atol=5e-4)
    assert np.isfinite(misread).all()
    assert np.median(abs(misread)) / np.median(abs(weights)) == pytest.approx(81, rel=0.02)
    assert abs(misread).max() == pytest.approx(1.45, abs=0.03)
    assert np.corrcoef(misread, weights)[0, 1] == pytest.approx(0.86, abs=0.01)


def test_weights_in_bfloat16_are_nearly_all_exact_in_float16():
    """Check 45, the share."""
    weights = pl.round_to(jnp.asarray(RNG.normal(0, 0.02, 1 << 18), jnp.float32), "bfloat16")

    assert np.mean(np.asarray(pl.round_to(weights, "float16") == weights)) >= 0.999


def test_a_cast_to_float16_overflows_at_65520_and_flushes_below_half_the_smallest():
    """Check 45: half of a last place above 65504, and 2**-25, which is a tie and goes to zero."""
    x = np.float32([np.nextafter(np.float32(65520), 0), 65520, 2.0**-25, np.nextafter(np.float32(2.0**-25), 1)])

    cast = np.asarray(pl.round_to(jnp.asarray(x), "float16", overflow="inf"))

    np.testing.assert_array_equal(cast, [65504, np.inf, 0, 2.0**-24])


def test_every_float16_is_within_two_to_the_minus_eight_in_bfloat16():
    """Check 45, the way back."""
    every = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
    every = every[np.isfinite(every) & (every != 0)]

    error = np.asarray(pl.round_to(jnp.asarray(every), "bfloat16"), np.float64) / every - 1

    assert abs(error).max() <= 2.0**-8

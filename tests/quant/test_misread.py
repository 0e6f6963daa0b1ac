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


def test_what_a_cast_to_float16_loses_is_counted():
    """Check 45, the counts: by comparison in float64, of values of every size and those next to the two limits."""
    x = (RNG.normal(size=1 << 16) * 2.0 ** RNG.uniform(-32, 20, 1 << 16)).astype(np.float32)
    x[:4] = np.nextafter(np.float32(65520), 0), -65520, -(2.0**-25), np.nextafter(np.float32(2.0**-25), 1)
    x[4] = 0

    stats = pl.tensor_stats(jnp.asarray(x), "float16")

    magnitude = np.abs(x.astype(np.float64))
    lost = magnitude >= 65520, (magnitude <= 2.0**-25) & (magnitude > 0)
    assert [words.tolist() for words in (stats.overflowed, stats.flushed)] == [[int(n.sum()), 0] for n in lost]
    cast = np.asarray(pl.round_to(jnp.asarray(x), "float16", overflow="inf"))
    np.testing.assert_array_equal(np.isinf(cast), lost[0])
    np.testing.assert_array_equal((cast == 0) & (x != 0), lost[1])


def test_an_outlier_is_beyond_the_block_scales_of_nvfp4_without_a_second_level():
    """Check 47: 1e4 among 2**16 normal numbers needs a scale of 1667 in its block, where E4M3 ends at 448.

    One level keeps 6 * 448 of it, which is 2.7 dB. With a second level it is exact, and the error is that of the normal
    numbers, 20.4 dB below them (check 46), and of its 15 neighbours, which become zero: 52.1 dB. The notes say 51.9,
    and not of how many numbers.
    """
    x = RNG.normal(size=1 << 16).astype(np.float32)
    x[5000] = 1e4

    found = {
        spec: np.asarray(pl.fake_quantize(jnp.asarray(x), spec, axis=0), np.float64)
        for spec in ("float4_e2m1fn@group16,scale=float8_e4m3fn", "nvfp4")
    }

    one, two = (10 * np.log10(np.sum(x.astype(np.float64) ** 2) / np.sum((v - x) ** 2)) for v in found.values())
    assert found["float4_e2m1fn@group16,scale=float8_e4m3fn"][5000] == 6 * 448
    assert found["nvfp4"][5000] == pytest.approx(1e4, rel=1e-6)
    assert one == pytest.approx(-20 * np.log10(1 - 6 * 448 / 1e4), abs=0.01)
    assert one == pytest.approx(2.7, abs=0.05)
    assert two == pytest.approx(10 * np.log10(1e8 / (x.size * 10**-2.04 + 15)), abs=0.1)
    assert two == pytest.approx(51.9, abs=0.4)
    assert quantize(jnp.asarray(x), "float4_e2m1fn@group16,scale=float8_e4m3fn", axis=0).bits_per_element == 4.5

"""Stochastic rounding: exact against the oracle for given bits, unbiased over all of them, biased as hardware is."""

import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from precision_lab import formats
from precision_lab.formats import oracle, round_to
from tests.formats.format_cases import NARROWER_THAN_FLOAT32, ROUNDABLE, assert_same_numbers, hard_float32

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def random_bits(shape, dtype=np.uint32, seed=0):
    """Returns uniformly distributed unsigned integers."""
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


@pytest.mark.parametrize(
    ("dtype", "n_bits", "centred"),
    [(np.uint32, None, False), (np.uint8, None, False), (np.uint16, 11, True), (np.uint32, 2, False)],
)
@pytest.mark.parametrize("fmt", ROUNDABLE, ids=str)
def test_given_bits_decide_as_in_the_oracle(fmt, dtype, n_bits, centred):
    x = hard_float32(fmt, 1024)
    bits = random_bits(x.shape, dtype)
    options = {"rounding": "stochastic", "bits": bits, "n_bits": n_bits, "centred": centred}

    rounded = round_to(x, fmt, **options)

    assert_same_numbers(rounded, oracle.round_to(x, fmt, **options))
    if fmt.has_zero:
        assert_same_numbers(round_to(x, fmt.params(), **options), rounded)


@pytest.mark.parametrize("fmt", ROUNDABLE, ids=str)
def test_values_of_the_format_stay_whatever_the_bits(fmt):
    grid = fmt.grid() if fmt.bits <= 8 else np.float32([0.5, 1, 1.5, fmt.min_normal, fmt.min_subnormal, fmt.max])
    grid = grid[np.isin(grid, fmt.grid())] if fmt.bits <= 16 else grid
    every_bit = np.uint32([0, 0xFFFFFFFF, 0x55555555])

    for bits in every_bit:
        rounded = round_to(np.float32(grid), fmt, rounding="stochastic", bits=np.full(grid.shape, bits))
        assert_same_numbers(rounded, np.float32(grid))


@pytest.mark.parametrize("x", [1.2345678, -3.3e-5, 5.0e20])
def test_mean_over_all_bits_is_the_value_in_bfloat16(x):
    """float32 has 16 bits more, so that 2**16 patterns are all there are."""
    x = np.float32(x)
    every = np.arange(1 << 16, dtype=np.uint16)

    rounded = np.asarray(round_to(np.full(every.shape, x), "bf16", rounding="stochastic", bits=every))

    assert len(set(rounded.tolist())) == 2
    assert sum(map(Fraction, rounded.tolist())) == (1 << 16) * Fraction(float(x))


@pytest.mark.parametrize("x", [1.2345678, -200.7])
def test_mean_over_all_bits_is_the_value_in_float8(x):
    """20 bits are discarded, so that 2**20 patterns are all there are."""
    x = np.float32(x)
    every = np.arange(1 << 20, dtype=np.uint32)

    rounded = np.asarray(round_to(np.full(every.shape, x), "e4m3fn", rounding="stochastic", bits=every, n_bits=20))

    values, counts = np.unique(rounded, return_counts=True)
    assert len(values) == 2
    total = sum(Fraction(float(v)) * int(n) for v, n in zip(values, counts, strict=True))
    assert total == (1 << 20) * Fraction(float(x))


@pytest.mark.parametrize("x", [1.3, 0.007, 0.0001953125, 300.0])
@pytest.mark.parametrize("name", ["e4m3fn", "float8_e5m2", "int8"])
def test_the_upper_neighbour_is_as_likely_as_it_is_near(name, x):
    """Within four standard errors; normal, subnormal and below the smallest value; no third value."""
    fmt, count = formats.format(name), 1 << 20
    x = np.float32(min(x, fmt.max * 0.99))
    low, high = (float(oracle.round_to(x, fmt, rounding=rounding)) for rounding in ("down", "up"))

    rounded = round_to(jnp.full(count, x), fmt, rounding="stochastic", key=jax.random.key(0))

    chance = (float(x) - low) / (high - low)
    assert set(np.unique(rounded).tolist()) <= {low, high}
    ups = np.mean(np.asarray(rounded) == high)
    assert ups == pytest.approx(chance, abs=4 * (chance * (1 - chance) / count) ** 0.5)


def test_a_tenth_of_the_smallest_value_comes_up_every_tenth_time():
    fmt, count = formats.format("e4m3fn"), 1 << 20
    x = jnp.full(count, 0.1 * fmt.min_subnormal, jnp.float32)

    rounded = round_to(x, fmt, rounding="stochastic", key=jax.random.key(1))

    assert np.mean(np.asarray(rounded) == fmt.min_subnormal) == pytest.approx(0.1, abs=0.0012)


@pytest.mark.parametrize(
    ("n_bits", "centred", "bias"), [(2, False, -1 / 8), (4, False, -1 / 32), (2, True, 0), (4, True, 0)]
)
def test_few_random_bits_bias_as_theory_says(n_bits, centred, bias):
    """Truncating to n bits loses half of 2**-n ulp on average; adding that half first takes the bias away."""
    x = np.random.default_rng(5).uniform(1, 2, 1 << 18).astype(np.float32)

    errors = []
    for pattern in range(1 << n_bits):
        bits = np.full(x.shape, pattern, np.uint8)
        rounded = round_to(x, "e4m3fn", rounding="stochastic", bits=bits, n_bits=n_bits, centred=centred)
        errors.append(np.mean(np.asarray(rounded, np.float64) - x) / 2**-3)

    assert np.mean(errors) == pytest.approx(bias, abs=0.003)


def test_the_same_key_gives_the_same_result_compiled_or_not_and_another_key_another():
    x = np.random.default_rng(6).standard_normal(1 << 20).astype(np.float32)
    key = jax.random.key(7)

    eager = round_to(x, "e4m3fn", rounding="stochastic", key=key)
    compiled = jax.jit(lambda x, key: round_to(x, "e4m3fn", rounding="stochastic", key=key))(x, key)
    other = round_to(x, "e4m3fn", rounding="stochastic", key=jax.random.fold_in(key, 1))

    assert_same_numbers(compiled, eager)
    errors = [np.asarray(side, np.float64) - x for side in (eager, other)]
    assert abs(np.corrcoef(*errors)[0, 1]) < 0.01


DEVICES = """
import numpy as np, jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from precision_lab.formats import round_to

assert jax.device_count() == 2
x = np.random.default_rng(0).standard_normal(1 << 12).astype(np.float32)
draw = jax.jit(lambda x, key: round_to(x, "e4m3fn", rounding="stochastic", key=key))
one = draw(x, jax.random.key(3))
split = jax.device_put(x, NamedSharding(Mesh(np.array(jax.devices()), "i"), PartitionSpec("i")))
np.testing.assert_array_equal(draw(split, jax.random.key(3)), one)
"""


def test_one_device_and_two_agree():
    environment = {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "PATH": "",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(Path.cwd()),
    }

    subprocess.run([sys.executable, "-c", DEVICES], check=True, timeout=120, env=environment)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
def test_every_dtype_is_unbiased(dtype):
    """1.3 is not representable, so the mean is that of its rounding to the dtype; four standard errors."""
    x = jnp.full(1 << 16, 1.3, dtype)

    rounded = round_to(x, "e5m2", rounding="stochastic", key=jax.random.key(8))

    chance = (float(x[0]) - 1.25) / 0.25
    assert rounded.dtype == dtype
    assert np.mean(np.asarray(rounded, np.float64) == 1.5) == pytest.approx(chance, abs=4 * 0.5 / 2**8)


def test_float64_uses_64_bits():
    with jax.enable_x64(True):
        x = np.full(3, 1 + 2.0**-40)
        least = np.uint64((1 << 64) - (1 << 24))
        bits = np.array([least, least - np.uint64(1), 0], np.uint64)

        rounded = round_to(x, "float32", rounding="stochastic", bits=bits)

    expected = oracle.round_to(x, "float32", rounding="stochastic", bits=bits)
    assert_same_numbers(rounded, expected)


def test_stacked_formats_share_bits_under_vmap():
    x = np.random.default_rng(9).standard_normal(512).astype(np.float32)
    bits = random_bits(x.shape)
    params = formats.stack_formats(NARROWER_THAN_FLOAT32)

    together = jax.vmap(lambda p: round_to(x, p, rounding="stochastic", bits=bits))(params)

    for row, fmt in zip(together, NARROWER_THAN_FLOAT32, strict=True):
        assert_same_numbers(row, round_to(x, fmt, rounding="stochastic", bits=bits))


@pytest.mark.parametrize("dtype", [jnp.uint8, jnp.uint16, jnp.uint32])
@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_random_bits_are_fair_and_independent_bit_by_bit(impl, dtype):
    count = 1 << 14

    keys = jax.random.split(jax.random.key(11, impl=impl))
    one, other = (np.asarray(formats.random_bits(key, (count,), dtype)) for key in keys)

    bits = np.unpackbits(np.stack([one, other]).view(np.uint8), axis=-1).reshape(2, count, -1) * 2.0 - 1
    width = 8 * np.dtype(dtype).itemsize
    assert one.dtype == dtype
    assert bits.shape == (2, count, width)
    # A sum of n fair signs has a standard deviation of sqrt(n); five of them leave a false alarm in 500 seeds.
    bound = 5 * count**0.5
    assert np.all(np.abs(bits.sum(axis=1)) < bound)
    between = np.abs(bits[0].T @ bits[0]) - count * np.eye(width)
    assert np.all(between < bound)
    assert np.all(np.abs(bits[0].T @ bits[1]) < bound)
    assert np.all(np.abs(bits[0][:-1].T @ bits[0][1:]) < bound)


def test_random_bits_are_those_of_their_key_in_every_shape_and_context():
    key = jax.random.key(12)
    bits = formats.random_bits(key, (3, 5))

    np.testing.assert_array_equal(jax.jit(lambda key: formats.random_bits(key, (3, 5)))(key), bits)
    np.testing.assert_array_equal(formats.random_bits(jax.random.key_data(key), (3, 5)), bits)
    batched = jax.vmap(lambda key: formats.random_bits(key, (3, 5)))(jax.random.split(key, 4))
    for row, one in zip(batched, jax.random.split(key, 4), strict=True):
        np.testing.assert_array_equal(row, formats.random_bits(one, (3, 5)))
    np.testing.assert_array_equal(formats.random_bits(key, (15,)), bits.reshape(-1))
    assert formats.random_bits(key, ()) == bits[0, 0]


@pytest.mark.parametrize("dtype", [jnp.int32, jnp.float32, jnp.uint64])
def test_random_bits_of_another_dtype_are_refused(dtype):
    with pytest.raises(TypeError, match="random bits are uint8, uint16, uint32, or uint64 under jax_enable_x64; got"):
        formats.random_bits(jax.random.key(0), (2,), dtype)


def test_random_bits_have_64_bits_under_x64():
    with jax.enable_x64(True):
        bits = np.asarray(formats.random_bits(jax.random.key(13), (4096,), jnp.uint64))

    assert bits.dtype == np.uint64
    ones = np.unpackbits(bits.view(np.uint8).reshape(-1, 8), axis=-1).sum(axis=0)
    # 4096 fair bits have a sum of 2048 with a standard deviation of 32.
    assert np.all(np.abs(ones - 2048.0) < 5 * 32)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"rounding": "stochastic"}, ValueError, "needs randomness; give key= or bits="),
        ({"key": jax.random.key(0)}, ValueError, "'nearest_even' uses no randomness"),
        ({"n_bits": 4}, ValueError, "n_bits= and centred= say how to use random bits"),
        ({"rounding": "stochastic", "bits": np.zeros(2, np.int32)}, TypeError, "unsigned integers, got int32"),
        ({"rounding": "stochastic", "bits": np.zeros(3, np.uint32)}, ValueError, r"shape of x, \(2,\), got \(3,\)"),
        (
            {"rounding": "stochastic", "bits": np.zeros(2, np.uint8), "n_bits": 9},
            ValueError,
            "n_bits must be from 1 to 8",
        ),
        ({"rounding": "stochastic", "key": jax.random.key(0), "n_bits": 0}, ValueError, "n_bits must be from 1 to"),
        (
            {"rounding": "stochastic", "key": jax.random.key(0), "centred": True},
            ValueError,
            "centred=True goes with n_bits",
        ),
        (
            {"rounding": "stochastic", "key": jax.random.key(0), "bits": np.zeros(2, np.uint32)},
            ValueError,
            "give key= or bits=, not both",
        ),
    ],
)
def test_contradicting_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        round_to(jnp.ones(2), "e4m3fn", **options)

"""Statistics against counting in NumPy, on every bit pattern of narrow types and on sampled ones of float32."""

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from precision_lab import formats
from precision_lab.telemetry import Reading, empty, merge, tensor_stats, window
from precision_lab.telemetry.statistics import stats_of_many
from tests.jaxprs import assert_same_bits

NARROW = ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz", "float8_e8m0fnu"]


def every_value(name):
    dtype = np.dtype(getattr(ml_dtypes, name, None) or name)
    word = np.uint16 if dtype.itemsize == 2 else np.uint8
    return np.arange(2 ** (8 * dtype.itemsize)).astype(word).view(dtype)


def float32_bit_patterns(n, seed=0):
    bits = np.random.default_rng(seed).integers(0, 2**32, n, dtype=np.uint32)
    edges = [0, 1, 2, 3, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FC00000]
    return np.concatenate(
        [bits, bits & 0x807FFFFF, np.array(edges, np.uint32), np.array(edges, np.uint32) | 2**31]
    ).view(np.float32)


def widened(x):
    """Returns the values in float64, where every magnitude is normal."""
    with np.errstate(invalid="ignore"):
        return x.astype(np.float64)


def counted(x):
    """Counts by frexp."""
    x = np.abs(widened(x)).ravel()
    finite = x[np.isfinite(x) & (x > 0)]
    exponents, n = np.unique(np.frexp(finite)[1] - 1, return_counts=True)
    return {int(e): int(k) for e, k in zip(exponents, n, strict=True)}


def reading(x, fmt=None, **options):
    fmt = None if fmt is None else formats.format(fmt)
    return Reading(jax.device_get(jax.jit(lambda x: tensor_stats(x, fmt, **options))(x)), fmt, fmt is not None)


@pytest.mark.parametrize("x", [*map(every_value, NARROW), float32_bit_patterns(20000)], ids=[*NARROW, "float32"])
def test_every_element_is_counted_in_its_binade(x):
    found = reading(jnp.asarray(x))

    wide = widened(x)
    assert found.binades == counted(x)
    assert found.count == x.size
    assert found.zeros == np.sum(wide == 0)
    assert found.infs == np.sum(np.isinf(wide))
    assert found.nans == np.sum(np.isnan(wide))
    assert found.nonfinite == (not np.isfinite(wide).all())
    magnitudes = np.abs(wide[np.isfinite(wide)])
    assert found.amax == magnitudes.max()
    assert found.amin == magnitudes[magnitudes > 0].min()


def test_float64_counts_in_its_binade_and_at_the_edges_beyond_float32():
    with jax.enable_x64(True):
        x = np.array(
            [0, -1.5, 2.0**-126, 1.75 * 2.0**-149, 2.0**-200, 5e-324, 1e300, -np.inf, np.nan, 2.0**127 * 1.999]
        )
        found = reading(jnp.asarray(x))

        assert found.binades == {0: 1, -126: 1, -149: 3, 127: 2}
        assert (found.zeros, found.infs, found.nans) == (1, 1, 1)


@pytest.mark.parametrize("scale", [1e-36, 1e-20, 1.0, 1e18, 1e37])
def test_mean_and_rms_do_not_leave_the_range_of_float32(scale):
    x = (np.random.default_rng(0).normal(1, 1, (300, 40)) * scale).astype(np.float32)

    found = reading(jnp.asarray(x))

    wide = x.astype(np.float64)
    assert found.mean == pytest.approx(wide.mean(), rel=1e-5)
    assert found.rms == pytest.approx(np.sqrt((wide**2).mean()), rel=1e-5)


def test_numbers_by_hand():
    x = jnp.array([[0.0, -0.0, 3.0], [-4.0, jnp.inf, jnp.nan]])

    found = reading(x)

    assert (found.count, found.finite, found.zeros, found.infs, found.nans) == (6, 4, 2, 1, 1)
    assert (found.amax, found.amin, found.mean, found.rms) == (4.0, 3.0, -0.25, 2.5)
    assert found.binades == {1: 1, 2: 1}
    assert found.sparkline() == "2^1 ██ 2^2"


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "float16", "bfloat16", "float4_e2m1fn"])
def test_rounding_errors_are_those_of_a_cast(name):
    fmt = formats.format(name)
    x = np.concatenate([np.float32(2.0) ** np.arange(-40, 20) * 1.3, np.float32([fmt.max, 0, -0.0, np.inf, np.nan])])
    x = np.concatenate([x, -x]).astype(np.float32)

    found = reading(jnp.asarray(x), name)

    with np.errstate(over="ignore"):
        cast = x.astype(fmt.dtype).astype(np.float64)
    finite = np.isfinite(x)
    saturated = np.abs(x) > fmt.max if name == "float4_e2m1fn" else ~np.isfinite(cast)
    assert found.beyond(fmt) == np.sum(finite & saturated) / x.size
    assert found.flushed(fmt) == np.sum(finite & (x != 0) & (cast == 0)) / x.size


def test_sqnr_is_that_of_the_rounded_values():
    x = np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32)
    error = x.astype(np.float64) - x.astype(ml_dtypes.float8_e4m3fn).astype(np.float64)

    expected = 10 * math.log10((x.astype(np.float64) ** 2).sum() / (error**2).sum())

    assert reading(jnp.asarray(x), "float8_e4m3fn").sqnr_db == pytest.approx(expected, abs=1e-3)
    assert reading(jnp.asarray(x * np.float32(2.0**-90)), "bfloat16").sqnr_db == pytest.approx(
        reading(jnp.asarray(x), "bfloat16").sqnr_db, abs=1e-3
    )
    assert reading(jnp.asarray(x), "float32").sqnr_db == math.inf


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "float16", "int8"])
def test_shares_of_a_format_that_was_not_known_come_from_the_histogram(name):
    """On magnitudes 1.25 * 2^e the binade decides, so that the histogram must agree with counting the elements."""
    fmt = formats.format(name)
    exponents = np.random.default_rng(0).integers(-40, 40, 5000)
    x = (1.25 * 2.0**exponents).astype(np.float32)

    found = reading(jnp.asarray(x))

    top = np.floor(np.log2(fmt.max))
    assert found.below(fmt) == np.mean(x < fmt.min_normal)
    assert found.flushed(fmt) == np.mean(x <= fmt.min_subnormal / 2)
    assert found.beyond(fmt) == np.mean(exponents > top)


def test_windows_are_those_of_the_definitions():
    assert window(formats.format("float8_e4m3fn")) == (-9, -6, 8)
    assert window(formats.format("float16")) == (-24, -14, 15)
    assert window(formats.format("bfloat16")) == (-133, -126, 127)


def test_merging_parts_gives_the_whole():
    x = jnp.asarray(float32_bit_patterns(3000)).reshape(-1)
    x = jnp.where(jnp.abs(x) > 1e30, jnp.float32(1), x)
    parts = [x[:17], x[17:2000], x[2000:]]

    stats = jax.jit(lambda x: tensor_stats(x, "float8_e5m2"))

    @jax.jit
    def ways(a, b, c):
        return merge(merge(a, b), c), merge(c, merge(b, a)), merge(empty(a), merge(a, merge(b, c)))

    whole = stats(x)

    for merged in ways(*map(stats, parts)):
        for name in ("counts", "amax", "amin", "exponent", "nonfinite", "overflowed", "flushed"):
            assert_same_bits(getattr(merged, name), getattr(whole, name))
        for name in ("squares", "total"):
            np.testing.assert_allclose(getattr(merged, name), getattr(whole, name), rtol=1e-5, atol=1e-5)


def test_counts_go_on_beyond_32_bits():
    one = tensor_stats(jnp.ones(3))
    full = one._replace(counts=jnp.where(one.counts > 0, jnp.uint32(2**32 - 2), one.counts))

    merged = Reading(jax.device_get(merge(merge(full, one), full)))

    assert merged.count == 2 * (2**32 - 2) + 3


def test_a_sample_visits_every_channel_alike_and_misses_no_infinity():
    x = np.ones((256, 64), np.float32) * np.arange(1, 65, dtype=np.float32)
    x[255, 63] = np.inf

    found = reading(jnp.asarray(x), limit=1024)

    assert found.nonfinite
    assert 512 < found.count <= 1024
    share = {e: n / found.count for e, n in found.binades.items()}
    for exponent, channels in {0: 1, 1: 2, 2: 4, 3: 8, 4: 16, 5: 32, 6: 1}.items():
        assert share[exponent] == pytest.approx(channels / 64, abs=0.01)


def test_an_empty_array_has_no_elements():
    found = reading(jnp.zeros((0, 3)))

    assert (found.count, found.amax, found.amin, found.nonfinite) == (0, 0.0, math.inf, False)
    assert math.isnan(found.rms)


def test_what_has_no_statistics_is_refused():
    with pytest.raises(TypeError, match="floating arrays, got int32"):
        tensor_stats(jnp.ones(3, jnp.int32))
    with pytest.raises(ValueError, match="at least 1 element, got 0"):
        tensor_stats(jnp.ones(3), limit=0)


@pytest.mark.parametrize("fmt", [None, "float8_e5m2"])
def test_many_tensors_at_once_are_the_same_as_one_by_one(fmt):
    rng = np.random.default_rng(0)
    shapes, dtypes = [(50, 7), (3,), (40, 40), (0,)], ["float32", "bfloat16", "float16", "float32"]
    arrays = [jnp.asarray(rng.normal(size=shape) * 1e-5, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    arrays += [jnp.zeros((30, 30)).at[29, 29].set(jnp.nan), jnp.asarray([1e-40, -3e-45], jnp.bfloat16)]

    together = jax.jit(lambda xs: stats_of_many([(x, fmt) for x in xs], 100))(arrays)

    one_by_one = jax.jit(lambda x: tensor_stats(x, fmt, limit=100))
    for found, x in zip(together, arrays, strict=True):
        alone = one_by_one(x)
        for name in ("counts", "amax", "amin", "exponent", "nonfinite", "overflowed", "flushed"):
            assert_same_bits(getattr(found, name), getattr(alone, name))
        for name in ("total", "squares", "noise"):
            np.testing.assert_allclose(getattr(found, name), getattr(alone, name), rtol=1e-5, atol=1e-6)

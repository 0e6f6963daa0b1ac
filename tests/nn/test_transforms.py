"""Changes of weights that leave the function as it is, and audits of what a narrow format loses."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from precision_lab.nn.transforms import Norm, Pair, inject_norm_outliers, rescale_pair, store_as
from precision_lab.ptq.equalization import equalize

BITS = np.random.default_rng(0)


def pair(bias=True, seed=0):
    rng = np.random.default_rng(seed)
    first, second, b = rng.normal(size=(5, 7)), rng.normal(size=(7, 3)), rng.normal(size=7)
    return Pair(*(np.float32(x) for x in (first, second)), np.float32(b) if bias else None)


def function(p, x):
    """relu(x first + bias) second, in the arithmetic of float32."""
    hidden = np.float32(x) @ np.asarray(p.first) + (0 if p.bias is None else np.asarray(p.bias))
    return np.maximum(hidden, 0) @ np.asarray(p.second)


@pytest.mark.parametrize("bias", [True, False])
def test_powers_of_two_around_a_relu_change_no_bit_of_the_result(bias):
    x, exponents = np.random.default_rng(1).normal(size=(11, 5)), BITS.integers(-30, 31, 7)

    moved = rescale_pair(pair(bias), exponents)

    np.testing.assert_array_equal(function(moved, x), function(pair(bias), x))
    np.testing.assert_array_equal(moved.first, np.ldexp(pair().first, exponents))


@pytest.mark.parametrize("exponent", [-126, 126])
def test_the_largest_powers_of_two_are_exact(exponent):
    """XLA divides by a broadcast array through reciprocals, and that of 2**127 is no normal number."""
    first, second = np.ldexp(pair().first, -exponent // 2), np.ldexp(pair().second, exponent // 2)

    moved = rescale_pair(Pair(first, second), np.full(7, exponent))

    np.testing.assert_array_equal(moved.first, np.ldexp(first, exponent))
    np.testing.assert_array_equal(moved.second, np.ldexp(second, -exponent))


def test_equalization_gives_both_layers_the_geometric_mean_of_their_ranges():
    p = pair()

    equal = equalize(p)

    r1, r2 = np.abs(np.float64(p.first)).max(axis=0), np.abs(np.float64(p.second)).max(axis=1)
    np.testing.assert_allclose(np.abs(equal.first).max(axis=0), np.sqrt(r1 * r2), rtol=1e-6)
    np.testing.assert_allclose(np.abs(equal.second).max(axis=1), np.sqrt(r1 * r2), rtol=1e-6)
    np.testing.assert_allclose(equal.bias / p.bias, np.sqrt(r2 / r1), rtol=1e-6)
    x = np.random.default_rng(1).normal(size=(11, 5))
    np.testing.assert_allclose(function(equal, x), function(p, x), atol=1e-5)


def test_equalization_undoes_a_rescaling():
    exponents = BITS.integers(-8, 9, size=7)

    undone = equalize(rescale_pair(pair(), exponents))

    np.testing.assert_allclose(undone.first, equalize(pair()).first, rtol=1e-6)
    np.testing.assert_allclose(undone.second, equalize(pair()).second, rtol=1e-6)


def test_units_that_are_not_made_or_not_read_are_left_alone():
    p = pair()
    first, second = p.first.copy(), p.second.copy()
    first[:, 2], second[4] = 0, 0

    equal = equalize(Pair(first, second))

    np.testing.assert_array_equal(equal.second[2], second[2])
    np.testing.assert_array_equal(np.asarray(equal.first)[:, 4], first[:, 4])


def test_outliers_of_a_norm_are_undone_by_the_kernels_that_read_it():
    rng = np.random.default_rng(0)
    gain, bias, x = (np.float32(rng.normal(size=size)) for size in (8, 8, (20, 8)))
    kernels = tuple(np.float32(rng.normal(size=(8, out))) for out in (3, 4))

    grown = inject_norm_outliers(Norm(gain, bias, kernels), [1, 6], 100.0)

    before, after = x * gain + bias, x * np.asarray(grown.gain) + np.asarray(grown.bias)
    np.testing.assert_allclose(after / before, np.where(np.isin(np.arange(8), [1, 6]), 100, 1) + 0 * x, rtol=1e-5)
    for old, new in zip(kernels, grown.kernels, strict=True):
        np.testing.assert_allclose(after @ np.asarray(new), before @ old, atol=1e-5)


def test_outliers_by_a_power_of_two_change_no_bit():
    norm = Norm(np.float32([1.1, 0.3]), np.float32([0.7, 0.1]), (np.float32([[1.3], [0.9]]),))
    x = np.float32(BITS.normal(size=(50, 2)))

    grown = inject_norm_outliers(norm, [0], 64.0)

    np.testing.assert_array_equal(
        (x * np.asarray(grown.gain) + np.asarray(grown.bias)) @ np.asarray(grown.kernels[0]),
        (x * norm.gain + norm.bias) @ norm.kernels[0],
    )


@pytest.mark.parametrize("name", ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_an_audit_counts_what_a_cast_of_ml_dtypes_loses(name):
    x = np.float32(np.ldexp(BITS.uniform(1, 2, 4000), BITS.integers(-140, 128, 4000)) * BITS.choice([-1, 1], 4000))
    x = np.append(x, np.float32([0.0, -0.0, np.inf, np.nan, 3.4e38]))
    dtype = np.dtype(getattr(ml_dtypes, name, name))
    with np.errstate(over="ignore"):
        cast = x.astype(dtype).astype(np.float32)

    stored, audit = store_as(x, name)

    np.testing.assert_array_equal(stored, cast)
    finite = np.isfinite(x)
    tiny = float(ml_dtypes.finfo(dtype).smallest_normal)
    assert audit == (
        np.sum(finite & ~np.isfinite(cast)),
        np.sum(finite & (x != 0) & (cast == 0)),
        np.sum((cast != 0) & (np.abs(cast) < tiny)),
        x.size,
    )
    assert audit.overflow > 0
    assert audit.subnormal > 0


def test_clamping_stores_the_largest_number_and_counts_the_same():
    x = np.float32([1e6, -1e6, 65519.0, 1.0, np.inf])

    clamped, audit = store_as(x, "float16", clamp=True)

    np.testing.assert_array_equal(clamped, np.float32([65504, -65504, 65504, 1, np.inf]))
    assert audit == store_as(x, "float16")[1] == (2, 0, 0, 5)


@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "float4_e2m1fn", "float16"])
@pytest.mark.parametrize("clamp", [False, True])
def test_what_is_stored_can_be_stored_again_also_of_infinite_numbers(name, clamp):
    """Clamping left an infinity where E4M3FN has none."""
    x = np.float32([np.inf, -np.inf, np.nan, 1e6, 1.0])

    stored, _ = store_as(x, name, clamp=clamp)

    np.testing.assert_array_equal(store_as(stored, name)[0], stored)
    np.testing.assert_array_equal(stored[:3], store_as(x[:3], name)[0])


@pytest.mark.parametrize("dtypes", [("float16", "float16"), ("bfloat16", "float32"), ("float32", "float16")])
def test_kernels_keep_their_dtypes_and_only_results_need_their_range(dtypes):
    """2**20 is no number of float16, though a weight of 2**-10 times that is one."""
    first, second = (jnp.asarray(np.ldexp(w, e), d) for w, e, d in zip(pair()[:2], (-10, 0), dtypes, strict=True))
    exponents = np.asarray([20, 16, 3, 0, 1, 20, 17])

    with jax.numpy_dtype_promotion("strict"):
        moved = jax.jit(rescale_pair)(Pair(first, second), exponents)
        equal = equalize(Pair(first, second))

    assert [x.dtype for x in (*moved[:2], *equal[:2])] == [jnp.dtype(d) for d in dtypes] * 2
    np.testing.assert_array_equal(np.float32(moved.first), np.ldexp(np.float32(first), exponents))
    near = np.ldexp(np.float32(second), -exponents[:, None])
    np.testing.assert_array_equal(np.float32(moved.second), near.astype(jnp.dtype(dtypes[1])).astype(np.float32))
    ranges = np.abs(np.float32(equal.first)).max(0), np.abs(np.float32(equal.second)).max(1)
    np.testing.assert_allclose(*ranges, rtol=2**-7)  # each side is rounded once, in bfloat16 by up to 2**-9


def test_what_has_no_largest_number_beyond_which_it_overflows_saturates_and_is_counted():
    stored, audit = store_as(np.float32([100.0, 6.0, 1.0]), "float4_e2m1fn")

    np.testing.assert_array_equal(stored, [6, 6, 1])
    assert audit.overflow == 1


def norm_read_by(rows):
    return Norm(jnp.ones(3), None, (jnp.ones((rows, 2)),))


def test_channels_are_counted_from_either_end_or_marked():
    mask = np.asarray([True, False, True])

    gains = [inject_norm_outliers(norm_read_by(3), which, 2.0).gain for which in ([0, 2], [-3, -1], mask)]

    for gain in gains:
        np.testing.assert_array_equal(gain, [2, 1, 2])


def test_exponents_are_whole():
    with pytest.raises(TypeError, match="takes integers as exponents, got float"):
        rescale_pair(pair(), np.full(7, 1.5))


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: store_as(np.float32([1.0]), "int8"), "needs a scale; quantize"),
        (lambda: rescale_pair(pair(), np.zeros(6, int)), r"factors \(hidden,\); got"),
        (lambda: equalize(Pair(np.ones((2, 3)), np.ones((4, 2)))), "expected kernels"),
        (
            lambda: inject_norm_outliers(norm_read_by(4), [0], 2.0),
            r"as many rows, got \[4\]",
        ),
        (lambda: inject_norm_outliers(norm_read_by(3), [0], 0.0), "positive number"),
        (lambda: inject_norm_outliers(norm_read_by(3), [0], np.inf), "positive number, not infinite"),
        (lambda: inject_norm_outliers(norm_read_by(3), [0, 3], 2.0), "channel 3 of a norm of 3 channels"),
        (lambda: inject_norm_outliers(norm_read_by(3), [-4], 2.0), "channel -4 of a norm of 3 channels"),
        (lambda: rescale_pair(pair(), np.full(7, 127)), "exponents from 127 to 127: those of"),
        (lambda: rescale_pair(pair(), np.full(7, -127)), "exponents from -127 to -127: those of"),
    ],
)
def test_what_does_not_fit_is_refused(call, words):
    with pytest.raises(ValueError, match=words):
        call()

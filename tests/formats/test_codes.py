"""Codes: every code of every narrow format, against ml_dtypes and the oracle."""

import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from precision_lab import formats
from precision_lab.formats import oracle
from tests.formats.format_cases import ALL, CODED, DETERMINISTIC, ML_DTYPES_FLOATS, assert_same_numbers, hard_float32

by_format = pytest.mark.parametrize("fmt", CODED, ids=str)


def every_code(fmt: formats.Format) -> np.ndarray:
    """Returns all codes that stand for something."""
    codes = np.arange(1 << fmt.bits)
    return np.delete(codes, 1 << fmt.mantissa_bits) if fmt.specials == "narrow" else codes


@by_format
def test_every_code_survives_the_round_trip(fmt):
    codes = every_code(fmt)

    values = fmt.decode(codes)
    back = fmt.encode(values)

    assert_same_numbers(fmt.decode(back), values)
    np.testing.assert_array_equal(back[~np.isnan(values)], codes[~np.isnan(values)])
    assert back.dtype == (np.uint8 if fmt.bits <= 8 else np.uint16)


@pytest.mark.parametrize("fmt", ML_DTYPES_FLOATS, ids=str)
def test_codes_are_those_of_ml_dtypes(fmt):
    codes = np.arange(1 << fmt.bits).astype(np.uint8 if fmt.bits <= 8 else np.uint16)

    with np.errstate(invalid="ignore"):
        assert_same_numbers(fmt.decode(codes), codes.view(fmt.dtype).astype(np.float32))


@pytest.mark.parametrize("name", ["int2", "int4", "int8", "int16"])
def test_integer_codes_are_twos_complement(name):
    fmt = formats.format(name)

    stored = fmt.grid().astype(fmt.dtype).astype(np.int64)

    np.testing.assert_array_equal(fmt.encode(fmt.grid()), stored % (1 << fmt.bits))
    np.testing.assert_array_equal(fmt.decode(fmt.grid().astype(fmt.dtype)), fmt.grid())


@pytest.mark.parametrize("rounding", DETERMINISTIC)
@pytest.mark.parametrize(
    "name",
    [
        "float8_e4m3fn",
        "float8_e5m2",
        "p3109_k8p4",
        "float16",
        "int4",
        "e3m0:finite",
        "uint4",
        "fixed8.4",
        "float8_e8m0fnu",
    ],
)
def test_encode_rounds_as_the_oracle_does(name, rounding):
    fmt = formats.format(name)
    x = hard_float32(fmt)
    x = x[~np.isnan(x)]

    codes = fmt.encode(x, rounding=rounding, overflow="saturate")

    assert_same_numbers(fmt.decode(codes), oracle.round_to(x, fmt, rounding=rounding, overflow="saturate"))


def test_encode_takes_every_real_dtype_and_shape():
    fmt = formats.format("bf16")

    assert fmt.encode(-2.0).shape == ()
    assert fmt.encode(np.float16([[1, -2], [0.5, -0.0]])).tolist() == [[0x3F80, 0xC000], [0x3F00, 0x8000]]
    assert fmt.encode(jnp.ones(2, jnp.bfloat16)).tolist() == [0x3F80, 0x3F80]
    assert formats.format("int4").encode(np.array([3, -3], ml_dtypes.int4)).tolist() == [3, 13]
    assert fmt.encode(np.zeros((0, 3))).shape == (0, 3)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32])
@by_format
def test_codes_inside_jax_are_those_of_numpy(fmt, dtype):
    x = jnp.asarray(hard_float32(fmt, 1024)).astype(dtype)
    x = x[~jnp.isnan(x)]

    codes = jax.jit(lambda x: fmt.encode(x, overflow="saturate"))(x)
    values = jax.jit(fmt.decode)(codes)

    np.testing.assert_array_equal(codes, fmt.encode(np.asarray(x), overflow="saturate"))
    assert_same_numbers(values, fmt.decode(np.asarray(codes)))


@by_format
def test_every_code_survives_the_round_trip_inside_jax(fmt):
    codes = jnp.asarray(every_code(fmt))

    values = fmt.decode(codes)
    back = jax.jit(fmt.encode)(values)

    assert_same_numbers(values, fmt.decode(every_code(fmt)))
    valid = ~np.isnan(values)
    np.testing.assert_array_equal(np.asarray(back)[valid], every_code(fmt)[valid])
    assert back.dtype == (jnp.uint8 if fmt.bits <= 8 else jnp.uint16)


def test_jax_arrays_of_the_formats_own_dtype_are_decoded():
    e4m3fn, int8 = formats.format("e4m3fn"), formats.format("int8")

    assert e4m3fn.decode(jnp.array([1.5, -2], jnp.float8_e4m3fn)).tolist() == [1.5, -2]
    assert int8.decode(jnp.array([-3, 127], jnp.int8)).tolist() == [-3, 127]
    assert formats.format("uint4").decode(jnp.array([3, 15], jnp.uint8)).tolist() == [3, 15]


def test_what_is_no_code_is_nan_inside_jax_where_nothing_can_be_raised():
    assert np.isnan(formats.format("int4").decode(jnp.array([8, 16, -1]))).all()
    assert formats.format("float4_e2m1fn").encode(jnp.float32([np.nan, 1])).tolist() == [0, 2]
    with pytest.raises(TypeError, match="codes of int4 are integers, got float32"):
        formats.format("int4").decode(jnp.ones(2))
    with pytest.raises(ValueError, match="encode takes key for JAX arrays only, got list"):
        formats.format("int4").encode([1.0], key=0)
    with pytest.raises(ValueError, match="e11m4 need float64"):
        formats.format("e11m4").decode(jnp.array([1]))


def test_encode_rounds_float64_only_once():
    """1 + 2**-4 + 2**-40 is just above the tie between 1 and 1.125; by way of float32 it would be on the tie."""
    fmt = formats.format("float8_e4m3fn")

    assert fmt.decode(fmt.encode(1 + 2**-4 + 2**-40)) == 1.125


def test_impossible_codes_and_values_are_refused():
    int8, e2m1, float32 = formats.format("int8"), formats.format("float4_e2m1fn"), formats.format("float32")

    with pytest.raises(ValueError, match="int8 has no NaN, but 1 of 3 values are NaN"):
        int8.encode([1.0, math.nan, 2.0])
    with pytest.raises(ValueError, match="code 0x80 is not used by int8"):
        int8.decode([0x80])
    with pytest.raises(ValueError, match=r"codes of float4_e2m1fn lie in \[0, 15\], got values from 3 to 16"):
        e2m1.decode([3, 16])
    with pytest.raises(TypeError, match="codes of float4_e2m1fn are integers, got float64"):
        e2m1.decode([1.0])
    with pytest.raises(ValueError, match="at most 16 bits, float32 has 32; use NumPy's view of dtype float32"):
        float32.encode(1.0)
    with pytest.raises(TypeError, match="real values that float64 holds, got complex128"):
        e2m1.encode([1j])
    with pytest.raises(ValueError, match=r"overflow='inf': float4_e2m1fn has no infinity\. Choose 'saturate'"):
        e2m1.encode([1.0], overflow="inf")


@pytest.mark.parametrize("fmt", ALL, ids=str)
def test_magnitude_of_a_code_agrees_with_the_format_of_all_widths(fmt):
    """Consecutive codes are consecutive values: their distance is the oracle's spacing."""
    for code in {0, 1, (1 << fmt.mantissa_bits) - 1, fmt.max_code // 2, fmt.max_code - 1}:
        here, following = fmt.magnitude(code), fmt.magnitude(code + 1)

        assert following - here == oracle.spacing(here, fmt)
        assert oracle.neighbours((here + following) / 2, fmt) == (here, following)
        assert isinstance(here, Fraction)

"""Codes: every code of every narrow format, against ml_dtypes and the oracle."""

import math
from fractions import Fraction

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from precision_lab import formats
from precision_lab.formats import oracle
from tests.formats.format_cases import ALL, CODED, ML_DTYPES_FLOATS, assert_same_numbers, hard_float32

by_format = pytest.mark.parametrize("fmt", CODED, ids=str)


def every_code(fmt: formats.Format) -> np.ndarray:
    """Returns all codes that stand for something."""
    codes = np.arange(1 << fmt.bits)
    return np.delete(codes, 1 << fmt.mantissa_bits) if fmt.kind == "int" else codes


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


@pytest.mark.parametrize("rounding", formats.ROUNDINGS)
@pytest.mark.parametrize("name", ["float8_e4m3fn", "float8_e5m2", "p3109_k8p4", "float16", "int4", "e3m0:finite"])
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

"""The bits inspector: fields against struct, neighbours against nextafter and the grid, numbers worked by hand."""

import math
import struct
from fractions import Fraction

import numpy as np
import pytest

from precision_lab import formats
from precision_lab.formats.inspect import inspect, parse_number
from tests.formats.format_cases import CODED

STRUCT = {"float16": ">e", "float32": ">f", "float64": ">d"}
VALUES = ["0.1", "-0.1", "1", "65504", "1e-7", "-6e-8", "0", "-0", "3.14159", "inf", "-inf", "1e-30"]


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("name", STRUCT)
def test_fields_are_the_bits_that_struct_packs(name, value):
    found = inspect(value, name)

    packed = struct.pack(STRUCT[name], float(value) if name != "float16" else np.float16(float(value)))
    assert found.sign + found.exponent + found.mantissa == "".join(f"{byte:08b}" for byte in packed)
    assert len(found.exponent) == formats.format(name).exponent_bits


@pytest.mark.parametrize("value", [v for v in VALUES if "inf" not in v])
@pytest.mark.parametrize(("name", "dtype"), [("float16", np.float16), ("float32", np.float32), ("float64", np.float64)])
def test_neighbours_are_those_of_nextafter(name, dtype, value):
    found = inspect(value, name)

    rounded = dtype(float(value))
    with np.errstate(over="ignore"):
        assert (found.below, found.above) == (
            np.nextafter(rounded, dtype(-np.inf)),
            np.nextafter(rounded, dtype(np.inf)),
        )


@pytest.mark.parametrize("fmt", [fmt for fmt in CODED if fmt.bits <= 8], ids=str)
def test_every_value_of_a_narrow_format_is_inspected_as_its_code(fmt):
    grid = fmt.grid().tolist()

    for index, value in enumerate(grid):
        found = inspect(value, fmt)

        assert (found.value, found.error, found.code) == (value, 0, int(fmt.encode(value)))
        assert found.below == (grid[index - 1] if index else (-math.inf if fmt.has_inf else None))
        assert found.above == (grid[index + 1] if index + 1 < len(grid) else (math.inf if fmt.has_inf else None))


def test_one_tenth_in_float16_by_hand():
    """0.1 = 1.6 * 2**-4 and 0.6 * 1024 = 614.4, so the mantissa is 614 and 0.4 ulp are cut off."""
    found = inspect("0.1", "half")

    assert (found.sign, found.exponent, found.mantissa) == ("0", f"{15 - 4:05b}", f"{614:010b}")
    assert (found.category, found.scale_exponent, found.ulp) == ("normal", -4, 2**-14)
    assert found.error == Fraction(1638, 16384) - Fraction(1, 10)
    assert found.error_in_ulp == pytest.approx(-0.4)
    assert found.relative_error == pytest.approx(0.4 / 1638.4)


def test_text_is_taken_exactly_without_a_detour_through_float64():
    """17/16 + 10**-30 is just above a tie of E4M3; float64 cannot tell it from the tie."""
    above_tie = "1.062500000000000000000000000001"

    assert inspect(above_tie, "e4m3fn").value == 1.125
    assert inspect(float(above_tie), "e4m3fn").value == 1.0
    assert inspect("1/3", "tf32").given == Fraction(1, 3)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0x1.8p-3", Fraction(3, 16)),
        ("-0x.8", Fraction(-1, 2)),
        ("1_000", 1000),
        (" 2e3 ", 2000),
        ("-3/4", Fraction(-3, 4)),
        (7, 7),
        (np.float32(0.5), Fraction(1, 2)),
        ("Infinity", math.inf),
        ("-inf", -math.inf),
    ],
)
def test_numbers_are_read_in_many_spellings(text, expected):
    assert parse_number(text) == expected


@pytest.mark.parametrize("text", ["-0", "-0.0", "-0x0p1", "-0e5", -0.0])
def test_negative_zero_is_kept(text):
    assert math.copysign(1, parse_number(text)) == -1
    assert inspect(text, "bf16").code == 0x8000
    assert inspect(text, "int8").code == 0


@pytest.mark.parametrize(
    ("value", "name", "category", "code"),
    [
        ("nan", "float8_e4m3fn", "nan", 0x7F),
        ("nan", "float8_e4m3fnuz", "nan", 0x80),
        ("nan", "float16", "nan", 0x7E00),
        ("inf", "float8_e4m3fn", "nan", 0x7F),
        ("inf", "p3109_k8p4", "inf", 0x7F),
        ("-1e9", "float8_e5m2", "inf", 0xFC),
        ("1e-3", "float8_e4m3fn", "subnormal", 1),
        ("-3", "int4", "normal", 0xD),
        ("1e4000", "int8", "normal", 127),
    ],
)
def test_specials_and_edges(value, name, category, code):
    found = inspect(value, name)

    assert (found.category, found.code) == (category, code)


@pytest.mark.parametrize(
    ("value", "name", "message"),
    [
        ("abc", "bf16", "expected a number such as 0.1, .* got 'abc'"),
        ("1/0", "bf16", "expected a number"),
        ("0x", "bf16", "expected a number"),
        ("", "bf16", "expected a number"),
        ("1e999999999", "bf16", "exponent of '1e999999999' is beyond every format"),
        ("0x1p999999999", "bf16", "is beyond every format"),
        ("nan", "int8", "int8 has no code for nan"),
        ("1", "bf17", "unknown format 'bf17'"),
    ],
)
def test_bad_values_are_refused(value, name, message):
    with pytest.raises(ValueError, match=message):
        inspect(value, name)

"""The oracle itself: against a search of the enumerated grid, NumPy's casts, and fractions no float can hold."""

from bisect import bisect_left
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from precision_lab.formats import oracle
from tests.formats.format_cases import CODED, DETERMINISTIC, assert_same_numbers

SEARCHED = [fmt for fmt in CODED if fmt.bits <= 8]


def searched(value: Fraction, values: list[Fraction], rounding: str) -> Fraction:
    """Returns the neighbour of a value in range by looking at all non-negative `values`; indices are codes."""
    magnitude = abs(value)
    upper = bisect_left(values, magnitude)
    if values[upper] == magnitude:
        return value
    lower = upper - 1
    near, far = magnitude - values[lower], values[upper] - magnitude
    picked = {
        "nearest_even": near > far or (near == far and upper % 2 == 0),
        "nearest_away": near >= far,
        "toward_zero": False,
        "up": value > 0,
        "down": value < 0,
        "to_odd": upper % 2 == 1,
    }[rounding]
    result = values[upper if picked else lower]
    return -result if value < 0 else result


@pytest.mark.parametrize("rounding", DETERMINISTIC)
@pytest.mark.parametrize("fmt", SEARCHED, ids=str)
def test_oracle_agrees_with_a_search_of_the_grid(fmt, rounding):
    points = [fmt.magnitude(code) for code in range(fmt.max_code + 1)]
    between = [
        low + (high - low) * part
        for low, high in pairwise(points)
        for part in (Fraction(1, 10**30), Fraction(1, 3), Fraction(1, 2), Fraction(1, 2) + Fraction(1, 10**30))
    ]

    for value in [*points, *between]:
        for signed in (value, -value) if fmt.signed else (value,):
            assert oracle.round_number(signed, fmt, rounding=rounding) == searched(signed, points, rounding)


@settings(deadline=None, max_examples=300)
@given(st.floats(width=64))
def test_oracle_agrees_with_numpy_on_float32_and_float16(value):
    with np.errstate(all="ignore"):
        expected = [np.float64(value).astype(np.float32), np.float64(value).astype(np.float16)]

    assert_same_numbers([oracle.round_to(value, "float32"), oracle.round_to(value, "float16")], expected)
    assert_same_numbers(oracle.round_to(value, "float64"), value)


@settings(deadline=None, max_examples=200)
@given(st.fractions())
def test_oracle_rounds_fractions_to_float64_as_python_does(value):
    assert oracle.round_to(np.array([value], object), "float64")[0] == float(value)


def test_oracle_keeps_shapes_and_takes_fractions_that_are_no_floats():
    just_above_a_tie = Fraction(17, 16) + Fraction(1, 10**100)

    assert oracle.round_to(np.zeros((2, 0)), "bf16").shape == (2, 0)
    fractions = np.array([[just_above_a_tie, Fraction(17, 16)]], object)
    assert oracle.round_to(fractions, "e4m3fn").tolist() == [[1.125, 1.0]]


def test_oracle_refuses_what_round_to_refuses():
    with pytest.raises(ValueError, match="rounding must be one of"):
        oracle.round_to(1.0, "bf16", rounding="nearest")
    with pytest.raises(ValueError, match="subnormals must be one of keep"):
        oracle.round_to(1.0, "bf16", subnormals="drop")
    with pytest.raises(ValueError, match="has no infinity"):
        oracle.round_to(1.0, "e4m3fn", overflow="inf")

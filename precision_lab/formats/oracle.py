"""The oracle: rounding in exact fractions, one number at a time.

It shares no arithmetic with the kernel and knows no bit tricks: a value is a fraction, its two neighbours are whole
multiples of the spacing there, and the rounding rule picks one. Slow, and what everything else is tested against.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np

from precision_lab.formats.catalogue import format
from precision_lab.formats.options import check_rounding, check_subnormals, overflow_action
from precision_lab.formats.scalar import Format, power_of_two


def round_to(
    x: Any, fmt: Any, *, rounding: str = "nearest_even", overflow: str | None = None, subnormals: str = "keep"
) -> np.ndarray:
    """Returns `x` with every element on the grid of `fmt`, as float64; the reference for `formats.round_to`.

    Args:
      x: floats in anything NumPy takes for an array; or an array of Fractions, which need not fit any float.
      fmt: a format or its name.
      rounding: as for `formats.round_to`.
      overflow: as for `formats.round_to`.
      subnormals: as for `formats.round_to`.

    Returns:
      float64 array of the shape of `x`. It holds every value of every format; where the format reaches beyond the
      dtype of `x`, `formats.round_to` stops at the largest value both have and this function does not.
    """
    check_subnormals(subnormals)
    fmt = format(fmt)
    array = np.asarray(x)
    if array.dtype != object:
        with np.errstate(invalid="ignore"):  # signalling NaNs
            array = array.astype(np.float64)
    flat = [round_number(value, fmt, rounding=rounding, overflow=overflow) for value in array.ravel().tolist()]
    return np.array(flat, np.float64).reshape(array.shape)


def round_number(
    value: float | Fraction, fmt: Format, *, rounding: str = "nearest_even", overflow: str | None = None
) -> float:
    """Returns the number of `fmt` that `value` rounds to; options as for `round_to`."""
    check_rounding(rounding)
    action = overflow_action(fmt, overflow)
    negative = math.copysign(1.0, value) < 0 if isinstance(value, float) else value < 0
    sign = -1.0 if negative else 1.0
    if isinstance(value, float) and not math.isfinite(value):
        return _round_special(value, fmt, action)
    magnitude = _round_magnitude(abs(Fraction(value)), negative, fmt, rounding)
    if magnitude == 0:
        return sign * 0.0 if fmt.has_negative_zero else 0.0
    if magnitude > fmt.magnitude(fmt.max_code):
        inwards = rounding in ("toward_zero", "to_odd") or rounding == ("up" if negative else "down")
        return sign * (fmt.max if inwards else {"saturate": fmt.max, "inf": math.inf, "nan": math.nan}[action])
    return sign * float(magnitude)


def neighbours(magnitude: Fraction, fmt: Format) -> tuple[Fraction, Fraction]:
    """Returns the largest value not above and the smallest above `magnitude` >= 0, as if there were no largest."""
    below, step, _ = _locate(magnitude, fmt)
    return below, below + step


def spacing(magnitude: Fraction, fmt: Format) -> Fraction:
    """Returns the distance between neighbouring values at `magnitude` >= 0 (the ulp there)."""
    return _locate(magnitude, fmt)[1]


def _round_special(value: float, fmt: Format, action: str) -> float:
    """Returns what NaN or an infinity becomes; NaN stays, so that it can be seen."""
    if math.isnan(value):
        return math.nan
    if action == "saturate":
        return math.copysign(fmt.max, value)
    return {"inf": value, "nan": math.nan, "saturate": math.copysign(fmt.max, value)}[fmt.native_overflow]


def _locate(magnitude: Fraction, fmt: Format) -> tuple[Fraction, Fraction, bool]:
    """Returns (value below, spacing above it, whether the code of the value below is odd)."""
    exponent = max(floor_exponent(magnitude), fmt.min_exponent) if magnitude else fmt.min_exponent
    step = power_of_two(exponent - fmt.mantissa_bits)
    count = magnitude // step
    if fmt.mantissa_bits == 0:  # the code is the exponent field, and 0 is zero
        return count * step, step, count > 0 and (exponent + fmt.bias) % 2 == 1
    return count * step, step, count % 2 == 1


def _round_magnitude(magnitude: Fraction, negative: bool, fmt: Format, rounding: str) -> Fraction:
    """Returns the neighbour of `magnitude` that `rounding` picks, as if there were no largest value."""
    below, step, odd = _locate(magnitude, fmt)
    rest = (magnitude - below) / step
    half = Fraction(1, 2)
    take_upper = {
        "nearest_even": rest > half or (rest == half and odd),
        "nearest_away": rest >= half,
        "toward_zero": False,
        "up": rest > 0 and not negative,
        "down": rest > 0 and negative,
        "to_odd": rest > 0 and not odd,
    }[rounding]
    return below + step if take_upper else below


def floor_exponent(value: Fraction) -> int:
    """Returns the integer e with 2**e <= value < 2**(e + 1), for value > 0."""
    guess = value.numerator.bit_length() - value.denominator.bit_length()
    return guess if power_of_two(guess) <= value else guess - 1

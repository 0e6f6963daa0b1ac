"""The oracle: rounding in exact fractions, one number at a time.

It shares no arithmetic with the kernel and knows no bit tricks: a value is a fraction, its two neighbours are whole
multiples of the spacing there, and the rounding rule picks one. Slow, and what everything else is tested against.
"""

from __future__ import annotations

import functools
import math
from fractions import Fraction
from typing import Any

import numpy as np

from precision_lab.formats.catalogue import format
from precision_lab.formats.options import check_rounding, check_subnormals, overflow_action
from precision_lab.formats.scalar import Format, power_of_two

_HALF = Fraction(1, 2)


def round_to(
    x: Any,
    fmt: Any,
    *,
    rounding: Any = "nearest_even",
    overflow: str | None = None,
    subnormals: str = "keep",
    bits: Any = None,
    n_bits: int | None = None,
    centred: bool = False,
) -> np.ndarray:
    """Returns `x` with every element on the grid of `fmt`, as float64; the reference for `formats.round_to`.

    Args:
      x: floats in anything NumPy takes for an array; or an array of Fractions, which need not fit any float.
      fmt: a format or its name.
      rounding: a name, as for `formats.round_to`.
      overflow: as for `formats.round_to`.
      subnormals: as for `formats.round_to`.
      bits: random bits for "stochastic", unsigned integers of the shape of `x`.
      n_bits: as for `formats.round_to`.
      centred: as for `formats.round_to`.

    Returns:
      float64 array of the shape of `x`. It holds every value of every format; where the format reaches beyond the
      dtype of `x`, `formats.round_to` stops at the largest value both have and this function does not.
    """
    fmt = format(fmt)
    array = np.asarray(x)
    if array.dtype != object:
        with np.errstate(invalid="ignore"):  # signalling NaNs
            array = array.astype(np.float64)
    flat, options = array.ravel().tolist(), {"rounding": rounding, "overflow": overflow, "subnormals": subnormals}
    chances = [None] * len(flat) if bits is None else _chances(np.asarray(bits), n_bits, centred)
    rounded = [round_number(value, fmt, chance=chance, **options) for value, chance in zip(flat, chances, strict=True)]
    return np.array(rounded, np.float64).reshape(array.shape)


def _chances(bits: np.ndarray, n_bits: int | None, centred: bool) -> list[Fraction]:
    """Returns random bits as fractions in [0, 1), in the middle of their interval if centred."""
    n = bits.dtype.itemsize * 8 if n_bits is None else n_bits
    half = Fraction(int(centred), 2)
    return [(number % (1 << n) + half) / (1 << n) for number in bits.ravel().tolist()]


def round_number(
    value: float | Fraction,
    fmt: Format,
    *,
    rounding: str = "nearest_even",
    overflow: str | None = None,
    subnormals: str = "keep",
    chance: Fraction | None = None,
) -> float:
    """Returns the number of `fmt` that `value` rounds to; options as for `round_to`.

    `chance`, from 0 to 1, decides stochastic rounding: away from zero if it and the discarded part, in units of the
    spacing, are together at least 1.
    """
    check_rounding(rounding, random=chance is not None)
    check_subnormals(subnormals, fmt)
    action = overflow_action(fmt, overflow)
    negative = math.copysign(1.0, value) < 0 if isinstance(value, float) else value < 0
    if isinstance(value, float) and math.isnan(value):
        return math.nan
    if (value < 0 and not fmt.signed) or (value == 0 and not fmt.has_zero):
        return fmt.min if action == "saturate" or fmt.has_zero else math.nan
    if isinstance(value, float) and math.isinf(value):
        return _round_infinity(value, fmt, action)
    magnitude = _round_magnitude(abs(Fraction(value)), negative, fmt, rounding, subnormals, chance)
    largest = _largest(fmt, negative)
    if magnitude > largest:
        inwards = rounding in ("toward_zero", "to_odd") or rounding == ("up" if negative else "down")
        beyond = {"inf": math.inf, "nan": math.nan}.get("" if inwards else action, float(largest))
        return -beyond if negative else beyond
    if magnitude == 0 and not fmt.has_negative_zero:
        return 0.0
    return -float(magnitude) if negative else float(magnitude)


@functools.cache
def _largest(fmt: Format, negative: bool) -> Fraction:
    """Returns the largest magnitude on one side of zero."""
    return -fmt.lowest if negative else fmt.magnitude(fmt.max_code)


def neighbours(magnitude: Fraction, fmt: Format) -> tuple[Fraction, Fraction]:
    """Returns the largest value not above and the smallest above `magnitude` >= 0, as if there were no largest."""
    below, step, _ = _locate(magnitude, fmt)
    return below, below + step


def spacing(magnitude: Fraction, fmt: Format) -> Fraction:
    """Returns the distance between neighbouring values at `magnitude` >= 0 (the ulp there)."""
    return _locate(magnitude, fmt)[1]


def _round_infinity(value: float, fmt: Format, action: str) -> float:
    """Returns what an infinity becomes."""
    becomes = "saturate" if action == "saturate" else fmt.native_overflow
    return {"inf": value, "nan": math.nan}.get(becomes, fmt.min if value < 0 else fmt.max)


def _locate(magnitude: Fraction, fmt: Format) -> tuple[Fraction, Fraction, bool]:
    """Returns (value below, spacing above it, whether the code of the value below is odd)."""
    exponent = max(floor_exponent(magnitude), fmt.min_exponent) if magnitude else fmt.min_exponent
    step = power_of_two(exponent - fmt.mantissa_bits)
    count = magnitude // step
    if fmt.mantissa_bits == 0 and fmt.kind == "float":  # the code is the exponent field
        return count * step, step, count > 0 and (exponent + fmt.bias) % 2 == 1
    return count * step, step, count % 2 == 1


def _round_magnitude(
    magnitude: Fraction, negative: bool, fmt: Format, rounding: str, subnormals: str, chance: Fraction | None
) -> Fraction:
    """Returns the neighbour of `magnitude` that `rounding` picks, as if there were no largest value."""
    normal = power_of_two(fmt.min_exponent)
    below, step, odd = _locate(magnitude, fmt)
    if magnitude < normal:
        if not fmt.has_zero:
            return normal
        if subnormals == "denormals_are_zero":
            return Fraction(0)
        if subnormals == "round":  # zero is then the value before it, as code 0 before code 1
            below, step, odd = Fraction(0), normal, False
    upper = _takes_upper((magnitude - below) / step, negative, odd, rounding, chance)
    rounded = below + step if upper else below
    return Fraction(0) if subnormals == "flush" and rounded < normal else rounded


def _takes_upper(rest: Fraction, negative: bool, odd: bool, rounding: str, chance: Fraction | None) -> bool:
    """Returns whether the upper neighbour is taken, `rest` being the distance to the lower one in spacings."""
    match rounding:
        case "nearest_even":
            return rest > _HALF or (rest == _HALF and odd)
        case "nearest_away":
            return rest >= _HALF
        case "toward_zero":
            return False
        case "up":
            return rest > 0 and not negative
        case "down":
            return rest > 0 and negative
        case "to_odd":
            return rest > 0 and not odd
        case "stochastic":
            return rest + (chance or 0) >= 1
    raise AssertionError(rounding)  # checked before


def floor_exponent(value: Fraction) -> int:
    """Returns the integer e with 2**e <= value < 2**(e + 1), for value > 0."""
    guess = value.numerator.bit_length() - value.denominator.bit_length()
    return guess if power_of_two(guess) <= value else guess - 1

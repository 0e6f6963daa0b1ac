"""One value in one format: its fields, its exact value, its neighbours, and what rounding did to it."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from precision_lab.formats import oracle
from precision_lab.formats.catalogue import format
from precision_lab.formats.scalar import Format, power_of_two

_SPECIAL = re.compile(r"([+-]?)(inf|infinity|nan)")
_HEX = re.compile(r"([+-]?)0x([0-9a-f]*)(?:\.([0-9a-f]*))?(?:p([+-]?\d+))?")


@dataclass(frozen=True)
class Inspection:
    """What a format makes of a value. Fractions are exact; fields are strings of "0" and "1", highest bit first.

    Attributes:
      format: the format.
      given: the value as given, a Fraction, or a float if it is infinite, NaN or -0.
      value: the value it rounds to.
      category: "zero", "subnormal", "normal", "inf" or "nan".
      code: the integer whose bits are stored.
      sign: the sign bit; empty where there is none.
      exponent: the exponent field; empty for integers.
      mantissa: the mantissa field; for integers all bits but the sign, in two's complement.
      scale_exponent: the power of two that the mantissa is scaled by; None for specials and zero.
      error: value - given, exactly; None unless both are finite.
      ulp: distance between neighbouring values here; None unless the value is finite.
      below: the next smaller value; -inf or None where there is none.
      above: the next larger value; inf or None where there is none.
    """

    format: Format
    given: Fraction | float
    value: float
    category: str
    code: int
    sign: str
    exponent: str
    mantissa: str
    scale_exponent: int | None
    error: Fraction | None
    ulp: float | None
    below: float | None
    above: float | None

    @property
    def relative_error(self) -> float | None:
        """Returns |error / given|; None where that is undefined."""
        if self.error is None or self.given == 0:
            return None
        return _as_float(abs(self.error / Fraction(self.given)))

    @property
    def error_in_ulp(self) -> float | None:
        """Returns the error in units of the spacing at the value, at most one half for a value in range."""
        return None if self.error is None or self.ulp is None else _as_float(self.error / Fraction(self.ulp))


def _as_float(value: Fraction) -> float:
    """Returns the nearest float, which is infinite for what is beyond float64."""
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def inspect(
    value: Any,
    fmt: Any,
    *,
    rounding: str = "nearest_even",
    overflow: str | None = None,
    subnormals: str = "keep",
) -> Inspection:
    """Returns how `value` is stored in `fmt`.

    Args:
      value: a number, or text: "0.1" and "1/3" are taken exactly, without a detour through float64; also
        "0x1.8p-3", "inf", "nan", "-0".
      fmt: a format or its name.
      rounding: as for `round_to`.
      overflow: as for `round_to`.
      subnormals: as for `round_to`.

    Raises:
      ValueError: `value` is no number, or NaN in a format that has none; or `fmt` is a codebook or block format.
    """
    fmt = format(fmt)
    if not isinstance(fmt, Format):
        element = getattr(fmt, "element", None)
        what = "a codebook, whose codes have no fields" if element is None else "a block format"
        way = f"formats {fmt.name} lists its levels" if element is None else f"inspect its elements' format, {element}"
        raise ValueError(f"{fmt} is {what}: {way}.")
    given = parse_number(value)
    rounded = oracle.round_number(given, fmt, rounding=rounding, overflow=overflow, subnormals=subnormals)
    code = encode_number(rounded, fmt)
    finite = math.isfinite(rounded)
    given_is_finite = isinstance(given, Fraction) or given == 0
    error = Fraction(rounded) - Fraction(given) if finite and given_is_finite else None
    below, above = _neighbours(rounded, fmt)
    text = f"{code:0{fmt.bits}b}"
    return Inspection(
        format=fmt,
        given=given,
        value=rounded,
        category=_category(rounded, fmt),
        code=code,
        sign=text[: int(fmt.signed)],
        exponent=text[int(fmt.signed) :][: fmt.exponent_bits],
        mantissa=text[int(fmt.signed) + fmt.exponent_bits :],
        scale_exponent=_scale_exponent(rounded, fmt),
        error=error,
        ulp=float(oracle.spacing(abs(Fraction(rounded)), fmt)) if finite else None,
        below=below,
        above=above,
    )


def parse_number(value: Any) -> Fraction | float:
    """Returns `value` exactly: a Fraction, or a float for infinities, NaN and negative zero."""
    if isinstance(value, str):
        return _parse_text(value)
    if isinstance(value, (int, Fraction)):
        return Fraction(value)
    number = float(value)
    return Fraction(number) if math.isfinite(number) and (number or math.copysign(1, number) > 0) else number


def _parse_text(text: str) -> Fraction | float:
    """Returns the number that `text` spells, exactly."""
    spelled = text.strip().lower().replace("_", "")
    if match := _SPECIAL.fullmatch(spelled):
        return float(match[1] + match[2])
    if (match := _HEX.fullmatch(spelled)) and (match[2] or match[3]):
        digits = match[2] + (match[3] or "")
        number = int(digits, 16) * power_of_two(_small(text, match[4] or "0") - 4 * len(match[3] or ""))
        number = -number if match[1] == "-" else number
    else:
        number = _parse_decimal(text, spelled)
    return -0.0 if number == 0 and spelled.startswith("-") else number


def _parse_decimal(text: str, spelled: str) -> Fraction:
    """Returns a decimal number or a quotient of integers."""
    _small(text, (re.search(r"e([+-]?\d+)$", spelled) or ["", "0"])[1])
    try:
        return Fraction(spelled)
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"expected a number such as 0.1, -3e-5, 1/3, 0x1.8p-3, inf or nan, got {text!r}.") from None


def _small(text: str, exponent: str) -> int:
    """Returns an exponent as an integer; refuses those that would make numbers of millions of digits."""
    if abs(int(exponent)) > 5000:
        raise ValueError(f"the exponent of {text!r} is beyond every format; give one between -5000 and 5000.")
    return int(exponent)


def encode_number(value: float, fmt: Format) -> int:
    """Returns the code of `value`, which is one of `fmt`'s, for formats of any width."""
    sign = int(math.copysign(1.0, value) < 0) << (fmt.bits - 1)
    if not math.isfinite(value):
        special = fmt.nan_code if math.isnan(value) else fmt.inf_code
        if special is None:
            raise ValueError(f"{fmt.name} has no code for {value}.")
        return special if math.isnan(value) else sign | special
    steps = abs(Fraction(value)) / fmt.step
    if fmt.kind == "int":
        return (-int(steps) if sign else int(steps)) % (1 << fmt.bits)
    if value == 0:
        return sign
    if not fmt.has_zero:
        return oracle.floor_exponent(Fraction(value)) - fmt.min_exponent
    # Each binade above the first doubles the spacing, and adds one to the exponent field.
    binades = max(oracle.floor_exponent(abs(Fraction(value))) - fmt.min_exponent, 0)
    return sign | int(steps / power_of_two(binades)) + (binades << fmt.mantissa_bits)


def _category(value: float, fmt: Format) -> str:
    """Returns what kind of number `value` is in `fmt`."""
    if not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf"
    if value == 0:
        return "zero"
    return "normal" if abs(value) >= fmt.min_normal else "subnormal"


def _scale_exponent(value: float, fmt: Format) -> int | None:
    """Returns the exponent e of value = +-(1.mantissa or 0.mantissa) * 2**e; None for zero and specials."""
    if not math.isfinite(value) or value == 0 or fmt.kind == "int":
        return None
    return max(oracle.floor_exponent(abs(Fraction(value))), fmt.min_exponent)


def _neighbours(value: float, fmt: Format) -> tuple[float | None, float | None]:
    """Returns the values just below and just above `value` in `fmt`; infinities and None where there is none."""
    if math.isnan(value):
        return None, None
    if value < 0 or math.copysign(1.0, value) < 0:
        below, above = _beside(-value, -fmt.lowest, fmt)
        return None if above is None else -above, None if below is None else -below
    return _beside(value, fmt.magnitude(fmt.max_code), fmt)


def _beside(magnitude: float, largest: Fraction, fmt: Format) -> tuple[float | None, float | None]:
    """Returns the values just below and just above `magnitude`, of this sign but for the one below zero."""
    if math.isinf(magnitude):
        return float(largest), None
    if magnitude == largest:
        above = math.inf if fmt.has_inf else None
    else:
        above = float(Fraction(magnitude) + oracle.spacing(Fraction(magnitude), fmt))
    return _below(Fraction(magnitude), fmt), above


def _below(value: Fraction, fmt: Format) -> float | None:
    """Returns the value just below `value` >= 0; at a power of two the spacing there is the finer one."""
    if not fmt.signed and value == fmt.lowest:
        return None
    if value == 0:
        return -float(fmt.step)
    if not fmt.has_zero:
        return float(value / 2)
    return float(oracle.neighbours(value - fmt.step / 2, fmt)[0])

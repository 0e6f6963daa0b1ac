"""Format: a number format as a few integers, from which every other fact follows.

A finite value is `(2**mantissa_bits + m) * 2**(exponent - mantissa_bits)`, or `m * min_subnormal` when the exponent
field is zero. Integers are the same thing without an exponent field: all their values are "subnormal", equally
spaced. So one description, one kernel and one oracle serve both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from precision_lab.formats.params import FormatParams

Kind = Literal["float", "int", "codebook"]
Specials = Literal["ieee", "fn", "fnuz", "p3109", "finite", "fnu", "narrow", "full", "unsigned"]
Overflow = Literal["saturate", "saturate_finite", "inf", "nan"]

# What the codes at the edge of a format mean; the last three belong to the integers.
SPECIALS: dict[str, str] = {
    "ieee": "the largest exponent field holds infinities and NaNs",
    "fn": "no infinity; the all-ones code of each sign is NaN",
    "fnuz": "no infinity, no negative zero; the code of negative zero is the only NaN",
    "p3109": "no negative zero, its code is the only NaN; the largest code of each sign is infinity",
    "finite": "every code is a number",
    "fnu": "no sign, no zero, no infinity; the all-ones code is NaN",
    "narrow": "two's complement without the most negative code, so the range is symmetric",
    "full": "two's complement with the most negative code, so the range reaches one step further below zero",
    "unsigned": "no sign; every code is a number",
}
INTEGERS = ("narrow", "full", "unsigned")


def power_of_two(exponent: int) -> Fraction:
    """Returns 2**exponent exactly, for any sign of the exponent."""
    return Fraction(1 << exponent) if exponent >= 0 else Fraction(1, 1 << -exponent)


@dataclass(frozen=True, slots=True, repr=False)
class Format:
    """A number format: hashable, compared by value, safe as a static argument of `jax.jit`.

    Attributes:
      name: as in ml_dtypes; `formats.format(name)` gives this format back.
      kind: "float" or "int".
      exponent_bits: width of the exponent field; 0 for integers.
      mantissa_bits: stored bits, without the implicit leading one; for integers all bits but the sign.
      bias: exponent field minus exponent; 1 - mantissa_bits makes the step of an integer format 1, and every one
        more is a binary digit after the point.
      specials: which codes are infinities, NaNs or unused, see `SPECIALS`.
      dtype: the NumPy dtype that stores it, None where there is none.
      source: where the format is defined.
      padded_bits: bits one value takes in memory where that is more than `bits` (tf32 lives in 32).
    """

    name: str
    kind: Kind
    exponent_bits: int
    mantissa_bits: int
    bias: int
    specials: Specials
    dtype: np.dtype | None = None
    source: str = field(default="", compare=False)
    padded_bits: int | None = None

    def __post_init__(self) -> None:
        """Refuses what is no format, and what float64 could not hold exactly."""
        problem = _problem(self)
        if problem:
            raise ValueError(f"format {self.name!r} is not possible: {problem}.")

    def __repr__(self) -> str:
        return f"format({self.name!r})"

    def __str__(self) -> str:
        return self.name

    @property
    def bits(self) -> int:
        """Returns the bits that carry information: sign, exponent and mantissa."""
        return int(self.signed) + self.exponent_bits + self.mantissa_bits

    @property
    def signed(self) -> bool:
        """Returns whether there is a sign bit."""
        return self.specials not in ("unsigned", "fnu")

    @property
    def has_zero(self) -> bool:
        """Returns whether zero is a value."""
        return self.specials != "fnu"

    @property
    def storage_bits(self) -> int:
        """Returns the bits one value takes in memory when packed without gaps."""
        return self.padded_bits or self.bits

    @property
    def min_exponent(self) -> int:
        """Returns the exponent of the smallest normal number (for integers, see `step`)."""
        return int(self.has_zero) - self.bias

    @property
    def step(self) -> Fraction:
        """Returns the spacing of the values around zero, exactly; the smallest value where there is no zero."""
        return power_of_two(self.min_exponent - self.mantissa_bits)

    @property
    def max_code(self) -> int:
        """Returns the code of the largest finite value."""
        top = 1 << (self.exponent_bits + self.mantissa_bits)
        if self.specials == "ieee":
            return top - (1 << self.mantissa_bits) - 1
        return top - 2 if self.specials in ("fn", "p3109", "fnu") else top - 1

    @property
    def inf_code(self) -> int | None:
        """Returns the code of +infinity, the one after the largest finite value; None where there is none."""
        return self.max_code + 1 if self.has_inf else None

    @property
    def nan_code(self) -> int | None:
        """Returns the code of the (quiet, positive) NaN; None where there is none."""
        if not self.has_nan:
            return None
        if self.specials in ("fnuz", "p3109"):
            return 1 << (self.bits - 1)
        quiet_bit = (1 << self.mantissa_bits) >> 1 if self.specials == "ieee" else 0
        return self.max_code + 1 + quiet_bit

    def magnitude(self, code: int) -> Fraction:
        """Returns the exact value of the non-negative finite `code` (sign bit clear)."""
        exponent_field, mantissa = divmod(code, 1 << self.mantissa_bits)
        if not self.has_zero:
            exponent_field += 1
        if exponent_field == 0:
            return mantissa * self.step
        return ((1 << self.mantissa_bits) + mantissa) * power_of_two(exponent_field - 1) * self.step

    @property
    def max(self) -> float:
        """Returns the largest finite value."""
        return float(self.magnitude(self.max_code))

    @property
    def min(self) -> float:
        """Returns the smallest (most negative) finite value."""
        return float(self.lowest)

    @property
    def lowest(self) -> Fraction:
        """Returns `min` exactly."""
        if not self.signed:
            return self.magnitude(0)
        return -self.magnitude(self.max_code) - (self.step if self.specials == "full" else 0)

    @property
    def min_normal(self) -> float:
        """Returns the smallest positive value with full precision; for integers, the step."""
        return float(self.step if self.kind == "int" else power_of_two(self.min_exponent))

    @property
    def min_subnormal(self) -> float:
        """Returns the smallest positive value; equal to `min_normal` where there are no subnormals."""
        return float(self.step)

    @property
    def eps(self) -> float:
        """Returns the spacing just above 1 (for integers, the step)."""
        return float(self.step if self.kind == "int" else power_of_two(-self.mantissa_bits))

    @property
    def digits(self) -> float:
        """Returns the precision in decimal digits."""
        return (self.bits if self.kind == "int" else self.mantissa_bits + 1) * math.log10(2)

    @property
    def has_inf(self) -> bool:
        """Returns whether some code is an infinity."""
        return self.specials in ("ieee", "p3109")

    @property
    def has_nan(self) -> bool:
        """Returns whether some code is NaN (an IEEE-like format without mantissa bits has no room for one)."""
        return self.specials in ("fn", "fnuz", "p3109", "fnu") or (self.specials == "ieee" and self.mantissa_bits > 0)

    @property
    def has_negative_zero(self) -> bool:
        """Returns whether +0 and -0 are two codes."""
        return self.specials in ("ieee", "fn", "finite")

    @property
    def native_overflow(self) -> Overflow:
        """Returns what the format's specification makes of a value beyond `max`: "inf", "nan" or "saturate"."""
        if self.has_inf:
            return "inf"
        return "nan" if self.has_nan else "saturate"

    def params(
        self, *, overflow: str | None = None, subnormals: str = "keep", container: Any = "float32"
    ) -> FormatParams:
        """Returns the numbers `round_to` needs, as a pytree that can be traced, stacked and vmapped.

        Args:
          overflow: as for `round_to`; it is fixed here because a traced format cannot be asked what it has.
          subnormals: as for `round_to`.
          container: dtype of the arrays to be rounded; "float32" also serves float16 and bfloat16.

        Raises:
          ValueError: an option the format cannot honour, or a format the container cannot represent.
        """
        from precision_lab.formats.params import traceable_params

        return traceable_params(self, overflow=overflow, subnormals=subnormals, container=container)

    def grid(self) -> np.ndarray:
        """Returns every finite value in ascending order as float64, zero once; for formats up to 16 bits."""
        from precision_lab.formats.codes import grid

        return grid(self)

    def encode(self, x: Any, *, rounding: str = "nearest_even", overflow: str | None = None, **options: Any) -> Any:
        """Returns the codes of `x` after rounding; see `precision_lab.formats.codes.encode`."""
        from precision_lab.formats.codes import encode

        return encode(x, self, rounding=rounding, overflow=overflow, **options)

    def decode(self, codes: Any) -> Any:
        """Returns the values of `codes`; see `precision_lab.formats.codes.decode`."""
        from precision_lab.formats.codes import decode

        return decode(codes, self)


def _problem(fmt: Format) -> str | None:
    """Returns what makes the fields of `fmt` contradictory, or None."""
    if fmt.kind == "int":
        if fmt.exponent_bits or fmt.specials not in INTEGERS:
            return f"integers have no exponent bits, and their specials are {', '.join(map(repr, INTEGERS))}"
        if not 1 <= fmt.mantissa_bits <= 52:
            return f"mantissa_bits must be 1 to 52, got {fmt.mantissa_bits}"
        fraction_bits = fmt.bias + fmt.mantissa_bits - 1
        return None if -900 <= fraction_bits <= 900 else f"bias {fmt.bias} puts values outside the range of float64"
    if fmt.specials not in SPECIALS or fmt.specials in INTEGERS:
        floats = ", ".join(name for name in SPECIALS if name not in INTEGERS)
        return f"specials of a float must be one of {floats}, got {fmt.specials!r}"
    if fmt.specials == "fnu" and fmt.mantissa_bits:
        return "a format without zero has no mantissa bits here"
    smallest = 2 if fmt.specials == "ieee" else 1
    if not smallest <= fmt.exponent_bits <= 11 or not 0 <= fmt.mantissa_bits <= 52:
        return f"a float has {smallest} to 11 exponent bits and 0 to 52 mantissa bits"
    top_exponent = (fmt.max_code >> fmt.mantissa_bits) - fmt.bias
    if top_exponent > 1023 or fmt.min_exponent - fmt.mantissa_bits < -1074:
        return f"bias {fmt.bias} puts values outside the range of float64"
    return None

"""`Accumulator`: the number format in which a product sums up, and how often it is rounded to it.

float16                   one product after the other is added, and every sum rounded to float16
float16@step4             four products are summed in float32 before they are added
e8m13@step32@promote128   a 14-bit accumulator that is added to a float32 total after every 128 products
e8m13@step32@toward_zero  a 14-bit accumulator that drops what does not fit, as Hopper's tensor cores do
bfloat16@stochastic       every sum is rounded to one of its two neighbours at random, right on average
float32                   the native accumulator: the order is the device's
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import numpy as np

from precision_lab import formats
from precision_lab.formats import Format
from precision_lab.formats.params import make_params

NATIVE = frozenset(("float32", "float64"))
_FLOAT32 = formats.format("float32")
_OPTION = re.compile(r"(step|promote)(\d+)")
ROUNDINGS = ("nearest_even", "toward_zero", "stochastic")


@dataclasses.dataclass(frozen=True, repr=False)
class Accumulator:
    """How a product sums up: hashable, equal when it means the same, printed as the string it parses from.

    The contracted axis is cut into runs of `step` elements, the last one perhaps shorter. The products of a run are
    summed in float32, as the adder tree of a matrix unit does; that sum is added to the accumulator in float32; and
    what results is rounded to `format`, to nearest even unless `rounding` is another, overflowing as the format's
    specification says (float16 to infinity, float8_e4m3fn to NaN, float4_e2m1fn to its largest value). After every
    `promote` elements the accumulator is added to a float32 total and starts again at zero.

    Attributes:
      format: what the accumulator is rounded to; a float that float32 holds exactly, or float64.
      step: elements of a run.
      promote: elements after which the accumulator is promoted, a multiple of `step`; None for never.
      rounding: one of `ROUNDINGS`. The random bits of "stochastic" come from the operands: equal operands give equal
        sums, and others are rounded independently of them. Members of a vmap draw together, so that each is rounded
        otherwise than it would be alone.

    Source: DeepSeek-AI, "DeepSeek-V3 Technical Report", 2024, arXiv:2412.19437, section 3.3.2: FP8 products on Hopper
      accumulate in about 14 bits and are promoted to float32 every 128 elements. Its section 3.5.2 has Hopper align
      32 products and truncate them to these bits; here they are summed in float32 first, and `@toward_zero` truncates.
    """

    format: Format
    step: int = 1
    promote: int | None = None
    rounding: str = "nearest_even"

    def __post_init__(self) -> None:
        _require_accumulable(self.format)
        if self.rounding not in ROUNDINGS:
            raise ValueError(f"accumulator rounding must be one of {', '.join(ROUNDINGS)}, got {self.rounding!r}.")
        _require_count("step", self.step)
        if self.promote is not None:
            _require_count("promote", self.promote)
            _require_whole_runs(self.step, self.promote)
        if self.format.name == "float64" and not self.is_native:
            raise ValueError("accumulator float64 is native only: it takes no @step, no @promote and no rounding.")
        if self.format.name == "float32" and self.rounding != "nearest_even":
            raise ValueError(f"accumulator float32 sums in float32, which rounds to nearest: @{self.rounding} is moot.")

    @classmethod
    def parse(cls, spec: Any) -> Accumulator:
        """Returns the accumulator that `spec` describes.

        Args:
          spec: an Accumulator; a format or dtype; or a format's name, perhaps followed by `@stepN`, `@promoteN` and a
            rounding.

        Raises:
          ValueError: an unknown format, one that nothing can accumulate in, or an unknown or repeated option.
          TypeError: neither a name, nor a dtype, nor a Format.
        """
        if isinstance(spec, cls):
            return spec
        if not isinstance(spec, str):
            return cls(formats.format(spec))
        name, *options = (part.strip() for part in spec.split("@"))
        given: dict[str, Any] = {}
        for option in options:
            key, value = _read_option(option, spec)
            if key in given:
                raise ValueError(f"accumulator '{spec}': '@{option}' is given twice.")
            given[key] = value
        return cls(_named(name, spec), **given)

    @property
    def is_native(self) -> bool:
        """Returns whether the device's own product is meant, which sums in this format in an order of its own."""
        options = (self.step, self.promote, self.rounding)
        return self.format.name in NATIVE and options == (1, None, "nearest_even")

    @property
    def dtype(self) -> np.dtype:
        """Returns the dtype of the result: float64 for float64, else float32, which holds every other format."""
        return np.dtype(np.float64 if self.format.name == "float64" else np.float32)

    def __str__(self) -> str:
        step = f"@step{self.step}" if self.step != 1 else ""
        promote = f"@promote{self.promote}" if self.promote else ""
        return self.format.name + step + promote + (f"@{self.rounding}" if self.rounding != "nearest_even" else "")

    def __repr__(self) -> str:
        return f"Accumulator.parse('{self}')"


def _read_option(option: str, spec: str) -> tuple[str, Any]:
    """Returns the attribute that an option of a string sets, and its value."""
    if option.lower() in ROUNDINGS:
        return "rounding", option.lower()
    match = _OPTION.fullmatch(option.lower())
    if not match:
        raise ValueError(
            f"accumulator '{spec}': '@{option}' is none of @stepN and @promoteN, as in 'e8m13@step32@promote128', "
            f"and no rounding, which are {', '.join(ROUNDINGS)}."
        )
    return match[1], int(match[2])


def _named(name: str, spec: str) -> Format:
    """Returns the format called `name`; its errors say of which accumulator."""
    try:
        return formats.format(name)
    except ValueError as error:
        # int32 is no entry of the catalogue, but what people ask for.
        said = _no_float(name) if re.fullmatch(r"[iu](nt|int)?\d+", name.lower()) else str(error)
        raise ValueError(f"accumulator '{spec}': {said}") from None


def _no_float(name: str) -> str:
    """Says why nothing but floats can be an accumulator here."""
    return (
        f"{name} is no format of single floats, and products of floats come without the scale that would map their "
        "sums to integers, codes or blocks. Choose a float such as float16, bfloat16 or e8m13."
    )


def _require_accumulable(fmt: Any) -> None:
    """Raises unless sums can be rounded to `fmt` in the arrays that hold them."""
    kind = getattr(fmt, "kind", None)
    if not isinstance(fmt, Format) and kind is None:
        raise TypeError(f"accumulator format must be a Format, got {fmt!r}; Accumulator.parse takes names and dtypes.")
    if not isinstance(fmt, Format) or kind != "float":
        raise ValueError(f"accumulator {_no_float(fmt.name)}")
    if not (fmt.signed and fmt.has_zero):
        raise ValueError(f"accumulator {fmt.name} has no sign or no zero: it is a format for scales, not for sums.")
    if fmt.name not in NATIVE and not _within_float32(fmt):
        raise ValueError(
            f"accumulator {fmt.name} cannot be simulated in float32 exactly: it has values that float32 has not, or "
            "subnormals among those of float32. Choose fewer bits, or float64 for the native accumulator."
        )


def _within_float32(fmt: Format) -> bool:
    """Returns whether float32 arrays can be rounded to `fmt` exactly and hold all of its values."""
    try:
        make_params(fmt, overflow=None, subnormals="keep", container="float32")
    except ValueError:
        return False
    return fmt.mantissa_bits <= _FLOAT32.mantissa_bits and fmt.max <= _FLOAT32.max


def _require_count(name: str, count: Any) -> None:
    """Raises unless `count` is a whole number of elements, at least one."""
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(f"accumulator {name} must be an int, got {count!r}.")
    if count < 1:
        raise ValueError(f"accumulator {name} must be at least 1, got {count}.")


def _require_whole_runs(step: int, promote: int) -> None:
    """Raises unless the accumulator is promoted at the end of a run."""
    if promote < step:
        raise ValueError(
            f"accumulator step={step} is more than promote={promote}, so it would be promoted within a run. "
            f"Choose step={promote} or less."
        )
    if promote % step:
        way = f"promote={promote - promote % step} or {promote - promote % step + step}"
        raise ValueError(f"accumulator promote={promote} must be a multiple of step={step}. Choose {way}.")

"""Block formats: many narrow elements under one shared scale, and how a user may name them.

A value is `element * scale`, with one scale for each block of neighbouring elements; NVFP4 has a second scale for
the whole array. This module describes them and needs no JAX; `block_rounding` rounds and encodes arrays.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Literal

from precision_lab.formats.catalogue import FORMATS, format, register, register_finder
from precision_lab.formats.oracle import floor_exponent
from precision_lab.formats.scalar import Format, power_of_two

_MX = "OCP Microscaling Formats (MX) specification 1.0, 2023, section 5; arXiv:2310.10537"
_NVFP4 = 'NVIDIA, "Pretraining Large Language Models with NVFP4", 2025, arXiv:2509.25149, appendix B'
_BFP = 'Darvish Rouhani et al., "Pushing the Limits of Narrow Precision Inferencing", NeurIPS 2020 (MSFP)'

Rule = Literal["floor", "ceil", "even", "rceil", "amax"]

# How the scale of a block follows from the largest magnitude in it. The first four choose the exponent of a power
# of two; "largest" stands for the largest element, "top" for the power of two at or below it.
RULES: dict[str, str] = {
    "floor": "the power of two at or below amax, over top; what is beyond the largest saturates (OCP MX 1.0)",
    "ceil": "the power of two at or above amax, over top",
    "even": "as floor, after amax is rounded to the mantissa bits of the element, ties upwards",
    "rceil": "the smallest power of two that is at least amax / largest, so that nothing saturates (cuBLAS)",
    "amax": "amax / largest, rounded to float8_e4m3fn, in units of a scale for the whole array (NVFP4)",
}

# The exponents an E8M0 scale can have, and its code for NaN.
MIN_SCALE_EXPONENT, MAX_SCALE_EXPONENT, NAN_SCALE = -127, 127, 255

_TENSOR_SCALE_BITS = 32
_SCALE_BITS = 8
# float32's smallest subnormal, below which an element under the smallest scale would have no float32.
_SMALLEST_EXPONENT = -149


@dataclass(frozen=True, slots=True, repr=False)
class BlockFormat:
    """A block format: hashable, compared by value, safe as a static argument of `jax.jit`.

    Attributes:
      name: `formats.format(name)` gives this format back.
      element: format of one element.
      block: elements that share a scale along each of the last axes: (32,), or (16, 16) for square tiles.
      rule: how the scale is found, see `RULES`; "amax" has float8_e4m3fn scales and a float32 scale for the array,
        the others have E8M0 scales, powers of two from 2**-127 to 2**127.
      source: where the format is defined.
      kind: "block".
    """

    name: str
    element: Format
    block: tuple[int, ...]
    rule: Rule = "floor"
    source: str = field(default="", compare=False)
    kind: Literal["block"] = field(default="block", init=False)

    def __post_init__(self) -> None:
        """Refuses what is no block format, and what float32 could not hold exactly."""
        problem = _problem(self)
        if problem:
            raise ValueError(f"block format {self.name!r} is not possible: {problem}.")

    def __repr__(self) -> str:
        return f"format({self.name!r})"

    def __str__(self) -> str:
        return self.name

    @property
    def dtype(self) -> None:
        """Returns None: no array dtype stores this format."""
        return None

    @property
    def scale(self) -> str:
        """Returns the name of the format of the block scales."""
        return "float8_e4m3fn" if self.tensor_scale else "float8_e8m0fnu"

    @property
    def tensor_scale(self) -> bool:
        """Returns whether the whole array has a float32 scale too."""
        return self.rule == "amax"

    @property
    def max_exponent(self) -> int:
        """Returns the exponent of the largest element, emax in the MX specification."""
        return floor_exponent(Fraction(self.element.max))

    @property
    def bits(self) -> float:
        """Returns bits per element with the block scales, for whole blocks; see `bits_per_element` for an array."""
        return self.element.bits + _SCALE_BITS / math.prod(self.block)

    @property
    def storage_bits(self) -> float:
        """Returns the bits one value takes in memory when packed without gaps: `bits`."""
        return self.bits

    def blocks(self, shape: Sequence[int], axis: int | tuple[int, ...] | None = None) -> int:
        """Returns how many block scales an array has; a last, smaller block has its scale too."""
        axes = self.axes(len(shape), axis)
        lengths = [shape[each] for each in axes]
        rest = [size for each, size in enumerate(shape) if each not in axes]
        return math.prod(rest) * math.prod(-(-n // b) for n, b in zip(lengths, self.block, strict=True))

    def stored_bits(self, shape: Sequence[int], axis: int | tuple[int, ...] | None = None) -> int:
        """Returns the bits of an array's codes, block scales and array scale, without gaps."""
        codes = math.prod(shape) * self.element.bits
        return codes + self.blocks(shape, axis) * _SCALE_BITS + self.tensor_scale * _TENSOR_SCALE_BITS

    def bits_per_element(self, shape: Sequence[int], axis: int | tuple[int, ...] | None = None) -> Fraction:
        """Returns the true bits per element of an array of this shape, all scales included, exactly."""
        return Fraction(self.stored_bits(shape, axis), math.prod(shape))

    def axes(self, rank: int, axis: int | tuple[int, ...] | None = None) -> tuple[int, ...]:
        """Returns the axes that blocks lie along, counted from the front.

        Args:
          rank: number of axes of the array.
          axis: the axes, one for each length of `block`; None means the last ones.

        Raises:
          ValueError: not as many axes as `block` has, one that the array has not, or one twice.
        """
        wanted = len(self.block)
        given = tuple(range(rank - wanted, rank)) if axis is None else (axis,) if isinstance(axis, int) else axis
        axes = tuple(each + rank if each < 0 else each for each in given)
        if len(axes) != wanted or len(set(axes)) != wanted or not all(0 <= each < rank for each in axes):
            blocks = " x ".join(map(str, self.block))
            raise ValueError(
                f"{self.name} has blocks of {blocks} along {wanted} axis(es); cannot lay them along axis={axis} of an "
                f"array with {rank} axes."
            )
        return axes


def _problem(fmt: BlockFormat) -> str | None:
    """Returns what makes the fields of `fmt` contradictory, or None."""
    if fmt.rule not in RULES:
        return f"rule must be one of {', '.join(RULES)}, got {fmt.rule!r}"
    if not 1 <= len(fmt.block) <= 2 or any(length < 1 for length in fmt.block):
        return f"block must be one or two positive lengths, got {fmt.block}"
    if not isinstance(fmt.element, Format) or fmt.element.kind not in ("float", "int"):
        return f"elements are floats, integers or fixed point, not {fmt.element}"
    if fmt.element.bits > 16:
        return f"elements have at most 16 bits, {fmt.element.name} has {fmt.element.bits}"
    if fmt.element.step * power_of_two(MIN_SCALE_EXPONENT) < power_of_two(_SMALLEST_EXPONENT):
        return f"{fmt.element.name} under a scale of 2**{MIN_SCALE_EXPONENT} has values below float32's smallest"
    if not fmt.element.signed:
        return f"elements have a sign, {fmt.element.name} has none"
    return f"{fmt.element.name} has no value of at least 1" if fmt.element.max < 1 else None


def _fixed(bits: int, specials: str = "narrow") -> Format:
    """Returns sign and `bits - 1` bits of magnitude, one of them before the point; -2 is a value only if "full"."""
    return format(f"fixed{bits}.{bits - 2}:{specials}")


# name: element, block, rule, source
_BASES: dict[str, tuple[Format, tuple[int, ...], Rule, str]] = {
    "mxfp8_e4m3": (FORMATS["float8_e4m3fn"], (32,), "floor", _MX),
    "mxfp8_e5m2": (FORMATS["float8_e5m2"], (32,), "floor", _MX),
    "mxfp6_e3m2": (FORMATS["float6_e3m2fn"], (32,), "floor", _MX),
    "mxfp6_e2m3": (FORMATS["float6_e2m3fn"], (32,), "floor", _MX),
    "mxfp4": (FORMATS["float4_e2m1fn"], (32,), "floor", _MX),
    "mxint8": (_fixed(8), (32,), "floor", _MX),
    "nvfp4": (FORMATS["float4_e2m1fn"], (16,), "amax", _NVFP4),
    "nvfp4_2d": (FORMATS["float4_e2m1fn"], (16, 16), "amax", _NVFP4),
}

BLOCK_FORMATS: dict[str, BlockFormat] = {name: BlockFormat(name, *parts) for name, parts in _BASES.items()}

# The MX specification's element of choice where a width has two.
BLOCK_ALIASES = {"mxfp8": "mxfp8_e4m3", "mxfp6": "mxfp6_e2m3", "mxfp4_e2m1": "mxfp4"}

_SPEC = re.compile(r"([a-z]+\d+(?:_[a-z0-9]+)?)(?:@(\d{1,6}(?:x\d{1,6})?))?(?::([a-z_,]+))?")
_BFP_NAME = re.compile(r"bfp(\d{1,2})")
_BFP_BLOCK = (16,)


def block_format(spec: str | BlockFormat) -> BlockFormat:
    """Returns the block format that `spec` names.

    Args:
      spec: a BlockFormat; a name of `BLOCK_FORMATS` or alias; "bfpN" for block floating point with N bits for sign
        and magnitude and an 8-bit shared exponent. A block size may follow ("bfp8@64", "mxfp4@16", "mxfp8@32x32"),
        then options: a scale rule ("mxfp4:rceil"), which NVFP4 has no choice of, and "full" for integer elements
        that use the code of -2 ("mxint8:full,even").

    Raises:
      ValueError: nothing has that name, or an option that the format cannot honour.
    """
    if isinstance(spec, BlockFormat):
        return spec
    found = find(spec.strip().lower())
    if found is None:
        known = ", ".join([*BLOCK_FORMATS, *BLOCK_ALIASES])
        raise ValueError(f"unknown block format {spec!r}. Known: {known}; also bfpN such as 'bfp8@16'.")
    return found


def find(name: str) -> BlockFormat | None:
    """Returns the block format called `name` (in lower case), None if its stem is none of ours."""
    match = _SPEC.fullmatch(name)
    stem = BLOCK_ALIASES.get(match[1], match[1]) if match else ""
    base = _base(stem)
    if match is None or base is None:
        return None
    element, block, rule, source = base
    given = tuple(int(length) for length in match[2].split("x")) if match[2] else block
    if given != block and rule == "amax":
        raise ValueError(f"block format {name!r}: {stem} has blocks of {'x'.join(map(str, block))} and no others.")
    said, options = [], _options(name, match[3], base)
    if "full" in options:
        element, said = _fixed(element.bits, "full"), ["full"]
    wanted = next((option for option in options if option != "full"), rule)
    said += [wanted] if wanted != rule else []
    full = stem + (f"@{'x'.join(map(str, given))}" if given != block else "") + (":" + ",".join(said) if said else "")
    return BlockFormat(full, element, given, wanted, source)  # pyright: ignore[reportArgumentType]


def _options(name: str, text: str | None, base: tuple[Format, tuple[int, ...], Rule, str]) -> list[str]:
    """Returns the options after the colon of `name`, if that format can honour them."""
    element, _, rule, _ = base
    possible = ["full"] * (element.kind == "int") + ([] if rule == "amax" else [r for r in RULES if r != "amax"])
    options = text.split(",") if text else []
    rules = [option for option in options if option != "full"]
    if not set(options) <= set(possible) or len(set(options)) < len(options) or len(rules) > 1:
        rest = f"one rule and {'full' if 'full' in possible else 'nothing else'}, of {', '.join(possible)}"
        raise ValueError(f"block format {name!r}: cannot use {text!r}; options are {rest if possible else 'none'}.")
    return options


def _base(stem: str) -> tuple[Format, tuple[int, ...], Rule, str] | None:
    """Returns what `stem` means without options, None if nothing."""
    if stem in _BASES:
        return _BASES[stem]
    match = _BFP_NAME.fullmatch(stem)
    if match and 2 < int(match[1]) <= 16:
        return _fixed(int(match[1])), _BFP_BLOCK, "floor", _BFP
    return None


for _fmt in BLOCK_FORMATS.values():
    register(_fmt, *(alias for alias, name in BLOCK_ALIASES.items() if name == _fmt.name))
register_finder(find)

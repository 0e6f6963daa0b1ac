"""Codebooks: formats that are a list of levels, and what a code means is its place in the list.

The levels of every codebook here are computed from its definition. A value takes the nearest level; the midpoints
between levels are exact fractions, so that a tie is a tie. No JAX is needed; `codebook_rounding` is the part for JAX.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from statistics import NormalDist
from typing import Any, Literal

import numpy as np

from precision_lab.formats.catalogue import register
from precision_lab.formats.params import Layout, layout_of
from precision_lab.formats.scalar import power_of_two

_NF4 = 'Dettmers et al., "QLoRA", 2023, arXiv:2305.14314, section 3 and appendix E'
_FP4 = "bitsandbytes, csrc/kernels.cu, dQuantizeFP4: sign, two exponent bits, one mantissa bit, over 12"
_DYNAMIC = 'Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2022, arXiv:2110.02861, section 1.3'
_TERNARY = 'Ma et al., "The Era of 1-bit LLMs", 2024, arXiv:2402.17764, section 2'
_BINARY = 'Courbariaux et al., "BinaryConnect", 2015, arXiv:1511.00363, section 2.2'

Ties = Literal["lower", "upper", "zero"]

# Which of two levels a value halfway between them takes.
TIES: dict[str, str] = {
    "lower": "the smaller one",
    "upper": "the larger one",
    "zero": "the one nearer to zero; the smaller one if both are equally near",
}


@dataclass(frozen=True, slots=True, repr=False)
class Codebook:
    """A format given by its levels: hashable, compared by value, safe as a static argument of `jax.jit`.

    Attributes:
      name: `formats.format(name)` gives the codebooks of this module back.
      levels: the value of each code; codes of equal value decode alike, and the first is used to encode.
      ties: what a value halfway between two levels becomes, one of `TIES`.
      packed: codes that share a byte where that is more than whole bits allow, None elsewhere: 5 for ternary.
      source: where the levels are defined.
      kind: "codebook".
    """

    name: str
    levels: tuple[float, ...]
    ties: Ties = "lower"
    packed: int | None = None
    source: str = field(default="", compare=False)
    kind: Literal["codebook"] = field(default="codebook", init=False)

    def __post_init__(self) -> None:
        """Refuses what is no codebook."""
        levels = tuple(float(level) for level in self.levels)
        object.__setattr__(self, "levels", levels)
        if not 2 <= len(set(levels)) <= len(levels) <= 256 or not all(map(math.isfinite, levels)):
            raise ValueError(f"codebook {self.name!r}: needs 2 to 256 finite levels, two of them different.")
        if self.ties not in TIES:
            raise ValueError(f"codebook {self.name!r}: ties must be one of {', '.join(TIES)}, got {self.ties!r}.")
        if self.packed is not None and len(levels) ** self.packed > 256:
            raise ValueError(f"codebook {self.name!r}: {self.packed} codes of {len(levels)} levels do not fit a byte.")

    def __repr__(self) -> str:
        return f"codebook({self.name!r}, {len(self.levels)} levels)"

    def __str__(self) -> str:
        return self.name

    @property
    def dtype(self) -> None:
        """Returns None: no array dtype stores this format."""
        return None

    @property
    def bits(self) -> int:
        """Returns the bits of one code."""
        return (len(self.levels) - 1).bit_length()

    @property
    def storage_bits(self) -> float:
        """Returns the bits one value takes in memory when packed: 1.6 for ternary, whose codes share bytes by fives."""
        return 8 / self.packed if self.packed else self.bits

    @property
    def max(self) -> float:
        """Returns the largest level."""
        return max(self.levels)

    @property
    def min(self) -> float:
        """Returns the smallest level."""
        return min(self.levels)

    def grid(self) -> np.ndarray:
        """Returns every level in ascending order as float64, each once."""
        return np.array([level + 0.0 for level in sorted(set(self.levels))])

    def order(self) -> np.ndarray:
        """Returns the code of each value of `grid`, as uint8."""
        return np.array([self.levels.index(level) for level in sorted(set(self.levels))], np.uint8)

    def midpoints(self) -> list[tuple[Fraction, bool]]:
        """Returns the exact midpoints between neighbouring levels, and whether a tie there goes to the upper level."""
        levels = [Fraction(level) for level in sorted(set(self.levels))]
        halves = [(low + high) / 2 for low, high in itertools.pairwise(levels)]
        return [(half, self.ties == "upper" or (self.ties == "zero" and half < 0)) for half in halves]

    def thresholds(self, container: Any = "float32") -> np.ndarray:
        """Returns, for each midpoint, the largest word whose value takes the lower level; see `ordered_words`."""
        layout = layout_of(container)
        return np.array([_last_below(layout, half, not upper) for half, upper in self.midpoints()], _signed(layout))

    def encode(self, x: Any) -> np.ndarray:
        """Returns the codes of the levels nearest to `x`, as uint8.

        Raises:
          TypeError: `x` is not real.
          ValueError: a NaN, which no code stands for.
        """
        with np.errstate(invalid="ignore"):
            values = np.asarray(x)
            if values.dtype.kind == "c":
                raise TypeError(f"codebooks encode real values, got {values.dtype} {values.shape}.")
            values = values.astype(np.float64)
        if np.isnan(values).any():
            count = int(np.isnan(values).sum())
            raise ValueError(
                f"{self.name} has no NaN, but {count} of {values.size} values are NaN; replace them first."
            )
        words = ordered_words(np, layout_of("float64"), np.atleast_1d(values).view(np.uint64))
        place = np.searchsorted(self.thresholds("float64"), words, side="left")
        return self.order()[place].reshape(values.shape)

    def decode(self, codes: Any) -> np.ndarray:
        """Returns the levels that `codes` stand for, as float64.

        Raises:
          TypeError: `codes` are not integers.
          ValueError: an integer that is no code.
        """
        array = np.asarray(codes)
        if not np.issubdtype(array.dtype, np.integer):
            raise TypeError(f"codes of {self.name} are integers, got {array.dtype} {array.shape}.")
        if array.size and not (int(array.min()) >= 0 and int(array.max()) < len(self.levels)):
            low, high = int(array.min()), int(array.max())
            raise ValueError(
                f"codes of {self.name} lie in [0, {len(self.levels) - 1}], got values from {low} to {high}."
            )
        return np.array(self.levels)[array]


def ordered_words(xp: Any, layout: Layout, words: Any) -> Any:
    """Returns signed integers in the order of the floats whose words these are; -0 comes just before +0."""
    signed = words.astype(_signed(layout))
    return xp.where(signed < 0, signed ^ _signed(layout)(layout.sign - 1), signed)


def _signed(layout: Layout) -> type[np.signedinteger]:
    """Returns the signed integer of the size of a word."""
    return np.int32 if layout.word is np.uint32 else np.int64


def _last_below(layout: Layout, half: Fraction, inclusive: bool) -> int:
    """Returns the ordered word of the largest float below `half`, or at it if `inclusive`."""
    word = layout.floor_bits(abs(half))
    # floor_bits rounds magnitudes down, hence negative numbers up, and its word may be that of `half` itself.
    exact = _value(layout, word) == abs(half)
    if half >= 0:
        return word - (exact and not inclusive) if word or not exact or inclusive else -2
    return -word - 1 - (not exact or not inclusive)


def _value(layout: Layout, word: int) -> Fraction:
    """Returns the value of a non-negative finite word."""
    exponent, mantissa = divmod(word, 1 << layout.mantissa_bits)
    implicit = (1 << layout.mantissa_bits) if exponent else 0
    return (implicit + mantissa) * power_of_two(max(exponent, 1) - layout.bias - layout.mantissa_bits)


def codebook(
    levels: Iterable[float], *, name: str = "codebook", ties: Ties = "lower", register_as: bool = False
) -> Codebook:
    """Returns a codebook of your own levels, in the order of their codes.

    Args:
      levels: 2 to 256 finite numbers.
      name: what to call it.
      ties: one of `TIES`.
      register_as: whether `formats.format(name)` shall find it.

    Raises:
      ValueError: too few or too many levels, or the name is taken.
    """
    made = Codebook(name, tuple(levels), ties, source="given by the user")
    if register_as:
        register(made)
    return made


def normal_float_levels() -> tuple[float, ...]:
    """Returns the 16 levels of NF4: quantiles of the normal distribution at equal distances of probability.

    Eight positive levels and seven negative ones run from zero to the quantile 0.9677083, and everything is divided
    by the largest. The arithmetic is float32 where bitsandbytes uses it, which fixes the last bit of each level.
    """
    positive = [NormalDist().inv_cdf(p) for p in _equally_spaced(0.9677083, 0.5, 9)[:-1]]
    negative = [-NormalDist().inv_cdf(p) for p in _equally_spaced(0.9677083, 0.5, 8)[:-1]]
    quantiles = np.array(sorted([*negative, 0.0, *positive]), np.float32)
    return tuple((quantiles / quantiles.max()).tolist())


def _equally_spaced(start: float, stop: float, count: int) -> list[float]:
    """Returns `count` numbers from start to stop in float32, each counted from the nearer end."""
    first, last = np.float32(start), np.float32(stop)
    step = (last - first) / np.float32(count - 1)
    half = count // 2
    near = [first + step * np.float32(i) for i in range(half)]
    far = [last - step * np.float32(count - 1 - i) for i in range(half, count)]
    return [float(value) for value in near + far]


def bitsandbytes_fp4_levels() -> tuple[float, ...]:
    """Returns the 16 levels of bitsandbytes' FP4, sign in the highest bit: larger exponent fields are *smaller*.

    Exponent field e > 0 and mantissa m are (2 + m) * 2**(3 - e), the field 0 is m / 16; all over the largest, 12.
    """
    fields = [(code >> 1, code & 1) for code in range(8)]
    magnitudes = [(2 + m) * power_of_two(3 - e) if e else Fraction(m, 16) for e, m in fields]
    levels = [float(np.float32(float(each / max(magnitudes)))) for each in magnitudes]
    return (*levels, *(-level for level in levels))


def dynamic_levels(*, signed: bool = True, bits: int = 8, max_exponent_bits: int = 7) -> tuple[float, ...]:
    """Returns the levels of the dynamic data type: leading zeros count powers of ten, the bits after them a fraction.

    With i bits of fraction, 2**i intervals divide the range from 0.1 to 1 evenly, and their centres, times a power of
    ten, are levels. 0 and 1 are levels too, and codes that are left over stand for 0.

    Args:
      signed: whether one bit is a sign.
      bits: bits of a code, at most 8.
      max_exponent_bits: the largest number of leading zeros.
    """
    levels = [Fraction(0), Fraction(1)]
    for zeros in range(max_exponent_bits):
        fraction_bits = zeros + bits - 1 - max_exponent_bits + (not signed)
        intervals = 1 << fraction_bits
        centres = [Fraction(1, 10) + Fraction(9, 10) * Fraction(2 * i + 1, 2 * intervals) for i in range(intervals)]
        scaled = [centre / 10 ** (max_exponent_bits - 1 - zeros) for centre in centres]
        levels += scaled + [-each for each in scaled] * signed
    levels += [Fraction(0)] * ((1 << bits) - len(levels))
    return tuple(float(np.float32(float(level))) for level in sorted(levels))


CODEBOOKS: dict[str, Codebook] = {
    each.name: each
    for each in (
        Codebook("nf4", normal_float_levels(), source=_NF4),
        Codebook("bnb_fp4", bitsandbytes_fp4_levels(), ties="zero", source=_FP4),
        Codebook("dynamic8", dynamic_levels(), source=_DYNAMIC),
        Codebook("dynamic8_unsigned", dynamic_levels(signed=False), source=_DYNAMIC),
        Codebook("ternary", (0.0, 1.0, -1.0), ties="zero", packed=5, source=_TERNARY),
        Codebook("binary", (-1.0, 1.0), ties="upper", source=_BINARY),
    )
}

for _codebook in CODEBOOKS.values():
    register(_codebook)

"""Reading statistics on the host: shares, sizes and decibels of one TensorStats."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from precision_lab.formats import Format
from precision_lab.formats.scalar import power_of_two
from precision_lab.telemetry.statistics import BINS, INF, MAX_EXPONENT, MIN_EXPONENT, NAN, ZERO, TensorStats

_SPARKS = " ▁▂▃▄▅▆▇█"


class Window(NamedTuple):
    """The exponents of a format, each of the binade [2**e, 2**(e + 1)).

    Attributes:
      lowest: of the smallest positive value.
      normal: of the smallest with full precision.
      top: of the largest value.
    """

    lowest: int
    normal: int
    top: int


def window(fmt: Format) -> Window:
    """Returns the exponents that a format covers; for integers, whose values are equally spaced, from one step up."""
    return Window(*map(exponent_of, (fmt.min_subnormal, fmt.min_normal, fmt.max)))


def exponent_of(value: float) -> int:
    """Returns the largest k with 2**k <= value; exact, since a float's denominator is a power of two."""
    numerator, denominator = value.as_integer_ratio()
    return numerator.bit_length() - denominator.bit_length()


@dataclass(frozen=True)
class Reading:
    """The numbers behind the statistics of one tensor, all as Python numbers; shares are of all elements.

    Attributes:
      stats: the statistics, on the host; numbers are of all their leading axes together, see `layers`.
      fmt: format of the tensor, or what it is rounded to next.
      rounded: whether the errors of rounding to it were measured.
    """

    stats: TensorStats
    fmt: Any = None
    rounded: bool = False

    @property
    def layers(self) -> list[Reading]:
        """The readings along the first axis, such as those of the iterations of a scan; empty if there is none."""
        leading = np.shape(self.stats.amax)[:1]
        parts = [TensorStats(*(leaf[i] for leaf in self.stats)) for i in range(*leading)] if leading else []
        return [Reading(part, self.fmt, self.rounded) for part in parts]

    @property
    def histogram(self) -> np.ndarray:
        """The elements in each bin, int64: zero, the binades from 2**-149 to 2**127, infinite, NaN."""
        counts = np.asarray(self.stats.counts).astype(np.int64).reshape(-1, BINS, 2).sum(axis=0)
        return counts[:, 0] + (counts[:, 1] << 32)

    @property
    def binades(self) -> dict[int, int]:
        """The number of elements by exponent, for the exponents that occur."""
        counts = self.histogram[ZERO + 1 : INF]
        return {int(i) + MIN_EXPONENT: int(counts[i]) for i in np.flatnonzero(counts)}

    @property
    def count(self) -> int:
        """The elements looked at."""
        return int(self.histogram.sum())

    @property
    def zeros(self) -> int:
        """The zeros of either sign."""
        return int(self.histogram[ZERO])

    @property
    def infs(self) -> int:
        """The infinities."""
        return int(self.histogram[INF])

    @property
    def nans(self) -> int:
        """The NaNs."""
        return int(self.histogram[NAN])

    @property
    def nonfinite(self) -> bool:
        """Whether any element is infinite or NaN, among those not looked at too."""
        return bool(np.any(self.stats.nonfinite))

    @property
    def finite(self) -> int:
        """The elements that are neither infinite nor NaN."""
        return self.count - self.infs - self.nans

    @property
    def amax(self) -> float:
        """The largest finite magnitude, 0 if there is none."""
        return float(np.max(self.stats.amax, initial=0))

    @property
    def amin(self) -> float:
        """The smallest finite magnitude that is not zero, infinite if there is none."""
        return float(np.min(self.stats.amin, initial=math.inf))

    @property
    def mean(self) -> float:
        """The mean of the finite elements; NaN if there are none."""
        return self._sum("total", 1) / self.finite if self.finite else math.nan

    @property
    def rms(self) -> float:
        """The root of the mean square of the finite elements; NaN if there are none."""
        return math.sqrt(self._sum("squares", 2) / self.finite) if self.finite else math.nan

    @property
    def sqnr_db(self) -> float:
        """The power of the finite elements over that of their rounding errors, in dB; NaN if that was not measured."""
        noise, signal = self._sum("noise", 2), self._sum("squares", 2)
        if signal == 0 or math.isnan(noise):
            return math.nan
        with np.errstate(divide="ignore"):
            return float(10 * np.log10(np.float64(signal) / noise))

    def below(self, fmt: Format) -> float:
        """Returns the share of non-zero elements under the smallest normal number of `fmt`, where precision is lost."""
        return self._share(sum(n for e, n in self.binades.items() if e < window(fmt).normal))

    def flushed(self, fmt: Format) -> float:
        """Returns the share of non-zero elements that rounding to nearest in `fmt` makes zero.

        Counted at its own format; elsewhere by binade, where a tie (half the smallest value, exactly) counts as kept.
        """
        if self.rounded and fmt == self.fmt:
            return self._share(_count(self.stats.flushed))
        return self._share(sum(n for e, n in self.binades.items() if e < window(fmt).lowest - 1))

    def beyond(self, fmt: Format) -> float:
        """Returns the share of finite elements that `fmt` cannot hold.

        Counted at its own format; elsewhere by binade, where those in the binade of the largest value count as held.
        """
        if self.rounded and fmt == self.fmt:
            return self._share(_count(self.stats.overflowed))
        return self._share(sum(n for e, n in self.binades.items() if e > window(fmt).top))

    def sparkline(self, width: int = 24) -> str:
        """Returns a small picture of the exponents that occur, from the lowest to the highest."""
        binades = self.binades
        if not binades:
            return ""
        low, high = min(binades), max(binades)
        step = max(1, -(-(high - low + 1) // width))
        columns = [0] * ((high - low) // step + 1)
        for exponent, n in binades.items():
            columns[(exponent - low) // step] += n
        most = max(columns)
        line = "".join(_SPARKS[-(-n * (len(_SPARKS) - 1) // most)] for n in columns)
        return f"2^{low} {line} 2^{high}"

    def to_dict(self) -> dict[str, Any]:
        """Returns the numbers as a plain dictionary; shares are those of the tensor's own format."""
        names = ("count", "zeros", "infs", "nans", "nonfinite", "amax", "amin", "mean", "rms", "sqnr_db")
        row = {name: getattr(self, name) for name in names} | {"zero": self._share(self.zeros)}
        if isinstance(self.fmt, Format):
            row |= {name: getattr(self, name)(self.fmt) for name in ("below", "flushed", "beyond")}
        return row

    def _share(self, part: int) -> float:
        """Returns a part of all elements."""
        return part / self.count if self.count else 0.0

    def _sum(self, name: str, power: int) -> float:
        """Returns a sum in units of 1."""
        values, units = np.asarray(getattr(self.stats, name), np.float64), np.asarray(self.stats.exponent)
        unit = np.reshape([float(power_of_two(power * int(each))) for each in units.reshape(-1)], units.shape)
        return float(np.sum(values * unit))


def _count(words: Any) -> int:
    """Returns a count from its low and high words."""
    words = np.asarray(words).astype(np.int64).reshape(-1, 2).sum(axis=0)
    return int(words[0] + (words[1] << 32))


assert MAX_EXPONENT - MIN_EXPONENT + 4 == BINS

"""Means and intervals over seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Mean:
    """A mean over seeds with half the width of its 95 % interval, in the units of the metric.

    `half_width` is None for fewer than two values: one seed has no spread.
    """

    mean: float
    half_width: float | None
    n: int

    def text(self, *, signed: bool = False) -> str:
        """Returns `0.123 ± 0.004`, with as many digits as the interval warrants."""
        number = _digits(self.mean, self.half_width, signed=signed)
        if self.half_width is None or not math.isfinite(self.mean):
            return number
        return f"{number} ± {_short(self.half_width)}"


def mean_interval(values: Sequence[float]) -> Mean | None:
    """Returns the mean of `values` and its 95 % interval by Student's t, None without values.

    Source: Student, "The probable error of a mean", 1908. The half width is `t(0.975, n - 1) * s / sqrt(n)` with
      the sample standard deviation `s`; for differences paired by seed this is the paired t interval.
    """
    n = len(values)
    if n == 0:
        return None
    # A NaN or an infinity among the values makes the mean say so; that is wanted, and not worth a warning.
    with np.errstate(invalid="ignore", over="ignore"):
        mean = float(np.mean(np.asarray(values, np.float64)))
        if n == 1:
            return Mean(mean, None, 1)
        deviation = float(np.std(np.asarray(values, np.float64), ddof=1))
    return Mean(mean, student_t_975(n - 1) * deviation / math.sqrt(n), n)


def student_t_975(degrees: int) -> float:
    """Returns the 97.5 % quantile of Student's t with `degrees` degrees of freedom."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, 0.975))


def _digits(value: float, spread: float | None, *, signed: bool) -> str:
    """Returns a number with two digits of its spread, or four significant ones without a spread."""
    sign = "+" if signed else ""
    if not math.isfinite(value):
        return f"{value:{sign}}"
    if not spread or not math.isfinite(spread):
        return f"{value:{sign}.4g}"
    decimals = 1 - math.floor(math.log10(spread))
    if not value and decimals > 6:
        return f"{value:{sign}g}"
    if value and (abs(value) >= 1e5 or decimals > 6):
        significant = math.floor(math.log10(abs(value))) + 1 + decimals
        return f"{value:{sign}.{min(max(significant, 1), 17)}g}"
    return f"{value:{sign}.{max(decimals, 0)}f}"


def _short(value: float) -> str:
    """Returns a half width with two significant digits."""
    return f"{value:.2g}" if not math.isfinite(value) or value < 1e-4 or value >= 100 else _two_digits(value)


def _two_digits(value: float) -> str:
    """Returns two significant digits without an exponent, trailing zeros kept."""
    if value == 0:
        return "0"
    return f"{value:.{max(1 - math.floor(math.log10(value)), 0)}f}"

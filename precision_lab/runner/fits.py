"""Claims about how a number moves with the steps of a run, or with sizes and bit widths across runs.

{kind: trend, a: x, metric: eval/loss, at: [250, 500, 1000], value: 0.9}    Spearman's correlation with the step
{kind: log_fit, points: [...], powers: [step, N], exponentials: [bits], r2: 0.9, rising: [step], falling: [N]}
"""

import itertools
import math
from typing import Annotated, Literal

import numpy as np
from pydantic import Field, model_validator

from precision_lab.runner.claim import Finding, Keys, Numbers, NumericClaim, Term, keys_of

Step = Annotated[int, Field(ge=0)]
_EXACT = 1e-9  # a perfect correlation comes out a rounding error below 1


class Trend(NumericClaim):
    """Spearman's rank correlation of a metric, less a reference, with the step is at least a value on every seed.

    Attributes:
      a: the arm or term; a term gives no step of its own.
      reference: what is subtracted at the same step.
      at: the steps.
      value: the least correlation, from -1 to 1.
      direction: "decreasing" asks the same of the negated metric.
    """

    kind: Literal["trend"] = "trend"
    a: str | Term
    reference: str | Term | None = None
    at: list[Step] = Field(min_length=3)
    value: float = Field(ge=-1, le=1)
    direction: Literal["increasing", "decreasing"] = "increasing"

    @model_validator(mode="after")
    def _steps_rise(self) -> "Trend":
        if any(after <= before for before, after in itertools.pairwise(self.at)):
            raise ValueError(f"at must be rising steps, got {self.at}.")
        if self.reduce != "last" or any(map(_has_step, (self.a, self.reference))):
            raise ValueError("a trend takes its terms at the steps of its own at: leave out reduce and their at.")
        return self

    def terms(self) -> list[tuple[Keys, Term]]:
        named = [("a", self.a), *([] if self.reference is None else [("reference", self.reference)])]
        return [_at(*keys_of((key,), term), step) for key, term in named for step in self.at]

    def in_words(self) -> str:
        verb = "rises" if self.direction == "increasing" else "falls"
        less = "" if self.reference is None else f" less {_plain(self.full(self.reference))}"
        return f"{_plain(self.full(self.a))}{less} {verb} with the steps, rank correlation at least {self.value:g}"

    def decide(self, numbers: Numbers) -> Finding:
        from scipy.stats import rankdata

        count, sign = len(self.at), 1 if self.direction == "increasing" else -1
        columns = np.array(numbers[:count]) - (np.array(numbers[count:]) if self.reference is not None else 0)
        if np.ptp(columns, axis=0).min() == 0:
            return Finding(None, "it does not move at all on some seed")
        ranks = rankdata(sign * columns, axis=0)
        found = [float(np.corrcoef(np.arange(count), column)[0, 1]) for column in ranks.T]
        because = f"rank correlation {min(found):.3g} at the least, to be {self.value:g} or more"
        return Finding(min(found) >= self.value - _EXACT, because, {"rank correlation": found})


class Point(Term):
    """Numbers that a law is fitted to: a term, less another, at one or more steps.

    Attributes:
      less: what is subtracted.
      steps: the steps to take both at; the last one if none are given.
      where: what the law's other variables are here, by name.
    """

    less: Term | None = None
    steps: list[Step] = Field(default_factory=list)
    where: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _one_step(self) -> "Point":
        if self.steps and (_has_step(self) or _has_step(self.less)):
            raise ValueError("a point is taken at its steps: leave out reduce and at, also of less.")
        if self.steps and "step" in self.where:
            raise ValueError("where says what step is, and so do the steps: leave out one of them.")
        return self


class LogFit(NumericClaim):
    """A law `y = c * u**p * exp(q * v) ...` fits the numbers, and its exponents have the signs that are claimed.

    Least squares of log y over all points and seeds.

    Attributes:
      points: what to fit.
      powers: variables that enter as a power; "step" is the step of a number.
      exponentials: variables that enter in an exponent.
      r2: the fit explains more than this share of the variance of log y.
      rising, falling: variables with which y rises, and falls.
    """

    kind: Literal["log_fit"] = "log_fit"
    points: list[Point] = Field(min_length=3)
    powers: list[str] = Field(default_factory=list)
    exponentials: list[str] = Field(default_factory=list)
    r2: float = Field(ge=0, lt=1)
    rising: list[str] = Field(default_factory=list)
    falling: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _knows_its_variables(self) -> "LogFit":
        variables = [*self.powers, *self.exponentials]
        if not variables or len(set(variables)) < len(variables):
            raise ValueError("powers and exponentials must name at least one variable, and each only once.")
        for name in (*self.rising, *self.falling):
            if name not in variables:
                raise ValueError(f"{name!r} is not among the variables {', '.join(variables)}.")
        for point in self.points:
            missing = {*variables} - {*point.where} - ({"step"} if point.steps else set())
            if missing:
                raise ValueError(f"the point of arm {point.arm!r} does not say what {sorted(missing)[0]!r} is.")
        least = [{"step": min(point.steps, default=1), **point.where} for point in self.points]
        if any(values[name] <= 0 for values in least for name in self.powers):
            raise ValueError("a variable that enters as a power must be positive.")
        both = {*self.rising} & {*self.falling}
        if both:
            raise ValueError(f"{sorted(both)[0]!r} is in rising and in falling, which no law can do.")
        places = {tuple(row) for point in self.points for row in self._rows(point)}
        if len(places) <= len(variables) + 1:
            raise ValueError(
                f"a law of {len(variables)} variables and a constant fits any {len(places)} points: give it points at "
                f"{len(variables) + 2} or more different values of {', '.join(variables)}."
            )
        return self

    def terms(self) -> list[tuple[Keys, Term]]:
        return [pair for i, point in enumerate(self.points) for pair in _both(i, point)]

    def in_words(self) -> str:
        law = [*(f"{name}^p" for name in self.powers), *(f"exp(q {name})" for name in self.exponentials)]
        signs = [f"rising with {name}" for name in self.rising] + [f"falling with {name}" for name in self.falling]
        return f"{' * '.join(law)} fits with R^2 above {self.r2:g}" + "".join(f", {sign}" for sign in signs)

    def decide(self, numbers: Numbers) -> Finding:
        rows, logs, columns = [], [], iter(np.array(numbers))
        for point in self.points:
            steps = point.steps or [0]
            values = np.array([next(columns) for _ in steps])
            values = values - (np.array([next(columns) for _ in steps]) if point.less is not None else 0)
            for step, place, row in zip(steps, self._rows(point), values, strict=True):
                if row.min() <= 0:
                    return Finding(None, f"{point.arm} at step {step}: {row.min():.4g} has no logarithm")
                rows += [place] * len(row)
                logs += np.log(row).tolist()
        return self._fitted(np.array(rows), np.array(logs))

    def _rows(self, point: Point) -> list[list[float]]:
        """Returns what the logarithm of y is linear in, at each step of a point."""
        places = [{"step": float(step), **point.where} for step in point.steps or [0]]
        return [
            [1.0, *(math.log(at[name]) for name in self.powers), *(at[name] for name in self.exponentials)]
            for at in places
        ]

    def _fitted(self, rows: np.ndarray, logs: np.ndarray) -> Finding:
        """Returns what the least-squares fit says."""
        names = [*self.powers, *self.exponentials]
        found, _, rank, _ = np.linalg.lstsq(rows, logs, rcond=None)
        if rank < rows.shape[1]:
            return Finding(None, "the points do not tell the variables apart")
        spread = float(np.sum((logs - logs.mean()) ** 2))
        if np.ptp(logs) == 0:
            return Finding(None, "all numbers are the same, so there is nothing to explain")
        r2 = 1 - float(np.sum((logs - rows @ found) ** 2)) / spread
        exponents = dict(zip(names, found[1:].tolist(), strict=True))
        signs = all(exponents[name] > 0 for name in self.rising) and all(exponents[name] < 0 for name in self.falling)
        shown = ", ".join(f"{name} {value:+.3g}" for name, value in exponents.items())
        because = f"R^2 {r2:.4g}, to be above {self.r2:g}; exponents {shown}; {len(logs)} numbers"
        return Finding(r2 > self.r2 and signs, because)


def _at(keys: Keys, term: Term, step: int | None) -> tuple[Keys, Term]:
    """Returns a term at a step."""
    return keys, term if step is None else term.model_copy(update={"at": step, "reduce": None})


def _both(i: int, point: Point) -> list[tuple[Keys, Term]]:
    """Returns the terms of a point: it at every step, then what is subtracted at every step."""
    own = Term(arm=point.arm, metric=point.metric, reduce=point.reduce, at=point.at)
    parts = [(("points", i, "arm"), own), *([] if point.less is None else [(("points", i, "less", "arm"), point.less)])]
    return [_at(keys, term, step) for keys, term in parts for step in (point.steps or [None])]


def _has_step(term: str | Term | None) -> bool:
    """Returns whether a term says itself where in a run it is taken."""
    return isinstance(term, Term) and (term.at is not None or term.reduce is not None)


def _plain(term: Term) -> str:
    """Returns a term in words, whatever step it has."""
    return f"{term.metric} of {term.arm}"

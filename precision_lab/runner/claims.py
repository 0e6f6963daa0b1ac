"""Claims: what a paper says, as data that a run can be held against, and the verdict on each.

Every comparison is paired: the arms of one seed share initialisation and batch order, so `d = a - b` is formed seed by
seed; of arms that differ in model or data, or whose beginnings (`start`) do, this is not true, and the verdict says
so. A missing arm, a crash, a
divergence or a value that is not finite makes a claim inconclusive, never a pass; only `close` and `equal` are refuted
where one of the two arms diverged and the other did not.

    {kind: gt, a: x, b: y, metric: eval/loss, margin: 0.03}       mean of d > margin, and d > 0 on every seed
    {kind: close, a: x, b: y, metric: eval/loss, margin: 0.06}    |mean of d| <= margin
    {kind: equal, a: x, b: y, metric: eval/loss, tol: 0}          |d| <= tol on every seed
    {kind: ratio, a: x, b: y, reference: z, factor: 0.35}         mean of (a - z) < factor * mean of (b - z)
    {kind: above, a: x, metric: train/skipped_steps, value: 10}   metric > value on every seed; `below` likewise
    {kind: fails, a: x, metric: eval/loss, value: 10}             diverged, not finite, or above the value on every seed
    {kind: monotone, arms: [x, y, z], metric: eval/loss}          means over seeds never fall (`direction: decreasing`)

`trend` and `log_fit` are in `fits`. `reduce` says which number of a run is meant: `last` (the default), `mean`, `max`
or `min` over its steps. Where an arm's name stands, `{arm: x, metric: eval/loss, at: 250}` may stand, with a metric,
a reduction or a step of its own.
"""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import Field, model_validator

from precision_lab.runner.claim import (
    INCONCLUSIVE,
    NOT_REPRODUCED,
    REPRODUCED,
    ClaimBase,
    Diverged,
    Finding,
    Keys,
    Numbers,
    NumericClaim,
    Term,
    Value,
    Verdict,
    keys_of,
    mean,
)
from precision_lab.runner.fits import LogFit, Trend


class _Pair(NumericClaim):
    """A claim about two terms."""

    pairs = True
    a: str | Term
    b: str | Term

    def terms(self) -> list[tuple[Keys, Term]]:
        return [keys_of(("a",), self.a), keys_of(("b",), self.b)]

    @model_validator(mode="after")
    def _two_terms(self) -> "_Pair":
        if self.full(self.a) == self.full(self.b):
            raise ValueError(f"a and b are the same {'arm' if isinstance(self.a, str) else 'term'}, {self.a!r}.")
        return self

    def _differences(self, numbers: Numbers) -> tuple[list[float], dict[str, list[float]]]:
        """Returns `a - b` seed by seed, and by its name."""
        d = [x - y for x, y in zip(numbers[0], numbers[1], strict=True)]
        return d, {f"{self.label(self.a)} - {self.label(self.b)}": d}

    def _other(self) -> str:
        """Returns `b` in words that follow those of `a`."""
        return f"that of {self.b}" if isinstance(self.a, str) and isinstance(self.b, str) else str(self.full(self.b))


class Greater(_Pair):
    """`a` exceeds `b` by more than a margin on average, and at all on every seed."""

    kind: Literal["gt"] = "gt"
    margin: float = Field(default=0.0, ge=0, allow_inf_nan=False)

    def in_words(self) -> str:
        return f"{self.full(self.a)} exceeds {self._other()} by more than {self.margin:g}"

    def decide(self, numbers: Numbers) -> Finding:
        d, shown = self._differences(numbers)
        average, least = mean(d), min(d)
        because = f"difference {average:+.4g} on average against a margin of {self.margin:g}, {least:+.4g} at the least"
        return Finding(average > self.margin and least > 0, because, shown)


class Close(_Pair):
    """`a` and `b` differ by no more than a margin on average."""

    kind: Literal["close"] = "close"
    divergence_refutes = True
    margin: float = Field(ge=0, allow_inf_nan=False)

    def in_words(self) -> str:
        return f"{self.full(self.a)} is within {self.margin:g} of {self._other()}"

    def decide(self, numbers: Numbers) -> Finding:
        d, shown = self._differences(numbers)
        average, largest = mean(d), max(abs(one) for one in d)
        because = f"difference {average:+.4g} on average, allowed {self.margin:g}, largest {largest:.4g}"
        return Finding(abs(average) <= self.margin, because, shown)


class Equal(_Pair):
    """`a` and `b` agree on every seed, to the last bit unless a tolerance is given."""

    kind: Literal["equal"] = "equal"
    divergence_refutes = True
    tol: float = Field(default=0.0, ge=0, allow_inf_nan=False)

    def in_words(self) -> str:
        return f"{self.full(self.a)} equals {self._other()}" + (f" to {self.tol:g}" if self.tol else "")

    def decide(self, numbers: Numbers) -> Finding:
        d, shown = self._differences(numbers)
        largest = max(abs(one) for one in d)
        return Finding(largest <= self.tol, f"largest difference {largest:.4g}, allowed {self.tol:g}", shown)


class Ratio(_Pair):
    """On average, `a` is less than a factor times `b`, both above `reference` if there is one, zero if not.

    Undecided where `b` does not lie above the reference: then there is nothing to take a share of.
    """

    kind: Literal["ratio"] = "ratio"
    reference: str | Term | None = None
    factor: float = Field(gt=0, allow_inf_nan=False)

    def terms(self) -> list[tuple[Keys, Term]]:
        reference = [] if self.reference is None else [keys_of(("reference",), self.reference)]
        return [*super().terms(), *reference]

    def in_words(self) -> str:
        above = "" if self.reference is None else f", both less {self.full(self.reference)}"
        return f"{self.full(self.a)} is below {self.factor:g} times {self._other()}{above}"

    def decide(self, numbers: Numbers) -> Finding:
        base = mean(numbers[2]) if len(numbers) > 2 else 0.0
        a, b = mean(numbers[0]) - base, mean(numbers[1]) - base
        if b <= 0:
            return Finding(None, f"{self.label(self.b)} is {b:+.4g}, of which there is no share")
        because = f"{a:.4g} against {b:.4g}, {a / b:.3g} of it, to be below {self.factor:g}"
        return Finding(a < self.factor * b, because)


class _Threshold(ClaimBase):
    """A claim about one term and a number."""

    a: str | Term
    value: float = Field(allow_inf_nan=False)

    def terms(self) -> list[tuple[Keys, Term]]:
        return [keys_of(("a",), self.a)]


class Above(_Threshold, NumericClaim):
    """`a` lies above a value on every seed."""

    kind: Literal["above"] = "above"

    def in_words(self) -> str:
        return f"{self.full(self.a)} is above {self.value:g}"

    def decide(self, numbers: Numbers) -> Finding:
        least = min(numbers[0])
        return Finding(least > self.value, f"smallest {least:.4g}, to be above {self.value:g}")


class Below(_Threshold, NumericClaim):
    """`a` lies below a value on every seed."""

    kind: Literal["below"] = "below"

    def in_words(self) -> str:
        return f"{self.full(self.a)} is below {self.value:g}"

    def decide(self, numbers: Numbers) -> Finding:
        largest = max(numbers[0])
        return Finding(largest < self.value, f"largest {largest:.4g}, to be below {self.value:g}")


class Fails(_Threshold):
    """`a` diverged, or is not finite, or lies above a value, on every seed."""

    kind: Literal["fails"] = "fails"

    def in_words(self) -> str:
        return f"{self.full(self.a)} is above {self.value:g} or not finite, or the run diverged"

    def judge(self, value: Value, seeds: Sequence[int]) -> Verdict:
        term = self.full(self.a)
        found = [value(term, seed) for seed in seeds]
        for seed, one in zip(seeds, found, strict=True):
            if isinstance(one, str) and not isinstance(one, Diverged):
                return self._verdict(INCONCLUSIVE, f"{term.arm}, seed {seed}: {one}", {}, seeds)
        failed = [isinstance(one, str) or not math.isfinite(one) or one > self.value for one in found]
        told = ", ".join(one if isinstance(one, str) else f"{one:.4g}" for one in found)
        verdict = REPRODUCED if failed and all(failed) else NOT_REPRODUCED if failed else INCONCLUSIVE
        return self._verdict(verdict, f"{told or 'no seed was run'}; to be above {self.value:g}", {}, seeds)


class Monotone(NumericClaim):
    """The means over seeds of a list of terms never turn against a direction, by more than a tolerance."""

    kind: Literal["monotone"] = "monotone"
    arms: list[str | Term] = Field(min_length=2)
    direction: Literal["increasing", "decreasing"] = "increasing"
    tol: float = Field(default=0.0, ge=0, allow_inf_nan=False)

    def terms(self) -> list[tuple[Keys, Term]]:
        return [keys_of(("arms", i), arm) for i, arm in enumerate(self.arms)]

    @model_validator(mode="after")
    def _distinct(self) -> "Monotone":
        twice = [arm for i, arm in enumerate(self.arms) if arm in self.arms[:i]]
        if twice:
            raise ValueError(f"arms names {twice[0]!r} twice.")
        return self

    def in_words(self) -> str:
        turn = "falls" if self.direction == "increasing" else "rises"
        quantity = f"{self.reduce} of {self.metric}" if self.reduce != "last" else self.metric
        subject = f"{quantity} never {turn}" if quantity else f"never {turn}"
        return f"{subject} along {', '.join(self.label(arm) for arm in self.arms)}"

    def decide(self, numbers: Numbers) -> Finding:
        sign = 1 if self.direction == "increasing" else -1
        means = [mean(column) for column in numbers]
        worst = min(sign * (after - before) for before, after in pairwise(means))
        because = f"means {', '.join(f'{one:.4g}' for one in means)}"
        return Finding(worst >= -self.tol, because + (f", tolerance {self.tol:g}" if self.tol else ""))


Claim = Annotated[
    Greater | Close | Equal | Ratio | Above | Below | Fails | Monotone | Trend | LogFit, Field(discriminator="kind")
]

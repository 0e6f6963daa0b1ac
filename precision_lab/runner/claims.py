"""Claims: what a paper says, as data that a run can be held against, and the verdict on each.

Every comparison is paired: the arms of one seed share initialisation and batch order, so `d = a - b` is formed seed by
seed; of arms that differ in model or data this is not true, and the verdict says so. A missing arm, a crash, a
divergence or a value that is not finite makes a claim inconclusive, never a pass; only `close` and `equal` are refuted
where one of the two arms diverged and the other did not.

    {kind: gt, a: x, b: y, metric: eval/loss, margin: 0.03}       mean of d > margin, and d > 0 on every seed
    {kind: close, a: x, b: y, metric: eval/loss, margin: 0.06}    |mean of d| <= margin
    {kind: equal, a: x, b: y, metric: eval/loss, tol: 0}          |d| <= tol on every seed
    {kind: above, a: x, metric: train/skipped_steps, value: 10}   metric > value on every seed; `below` likewise
    {kind: monotone, arms: [x, y, z], metric: eval/loss}          means over seeds never fall (`direction: decreasing`)

`reduce` says which number of a run is meant: `last` (the default), `mean`, `max` or `min` over its steps.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Reduce = Literal["last", "mean", "max", "min"]
REPRODUCED, NOT_REPRODUCED, INCONCLUSIVE = "reproduced", "not_reproduced", "inconclusive"

Value = Callable[[str, int, str, str], "float | str"]
"""`value(arm, seed, metric, reduce)`: the number, or the reason why there is none."""


class Diverged(str):
    """The reason why a run has no number, where it ran and its loss stopped being finite."""


@dataclass(frozen=True)
class Verdict:
    """What a run says about one claim.

    Attributes:
      say: the claim in words.
      verdict: `reproduced`, `not_reproduced` or `inconclusive`.
      because: the numbers against the threshold, or why they cannot decide.
      paper: what the paper reports, in words, as the configuration gives it.
      numbers: by arm (or `a - b`), one number per seed.
      seeds: the seeds these numbers belong to.
    """

    say: str
    kind: str
    verdict: str
    because: str
    paper: str = ""
    numbers: dict[str, list[float]] = field(default_factory=dict)
    seeds: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data."""
        return {**asdict(self), "seeds": list(self.seeds)}


class _Claim(BaseModel):
    """What every claim has."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    say: str = ""
    paper: str = ""
    metric: str
    reduce: Reduce = "last"

    divergence_refutes: ClassVar[bool] = False
    """Whether the claim is wrong, and not undecided, where one of its arms diverged and another did not."""
    pairs: ClassVar[bool] = False
    """Whether the claim compares its arms seed by seed."""

    def names(self) -> list[tuple[str, str]]:
        """Returns the arms the claim speaks of, each with the key that names it."""
        raise NotImplementedError

    def sentence(self) -> str:
        """Returns the claim in words, made from its terms if the author gave none."""
        return self.say or self._terms()

    def _terms(self) -> str:
        raise NotImplementedError

    def _decide(self, numbers: dict[str, list[float]]) -> tuple[bool, str, dict[str, list[float]]]:
        """Returns whether finite numbers, by arm and then by seed, bear the claim out, why, and what to show."""
        raise NotImplementedError

    def judge(self, value: Value, seeds: Sequence[int]) -> Verdict:
        """Returns the verdict on the claim from what each arm reached on each seed."""
        if self.divergence_refutes and (because := self._divergence(value, seeds)):
            return self._verdict(NOT_REPRODUCED, because, {}, seeds)
        numbers: dict[str, list[float]] = {}
        for _, arm in self.names():
            for seed in seeds:
                found = value(arm, seed, self.metric, self.reduce)
                if isinstance(found, str) or not math.isfinite(found):
                    reason = found if isinstance(found, str) else f"{self.metric} is {found}"
                    return self._verdict(INCONCLUSIVE, f"{arm}, seed {seed}: {reason}", {}, seeds)
                numbers.setdefault(arm, []).append(found)
        if not numbers or not seeds:
            return self._verdict(INCONCLUSIVE, "no seed was run", {}, seeds)
        holds, because, shown = self._decide(numbers)
        return self._verdict(REPRODUCED if holds else NOT_REPRODUCED, because, shown, seeds)

    def _divergence(self, value: Value, seeds: Sequence[int]) -> str:
        """Returns which arm diverged on a seed on which another ended with a number, empty if none did."""
        for seed in seeds:
            found = {arm: value(arm, seed, self.metric, self.reduce) for _, arm in self.names()}
            finite = [arm for arm, one in found.items() if not isinstance(one, str) and math.isfinite(one)]
            diverged = [arm for arm, one in found.items() if isinstance(one, Diverged)]
            if finite and diverged:
                return f"{diverged[0]}, seed {seed}: {found[diverged[0]]}, while {finite[0]} did not diverge"
        return ""

    def _verdict(self, verdict: str, because: str, numbers: dict[str, list[float]], seeds: Sequence[int]) -> Verdict:
        kind = getattr(self, "kind", "")
        return Verdict(self.sentence(), kind, verdict, because, self.paper, numbers, tuple(seeds))

    def _quantity(self) -> str:
        """Returns the metric in words."""
        return self.metric if self.reduce == "last" else f"{self.reduce} of {self.metric}"


class _Pair(_Claim):
    """A claim about two arms."""

    pairs = True
    a: str
    b: str

    def names(self) -> list[tuple[str, str]]:
        return [("a", self.a), ("b", self.b)]

    @model_validator(mode="after")
    def _two_arms(self) -> "_Pair":
        if self.a == self.b:
            raise ValueError(f"a and b are the same arm, {self.a!r}.")
        return self

    def _differences(self, numbers: dict[str, list[float]]) -> tuple[list[float], dict[str, list[float]]]:
        """Returns `a - b` seed by seed, and everything worth showing."""
        d = [x - y for x, y in zip(numbers[self.a], numbers[self.b], strict=True)]
        return d, {**numbers, f"{self.a} - {self.b}": d}


class Greater(_Pair):
    """`a` exceeds `b` by more than a margin on average, and at all on every seed."""

    kind: Literal["gt"] = "gt"
    margin: float = Field(default=0.0, ge=0, allow_inf_nan=False)

    def _terms(self) -> str:
        return f"{self._quantity()} of {self.a} exceeds that of {self.b} by more than {self.margin:g}"

    def _decide(self, numbers: dict[str, list[float]]) -> tuple[bool, str, dict[str, list[float]]]:
        d, shown = self._differences(numbers)
        mean, least = _mean(d), min(d)
        because = f"difference {mean:+.4g} on average against a margin of {self.margin:g}, {least:+.4g} at the least"
        return mean > self.margin and least > 0, because, shown


class Close(_Pair):
    """`a` and `b` differ by no more than a margin on average."""

    kind: Literal["close"] = "close"
    divergence_refutes = True
    margin: float = Field(ge=0, allow_inf_nan=False)

    def _terms(self) -> str:
        return f"{self._quantity()} of {self.a} is within {self.margin:g} of that of {self.b}"

    def _decide(self, numbers: dict[str, list[float]]) -> tuple[bool, str, dict[str, list[float]]]:
        d, shown = self._differences(numbers)
        mean, largest = _mean(d), max(abs(one) for one in d)
        because = f"difference {mean:+.4g} on average, allowed {self.margin:g}, largest {largest:.4g}"
        return abs(mean) <= self.margin, because, shown


class Equal(_Pair):
    """`a` and `b` agree on every seed, to the last bit unless a tolerance is given."""

    kind: Literal["equal"] = "equal"
    divergence_refutes = True
    tol: float = Field(default=0.0, ge=0, allow_inf_nan=False)

    def _terms(self) -> str:
        return f"{self._quantity()} of {self.a} equals that of {self.b}" + (f" to {self.tol:g}" if self.tol else "")

    def _decide(self, numbers: dict[str, list[float]]) -> tuple[bool, str, dict[str, list[float]]]:
        d, shown = self._differences(numbers)
        largest = max(abs(one) for one in d)
        return largest <= self.tol, f"largest difference {largest:.4g}, allowed {self.tol:g}", shown


class _Threshold(_Claim):
    """A claim about one arm and a number."""

    a: str
    value: float = Field(allow_inf_nan=False)

    def names(self) -> list[tuple[str, str]]:
        return [("a", self.a)]


class Above(_Threshold):
    """`a` lies above a value on every seed."""

    kind: Literal["above"] = "above"

    def _terms(self) -> str:
        return f"{self._quantity()} of {self.a} is above {self.value:g}"

    def _decide(self, numbers: dict[str, list[float]]) -> tuple[bool, str, dict[str, list[float]]]:
        least = min(numbers[self.a])
        return least > self.value, f"smallest {least:.4g}, to be above {self.value:g}", numbers


class Below(_Threshold):
    """`a` lies below a value on every seed."""

    kind: Literal["below"] = "below"

    def _terms(self) -> str:
        return f"{self._quantity()} of {self.a} is below {self.value:g}"

    def _decide(self, numbers: dict[str, list[float]]) -> tuple[bool, str, dict[str, list[float]]]:
        largest = max(numbers[self.a])
        return largest < self.value, f"largest {largest:.4g}, to be below {self.value:g}", numbers


class Monotone(_Claim):
    """The means over seeds of a list of arms never turn against a direction, by more than a tolerance."""

    kind: Literal["monotone"] = "monotone"
    arms: list[str] = Field(min_length=2)
    direction: Literal["increasing", "decreasing"] = "increasing"
    tol: float = Field(default=0.0, ge=0, allow_inf_nan=False)

    def names(self) -> list[tuple[str, str]]:
        return [("arms", arm) for arm in self.arms]

    @model_validator(mode="after")
    def _distinct_arms(self) -> "Monotone":
        twice = [arm for i, arm in enumerate(self.arms) if arm in self.arms[:i]]
        if twice:
            raise ValueError(f"arms names {twice[0]!r} twice.")
        return self

    def _terms(self) -> str:
        turn = "falls" if self.direction == "increasing" else "rises"
        return f"{self._quantity()} never {turn} along {', '.join(self.arms)}"

    def _decide(self, numbers: dict[str, list[float]]) -> tuple[bool, str, dict[str, list[float]]]:
        sign = 1 if self.direction == "increasing" else -1
        means = [_mean(numbers[arm]) for arm in self.arms]
        worst = min(sign * (after - before) for before, after in pairwise(means))
        because = f"means {', '.join(f'{mean:.4g}' for mean in means)}"
        return worst >= -self.tol, because + (f", tolerance {self.tol:g}" if self.tol else ""), numbers


def _mean(values: Sequence[float]) -> float:
    """Returns the mean, summed exactly so that the order of seeds cannot decide."""
    return math.fsum(values) / len(values)


Claim = Annotated[Greater | Close | Equal | Above | Below | Monotone, Field(discriminator="kind")]

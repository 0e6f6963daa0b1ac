"""What every claim has in common: terms that name numbers of runs, and the verdict on them."""

import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails

Reduce = Literal["last", "mean", "max", "min"]
REPRODUCED, NOT_REPRODUCED, INCONCLUSIVE = "reproduced", "not_reproduced", "inconclusive"
Keys = tuple[str | int, ...]


class Term(BaseModel):
    """One number of each seed's run: a metric of an arm.

    Attributes:
      arm: whose.
      metric: which; that of the claim if not given.
      reduce: over the steps of the run: `last`, `mean`, `max` or `min`; that of the claim if not given.
      at: the step to take it at, in place of `reduce`.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    arm: str
    metric: str = ""
    reduce: Reduce | None = None
    at: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _one_way(self) -> "Term":
        if self.reduce is not None and self.at is not None:
            raise ValueError("reduce and at exclude each other: one is over all steps, the other at a single one")
        return self

    def __str__(self) -> str:
        """Returns the metric and the arm in words."""
        quantity = self.metric if self.reduce in (None, "last") else f"{self.reduce} of {self.metric}"
        return f"{quantity} of {self.arm}" + ("" if self.at is None else f" at step {self.at}")


Value = Callable[[Term, int], "float | str"]
"""`value(term, seed)`: the number, or the reason why there is none."""
Numbers = list[list[float]]
"""Of each term, in their order, one number for each seed."""


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


@dataclass(frozen=True)
class Finding:
    """What the numbers say.

    Attributes:
      holds: whether they bear the claim out; None where they cannot decide.
      because: why, with the numbers.
      shown: further numbers worth showing, by name, one per seed.
    """

    holds: bool | None
    because: str
    shown: dict[str, list[float]] = field(default_factory=dict)


class ClaimBase(BaseModel):
    """What every claim has; its terms may leave metric and reduction to it."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    say: str = ""
    paper: str = ""
    metric: str = ""
    reduce: Reduce = "last"

    pairs: ClassVar[bool] = False
    """Whether the claim compares its arms seed by seed."""

    @abstractmethod
    def terms(self) -> list[tuple[Keys, Term]]:
        """Returns the terms as written, each with the keys that lead to it."""

    @abstractmethod
    def in_words(self) -> str:
        """Returns the claim in words, made from its terms."""

    @abstractmethod
    def judge(self, value: Value, seeds: Sequence[int]) -> Verdict:
        """Returns the verdict on the claim from what each term is on each seed."""

    @model_validator(mode="after")
    def _every_term_has_a_metric(self) -> "ClaimBase":
        if not self.metric and not all(term.metric for _, term in self.terms()):
            missing = InitErrorDetails(type="missing", loc=("metric",), input=None)
            raise ValidationError.from_exception_data("claim", [missing])
        return self

    def full(self, term: str | Term) -> Term:
        """Returns a term with what it leaves to the claim."""
        if isinstance(term, str):
            return Term(arm=term, metric=self.metric, reduce=self.reduce)
        reduce = None if term.at is not None else term.reduce or self.reduce
        return term.model_copy(update={"metric": term.metric or self.metric, "reduce": reduce})

    def arms_named(self) -> list[str]:
        """Returns the arms that the claim speaks of, each once."""
        return list(dict.fromkeys(term.arm for _, term in self.terms()))

    def sentence(self) -> str:
        """Returns the claim in words, made from its terms if the author gave none."""
        return self.say or self.in_words()

    def label(self, term: str | Term) -> str:
        """Returns the arm, with what distinguishes the term from others of this claim."""
        term = self.full(term)
        own = term.metric == (self.metric or term.metric) and term.reduce == self.reduce
        return term.arm if own and self.metric else str(term)

    def _verdict(self, verdict: str, because: str, numbers: dict[str, list[float]], seeds: Sequence[int]) -> Verdict:
        kind = getattr(self, "kind", "")
        return Verdict(self.sentence(), kind, verdict, because, self.paper, numbers, tuple(seeds))


class NumericClaim(ClaimBase):
    """A claim that finite numbers decide: where there are none it is inconclusive."""

    divergence_refutes: ClassVar[bool] = False
    """Whether the claim is wrong, and not undecided, where one of its arms diverged and another did not."""

    @abstractmethod
    def decide(self, numbers: Numbers) -> Finding:
        """Returns what finite numbers say."""

    def judge(self, value: Value, seeds: Sequence[int]) -> Verdict:
        """Returns the verdict on the claim from what each term is on each seed."""
        terms = [self.full(term) for _, term in self.terms()]
        if self.divergence_refutes and (because := _divergence(terms, value, seeds)):
            return self._verdict(NOT_REPRODUCED, because, {}, seeds)
        numbers: Numbers = []
        for term in terms:
            column = [value(term, seed) for seed in seeds]
            for seed, found in zip(seeds, column, strict=True):
                if isinstance(found, str) or not math.isfinite(found):
                    reason = found if isinstance(found, str) else f"{term.metric} is {found}"
                    return self._verdict(INCONCLUSIVE, f"{term.arm}, seed {seed}: {reason}", {}, seeds)
            numbers.append(column)  # pyright: ignore[reportArgumentType] (no text left)
        if not numbers or not seeds:
            return self._verdict(INCONCLUSIVE, "no seed was run", {}, seeds)
        found = self.decide(numbers)
        verdict = INCONCLUSIVE if found.holds is None else REPRODUCED if found.holds else NOT_REPRODUCED
        labels = {self.label(term): column for term, column in zip(terms, numbers, strict=True)}
        return self._verdict(verdict, found.because, {**labels, **found.shown}, seeds)


def _divergence(terms: Sequence[Term], value: Value, seeds: Sequence[int]) -> str:
    """Returns which arm diverged on a seed on which another ended with a number, empty if none did."""
    for seed in seeds:
        found = {term.arm: value(term, seed) for term in terms}
        finite = [arm for arm, one in found.items() if not isinstance(one, str) and math.isfinite(one)]
        diverged = [arm for arm, one in found.items() if isinstance(one, Diverged)]
        if finite and diverged:
            return f"{diverged[0]}, seed {seed}: {found[diverged[0]]}, while {finite[0]} did not diverge"
    return ""


def keys_of(key: Keys, term: str | Term) -> tuple[Keys, Term]:
    """Returns the keys that lead to the name of a term's arm, and the term."""
    return (key, Term(arm=term)) if isinstance(term, str) else ((*key, "arm"), term)


def mean(values: Sequence[float]) -> float:
    """Returns the mean, summed exactly so that the order of seeds cannot decide."""
    return math.fsum(values) / len(values)

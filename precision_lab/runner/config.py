"""An experiment as data: a base run, arms, seeds, claims, and the paper's numbers.

    exp = ExperimentConfig(
        name="master_weights",
        model={"kind": "mlp"}, data={"kind": "digits", "batch": 64}, optim={"kind": "adam", "lr": 2e-5},
        arms={"float32": {}, "float16": {"policy": "float16_pure"}},
        seeds=[0, 1, 2],
        claims=[{"kind": "gt", "a": "float16", "b": "float32", "metric": "eval/loss", "margin": 0.5}],
    )

The same keys in a YAML file give an equal experiment; `loading.load` adds presets and `--set`.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationInfo, field_validator, model_validator

from precision_lab.runner.axes import axis_entry, parse_seeds, with_entry
from precision_lab.runner.claim import Term
from precision_lab.runner.claims import Claim
from precision_lab.runner.expansion import expand
from precision_lab.runner.explain import LocatedError, validate
from precision_lab.runner.identity import digest, experiment_id
from precision_lab.runner.known import is_logged_at, metric_names, why_not_at
from precision_lab.runner.resolve import BASE_KEYS, Runs, base_and_arms, resolve
from precision_lab.runner.starts import arms_above
from precision_lab.runner.tree import Tree, from_python, suggestion
from precision_lab.runner.yaml12 import Keys, Place

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.@+-]*$", max_length=64)]
ArmName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.@+=,-]*$", max_length=240)]
Seed = Annotated[int, Field(ge=0, lt=2**32, strict=True)]


class Paper(BaseModel):
    """What the paper reports, to stand beside our numbers; never compared with them by the machine.

    Attributes:
      title: authors and year, or the title.
      arxiv: identifier such as `1710.03740`.
      where: table, figure or section.
      claim: the claim in words.
      status: how the numbers were checked: `primary` against the paper itself, `secondary` in a source that quotes
        it, `memory` not at all.
      table: rows by name, each a mapping from column to number or text.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    title: str = ""
    arxiv: str = Field(default="", pattern=r"^$|^\d{4}\.\d{4,5}(v\d+)?$|^[a-z-]+(\.[A-Z]{2})?/\d{7}$")
    where: str = ""
    claim: str = ""
    status: Literal["primary", "secondary", "memory"] = "memory"
    table: dict[str, dict[str, float | str]] = Field(default_factory=dict)


class ExperimentConfig(BaseModel):
    """An experiment: what is run, with which seeds, and what is claimed about it.

    The keys of a run (`model`, `data`, `optim`, ...) stand beside these; they are gathered in `base`.

    Attributes:
      name: names the folder of results.
      notes: anything a reader should know; no part of any identity.
      base: what all arms share.
      arms: by name, what each changes; merged key by key into the base.
      points: of arms that came of a `sweep`, by name the value of each axis; written by the expansion.
      max_trials: how many runs there may be; `load` refuses more. None is no limit.
      seeds: each arm is run once for each; in a file also as text, `0..4`.
      baseline: the arm that the others are compared with; the first one if not given.
      metrics: columns of the result table, such as `eval/loss`; a sensible pair if not given.
      tracker: what else shows the metrics, such as `tensorboard`; no part of any identity.
      claims: what is judged when the runs are done.
      paper: where the claims come from.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name
    notes: str = ""
    paper: Paper | None = None
    base: dict[str, Any] = Field(default_factory=dict)
    arms: dict[ArmName, dict[str, Any] | None] = Field(default_factory=lambda: {"run": {}}, min_length=1)
    points: dict[ArmName, dict[str, bool | int | float | str]] = Field(default_factory=dict)
    max_trials: Annotated[int, Field(ge=1, strict=True)] | None = None
    seeds: tuple[Seed, ...] = Field(default=(0,), min_length=1)
    baseline: str = ""
    metrics: tuple[str, ...] = ()
    tracker: tuple[str, ...] = ()
    claims: tuple[Claim, ...] = ()

    _runs: Runs = PrivateAttr(default_factory=dict)
    _columns: tuple[str, ...] | None = PrivateAttr(default=None)
    _words: tuple[str, ...] = PrivateAttr(default=())
    _written: Tree = PrivateAttr(default_factory=lambda: Tree(None))

    @model_validator(mode="before")
    @classmethod
    def _gather_base(cls, given: Any) -> Any:
        """Makes arms of a `sweep`, and moves the keys of a run under `base`."""
        if isinstance(given, Mapping) and given.get("sweep") is not None:
            given = expand(from_python(given)).data
        if not isinstance(given, Mapping) or "base" in given:
            return given
        rest = {key: value for key, value in given.items() if key not in BASE_KEYS}
        return {**rest, "base": {key: value for key, value in given.items() if key in BASE_KEYS}}

    @field_validator("seeds", mode="before")
    @classmethod
    def _count_seeds(cls, given: Any) -> Any:
        """Returns the seeds that `0..4` or `0,1,2` names; the rest is for pydantic."""
        return parse_seeds(given, "seeds") if isinstance(given, str) else given

    @classmethod
    def written_keys(cls) -> list[str]:
        """Returns what may stand at the top level of a file, where the keys of `base` stand themselves."""
        return sorted({*cls.model_fields, *BASE_KEYS, "presets", "sweep"} - {"base"})

    @model_validator(mode="after")
    def _resolve(self, info: ValidationInfo) -> "ExperimentConfig":
        """Validates every run, and whatever names an arm or a metric."""
        places: Mapping[Keys, Place] = (info.context or {}).get("places", {})
        self._written = written = Tree(None, places)
        _refuse_twice(self.seeds, written)
        base, arms = base_and_arms(self.base, self.arms, places)
        self._runs = resolve(base, arms, self.seeds)
        self._refuse_unknown_arms(written)
        self._refuse_unknown_metrics(written)
        return self

    def _refuse_unknown_arms(self, written: Tree) -> None:
        """Raises if the baseline or a claim speaks of an arm that is not there."""
        named: list[tuple[Keys, str]] = [(("baseline",), self.baseline)] if self.baseline else []
        for i, claim in enumerate(self.claims):
            named += [(("claims", i, *keys), term.arm) for keys, term in claim.terms()]
        for keys, arm in named:
            if arm not in self.arms:
                raise LocatedError(_say(written, keys, f"no arm {arm!r}{suggestion(arm, self.arms, what='arms')}"))

    def _refuse_unknown_metrics(self, written: Tree) -> None:
        """Raises if a column names a metric that no arm logs, or a claim one, or a step, that its arms do not log."""
        logged = self._logged_by_some()
        for i, metric in enumerate(self.metrics):
            _refuse_metric(metric, logged, _place(written, ("metrics", i)))
        for i, claim in enumerate(self.claims):
            for keys, term in claim.terms():
                known = self.known_metrics([term.arm])
                own = (*keys[:-1], "metric") if term.metric else ("metric",)
                _refuse_metric(claim.full(term).metric, known, _place(written, ("claims", i, *own)))
                self._refuse_unknown_step(claim.full(term), _place(written, _step_of(written, ("claims", i), keys)))

    def _refuse_unknown_step(self, term: Term, place: Place) -> None:
        """Raises if a term asks for a step at which its arm logs nothing."""
        run = next(iter(self._runs[term.arm].values()))
        if term.at is not None and not is_logged_at(run, term.metric, term.at):
            raise LocatedError(place.say(f"{why_not_at(run, term.metric, term.at)} (arm {term.arm!r})."))

    def __eq__(self, other: object) -> bool:
        """Returns whether two experiments say the same, wherever they were written."""
        return isinstance(other, ExperimentConfig) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(self.id)

    def known_metrics(self, arms: Any) -> set[str]:
        """Returns the metrics that all of some arms log."""
        logged = [set(metric_names(run)) for arm in arms for run in list(self._runs[arm].values())[:1]]
        return set.intersection(*logged) if logged else set()

    def _logged_by_some(self) -> set[str]:
        """Returns the metrics that at least one arm logs."""
        return set().union(*(self.known_metrics([arm]) for arm in self.arms))

    @property
    def runs(self) -> Runs:
        """The validated run of every arm and seed."""
        return self._runs

    @property
    def id(self) -> str:
        """The name of the experiment's folder of results."""
        return experiment_id(self.name, self._runs)

    @property
    def words(self) -> tuple[str, ...]:
        """What to write after `precision-lab run` to get this experiment; empty if it was made in Python."""
        return self._words

    @property
    def baseline_arm(self) -> str:
        """The arm that the others are compared with."""
        return self.baseline or next(iter(self.arms))

    def baseline_of(self, arm: str) -> str:
        """Returns what an arm is compared with: where arms were multiplied, the baseline at the same point of the axes.

        Where the sweep has no such point, or more than one, that is the baseline itself.
        """
        own, base = self.points.get(arm, {}), self.points.get(self.baseline_arm, {})
        if "base" not in own or "base" not in base or own["base"] == base["base"]:
            return self.baseline_arm
        there = {key: own.get(key, value) for key, value in base.items() if key != "base"} | {"base": base["base"]}
        found = [name for name, point in self.points.items() if point == there]
        return found[0] if len(found) == 1 else self.baseline_arm

    @property
    def baseline_name(self) -> str:
        """What tables call the baseline: the given arm where each point of a sweep has its own."""
        several = len({self.baseline_of(arm) for arm in self.arms}) > 1
        return str(self.points[self.baseline_arm]["base"]) if several else self.baseline_arm

    @property
    def columns(self) -> tuple[str, ...]:
        """The metrics that tables show: those given, else the usual ones of all arms, or of any if they share none."""
        if self._columns is None:
            known = set() if self.metrics else self.known_metrics(self.arms) or self._logged_by_some()
            usual = tuple(metric for metric in ("eval/loss", "eval/accuracy") if metric in known)
            self._columns = self.metrics or usual or tuple(sorted(known))
        return self._columns

    def locate(self, arm: str, key: str, message: str) -> str:
        """Returns a message with the place where an arm, or else the base, gives a key."""
        own: Keys = ("arms", arm, key)
        return _say(self._written, own if own in self._written.places or key not in self.base else (key,), message)

    def size(self) -> int:
        """Returns how many different runs there are; arms that turn out equal share theirs."""
        return len({digest(run) for seeds in self._runs.values() for run in seeds.values()})

    def to_dict(self) -> dict[str, Any]:
        """Returns plain data that makes an equal experiment, with the base at the top level as in a file."""
        data = self.model_dump(exclude_defaults=True)
        base = data.pop("base", {})
        data["claims"] = [{"kind": claim.kind, **claim.model_dump(exclude_defaults=True)} for claim in self.claims]
        head = {key: data.pop(key) for key in ("name", "notes", "paper") if key in data}
        return _lists({**head, **base, **data, "arms": self.arms, "seeds": self.seeds})

    def select(self, *, arms: Sequence[str] = (), seeds: Sequence[int] = ()) -> "ExperimentConfig":
        """Returns the experiment with some of its arms, or with other seeds; claims about other arms go.

        The baseline stays with several arms, which are compared with it; a single arm stands alone. Arms that others
        start from stay too. An arm that a sweep multiplied stands for all that came of it.

        Raises:
          ValueError: an arm that is not there.
        """
        data, chosen = self.to_dict(), {one for arm in arms for one in self._made_of(arm)}
        if len(set(arms)) > 1:
            chosen |= {self.baseline_arm, *map(self.baseline_of, chosen)}
        arms = sorted(arms_above(self._runs, chosen))
        if arms:
            data["arms"] = {name: change for name, change in self.arms.items() if name in arms}
            kept = [claim for claim in self.claims if set(claim.arms_named()) <= set(arms)]
            data["claims"] = [one for one, claim in zip(data["claims"], self.claims, strict=True) if claim in kept]
            data["baseline"] = self.baseline if self.baseline in arms else ""
            data["points"] = {name: point for name, point in self.points.items() if name in arms}
        if seeds:
            data["seeds"] = list(seeds)
        places = {keys: place for keys, place in self._written.places.items() if keys[:1] not in _RENUMBERED}
        selected = validate(ExperimentConfig, from_python(data), context={"places": places})
        return selected._with_words(self._words)

    def _made_of(self, arm: str) -> list[str]:
        """Returns an arm, or all that a sweep made of it."""
        found = [arm] if arm in self.arms else [one for one, point in self.points.items() if point.get("base") == arm]
        if not found:
            given = {str(point["base"]) for point in self.points.values() if "base" in point}
            near = suggestion(arm, [*sorted(given), *self.arms], what="arms")
            raise LocatedError(f"no arm {arm!r} in {self.name}{near}")
        return found

    def axis(
        self,
        key: str | Mapping[str, Sequence[Any]],
        values: Sequence[Any] = (),
        *,
        name: str = "",
        mode: Literal["grid", "zip"] = "grid",
        labels: Sequence[Any] = (),
        arms: Sequence[str] = (),
    ) -> "ExperimentConfig":
        """Returns the experiment with every arm multiplied by an axis, as `sweep` in a file does.

            pl.load("experiments/x").axis("optim.lr", [1e-3, 3e-3]).with_seeds(3)

        Args:
          key: dotted key of a run, such as `policy` or `optim.lr`, or several with their values.
          values: what the key takes.
          name: of the axis in the names of arms; the last word of the key if not given.
          mode: several keys multiply (`grid`) or go hand in hand (`zip`).
          labels: what arms call the values; the values themselves if not given.
          arms: multiply only these.

        Raises:
          LocatedError: a ValueError of one line: a key, a value or an arm that there is not.
        """
        named, entry = axis_entry({key: values} if isinstance(key, str) else key, name, mode, labels, arms)
        return validate(ExperimentConfig, expand(with_entry(from_python(self.to_dict()), named, from_python(entry))))

    @property
    def axes(self) -> dict[str, list[Any]]:
        """The axes of the sweep that the arms came of, by name their values; empty without a sweep."""
        found: dict[str, dict[Any, None]] = {}
        for point in self.points.values():
            for name, value in point.items():
                found.setdefault(name, {})[value] = None
        return {name: list(values) for name, values in found.items()}

    def with_seeds(self, seeds: int | Sequence[int]) -> "ExperimentConfig":
        """Returns the experiment with other seeds; a number n means 0 to n - 1."""
        return self.select(seeds=range(seeds) if isinstance(seeds, int) else seeds)

    def _with_words(self, words: tuple[str, ...]) -> "ExperimentConfig":
        """Returns the experiment, knowing the command it came from."""
        self._words = words
        return self


_RENUMBERED = {("claims",), ("seeds",)}
"""What `select` takes items from, so that the remaining ones stand elsewhere than they were written."""


def _refuse_twice(seeds: tuple[int, ...], written: Tree) -> None:
    """Raises if a seed is listed twice: it would count twice in every interval."""
    for i, seed in enumerate(seeds):
        if seed in seeds[:i]:
            raise LocatedError(_say(written, ("seeds", i), f"seed {seed} is listed twice."))


def _refuse_metric(metric: str, known: set[str], place: Place) -> None:
    """Raises if a metric is not logged."""
    if metric not in known:
        raise LocatedError(place.say(f"no metric {metric!r}{suggestion(metric, known, what='metrics')}"))


def _step_of(written: Tree, claim: Keys, keys: Keys) -> Keys:
    """Returns the path of the step, or the steps, of a term of a claim, whose arm stands under `keys`."""
    own = [(*claim, *keys[:-1], "at"), (*claim, *keys[:-1], "steps"), (*claim, *keys[:-2], "steps"), (*claim, "at")]
    return next((path for path in own if path in written.places), (*claim, *keys))


def _place(written: Tree, keys: Keys) -> Place:
    """Returns where something was written; what Python gave has a path and no line."""
    return written.place(keys) if keys[:1] in written.places else Place("", None, keys)


def _say(written: Tree, keys: Keys, message: str) -> str:
    """Returns one line about the value under a path."""
    return _place(written, keys).say(message)


def _lists(value: Any) -> Any:
    """Returns plain data with lists for tuples, as YAML has them."""
    if isinstance(value, BaseModel):
        return _lists(value.model_dump(mode="python", exclude_unset=True))
    if isinstance(value, Mapping):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, list | tuple) else value

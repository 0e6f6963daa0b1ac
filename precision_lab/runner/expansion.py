"""From axes to arms: every combination of the steps of a sweep is an arm with a name that says what it is.

Given arms multiply with the axes: `float16` under `lr` becomes `float16,lr=0.001` and `float16,lr=0.003`. A claim that
names a given arm is judged at every combination, and an arm that starts from a given one starts from it at its own
combination; both may also name an arm that came of the sweep.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from precision_lab.runner.axes import Axis, Step, read_axes
from precision_lab.runner.explain import LocatedError
from precision_lab.runner.resolve import BASE_KEYS, TAGGED_KEYS
from precision_lab.runner.tree import Tree, merge, spell_out_kinds, suggestion
from precision_lab.runner.yaml12 import Keys, Place
from precision_lab.training import ProbeRun, RunConfig

MOST_ARMS = 10_000
IMPLICIT_ARM = "run"
"""The one arm of an experiment that gives none; it adds nothing to the names of a sweep."""

_CLAIM_TERMS = frozenset({"a", "b", "reference", "arm", "arms"})
"""Keys of a claim whose texts are names of arms."""


@dataclass(frozen=True)
class _Arm:
    """One arm of an expanded sweep."""

    name: str
    given: str
    steps: tuple[Step, ...]

    def point(self, *, alone: bool) -> dict[str, Any]:
        """Returns the value of each axis, and the given arm where there are several."""
        own = {} if alone else {"base": self.given}
        return {**own, **{name: value for step in self.steps for name, value in step.point.items()}}

    def matches(self, condition: Mapping[str, Any]) -> bool:
        """Returns whether all that a condition says is true of the arm."""
        return all(
            self.given in (wanted if isinstance(wanted, list) else [wanted])
            if key == "arm"
            else any(step.matches(key, wanted) for step in self.steps)
            for key, wanted in condition.items()
        )


_Names = Mapping[tuple[str, tuple[Step, ...]], str]
"""The names of arms, by the given arm and the steps that they came of."""


def expand(tree: Tree) -> Tree:
    """Returns a whole experiment with the arms that its `sweep` makes in the place of `sweep`.

    What the arms came from is kept in `points` (by arm, the value of each axis) and `max_trials`.

    Raises:
      LocatedError: one line about the first thing that is wrong with the sweep.
    """
    if not isinstance(tree.data, dict) or "sweep" not in tree.data:
        return tree
    sweep = Tree({}, {(): tree.place(("sweep",))}) if tree.data["sweep"] is None else tree.at("sweep")
    axes = read_axes(sweep, BASE_KEYS)
    rest = _without_sweep(tree)
    given = _given_arms(rest)
    if not axes or given is None:
        return _with_limit(rest, sweep)
    _refuse_misfits(given, axes, rest)
    arms = _combinations(given, axes, sweep)
    kept = [arm for arm in arms if not any(arm.matches(one) for one in _conditions(sweep, arms))]
    if not kept:
        raise LocatedError(sweep.place(("exclude",)).say("excludes every combination."))
    return _with_limit(_rebuilt(rest, given, kept, axes, sweep), sweep)


def _without_sweep(tree: Tree) -> Tree:
    """Returns the tree without its sweep."""
    data = {key: value for key, value in tree.data.items() if key != "sweep"}
    return Tree(data, {keys: place for keys, place in tree.places.items() if keys[:1] != ("sweep",)}, tree.inherited)


def _with_limit(rest: Tree, sweep: Tree) -> Tree:
    """Returns the tree with the sweep's `max_trials` beside the arms."""
    if "max_trials" not in sweep.data:
        return rest
    place = sweep.place(("max_trials",))
    return Tree({**rest.data, "max_trials": sweep.data["max_trials"]}, {**rest.places, ("max_trials",): place},
                rest.inherited)  # fmt: skip


def _given_arms(tree: Tree) -> dict[str, Tree] | None:
    """Returns the arms that are given, None where what stands there is none and validation will say so."""
    arms = tree.data.get("arms")
    if arms in (None, {}, {IMPLICIT_ARM: {}}, {IMPLICIT_ARM: None}):
        return {IMPLICIT_ARM: Tree({}, {})}
    if not isinstance(arms, Mapping) or not all(
        change is None or isinstance(change, Mapping) for change in arms.values()
    ):
        return None
    return {
        name: Tree({}, {(): tree.place(("arms", name))}) if change is None else
        spell_out_kinds(tree.at("arms", name), TAGGED_KEYS)
        for name, change in arms.items()
    }  # fmt: skip


def _refuse_misfits(given: Mapping[str, Tree], axes: Sequence[Axis], rest: Tree) -> None:
    """Raises if an axis sets what a probe has not in an arm that is one, or the probe of an arm that has none."""
    for arm, tree in given.items():
        touching = [axis for axis in axes if axis.touches(arm)]
        made = any(key in ("probe", "probe.kind") for axis in touching for key in axis.keys)
        probe = made or "probe" in tree.data or "probe" in rest.data
        for place, key in ((axis.place, key) for axis in touching for key in axis.keys):
            first = key.partition(".")[0]
            if first not in (ProbeRun if probe else RunConfig).model_fields:
                others = "" if len(given) == 1 else "; 'arms' under the axis keeps it to some of the arms"
                what = "a probe" if probe else "a training"
                raise LocatedError(place.say(f"arm {arm!r} is {what}, which has no {first}{others}."))


def _combinations(given: Mapping[str, Tree], axes: Sequence[Axis], sweep: Tree) -> list[_Arm]:
    """Returns every given arm with every combination of the steps of the axes that multiply it."""
    for axis in axes:
        for arm in sorted(axis.arms or ()):
            if arm not in given:
                raise LocatedError(axis.place.say(f"arms: no arm {arm!r}{suggestion(arm, given, what='arms')}"))
    count = sum(math.prod(len(axis.steps) for axis in axes if axis.touches(arm)) for arm in given)
    if count > MOST_ARMS:
        raise LocatedError(sweep.place(()).say(f"{count} combinations, more than {MOST_ARMS}; make axes shorter."))
    return [_Arm(_name(given, arm, steps), arm, steps) for arm in given for steps in _product(axes, [arm])]


def _product(axes: Sequence[Axis], arms: Iterable[str]) -> Iterator[tuple[Step, ...]]:
    """Yields every combination of the axes that multiply one of some arms, the last axis changing fastest."""
    arms = list(arms)
    return itertools.product(*(axis.steps for axis in axes if any(axis.touches(arm) for arm in arms)))


def _name(given: Mapping[str, Tree], arm: str, steps: Sequence[Step]) -> str:
    """Returns the name of an arm: the given one where there are several or it has a name, and the steps."""
    parts = [] if list(given) == [IMPLICIT_ARM] else [arm]
    return ",".join([*parts, *(step.label for step in steps)]) or arm


def _conditions(sweep: Tree, arms: Sequence[_Arm]) -> list[Mapping[str, Any]]:
    """Returns what is excluded, after making sure that each condition speaks of axes there are.

    One that no combination meets is no mistake: a preset or `--axis` may have taken the value away.
    """
    conditions = sweep.data.get("exclude") or []
    if not isinstance(conditions, list):
        raise LocatedError(sweep.place(("exclude",)).say(f"expected a list of conditions, got {conditions!r}."))
    known = {"arm", *(key for arm in arms for step in arm.steps for key in (*step.point, *step.values))}
    for i, condition in enumerate(conditions):
        place = sweep.place(("exclude", i))
        if not isinstance(condition, Mapping) or not condition:
            raise LocatedError(place.say(f"a condition is a mapping such as {{bits: 2, lr: 1e-3}}, got {condition!r}."))
        for key in condition:
            if key not in known:
                raise LocatedError(place.say(f"no axis {key!r}{suggestion(key, known, what='axes')}"))
    return conditions


def _rebuilt(rest: Tree, given: Mapping[str, Tree], arms: Sequence[_Arm], axes: Sequence[Axis], sweep: Tree) -> Tree:
    """Returns the tree with its new arms, their points, the claims about them and the baseline."""
    places: dict[Keys, Place] = {keys: place for keys, place in rest.places.items() if keys[:1] != ("arms",)}
    inherited: set[Keys] = {keys for keys in rest.inherited if keys[:1] != ("arms",)}
    changes: dict[str, Any] = {}
    names = _names(arms)
    for arm in arms:
        made = _with_start(_with_steps(given[arm.given], arm.steps, sweep.place(())), arm, names, axes, rest)
        changes[arm.name] = made.data
        places |= {("arms", arm.name, *keys): place for keys, place in made.places.items()}
        inherited |= {("arms", arm.name, *keys) for keys in made.inherited}
    if len(changes) < len(arms):
        twice = next(arm.name for i, arm in enumerate(arms) if arm.name in [one.name for one in arms[:i]])
        raise LocatedError(sweep.place(()).say(f"two arms would be called {twice!r}; name values by 'labels'."))
    alone = len(given) == 1
    earlier = rest.data.get("points") or {}
    points = {arm.name: {**earlier.get(arm.given, {}), **arm.point(alone=alone or bool(earlier))} for arm in arms}
    data = {**rest.data, "arms": changes, "points": {arm: point for arm, point in points.items() if point}}
    return _with_baseline(_with_claims(Tree(data, places, frozenset(inherited)), arms, axes), arms)


def _with_steps(arm: Tree, steps: Sequence[Step], place: Place) -> Tree:
    """Returns an arm that is also given the values of its steps."""
    if steps:
        arm = Tree(arm.data, {**arm.places, (): place}, arm.inherited)
    for step in steps:
        for key, value in step.values.items():
            arm = merge(arm, spell_out_kinds(_nested(tuple(key.split(".")), value), TAGGED_KEYS))
    return arm


def _nested(keys: Keys, value: Tree) -> Tree:
    """Returns a value under a dotted key."""
    data = value.data
    for key in reversed(keys):
        data = {key: data}
    places = {keys[:end]: value.place(()) for end in range(1, len(keys))}
    return Tree(data, {**places, **{(*keys, *path): place for path, place in value.places.items()}})


def _with_start(made: Tree, arm: _Arm, names: _Names, axes: Sequence[Axis], rest: Tree) -> Tree:
    """Returns an arm that starts from what the arm that it names became at the same combination."""
    own = "start" in made.data
    start = (made if own else rest).data.get("start")
    above = start.get("arm") if isinstance(start, Mapping) else None
    became = {steps: name for (given, steps), name in names.items() if given == above and steps}
    if not became:
        return made
    place = (made if own else rest).place(("start", "arm"))
    steps = _own_steps(arm.steps, axes, str(above))
    if steps not in became:
        there = suggestion("", became.values(), what="arms")
        raise LocatedError(
            place.say(f"the sweep made several of arm {above!r}, of which {arm.name!r} starts from one{there}")
        )
    start = {**start, "arm": became[steps]} if own else {"arm": became[steps]}
    return Tree({**made.data, "start": start}, {**made.places, ("start", "arm"): place}, made.inherited)


def _with_baseline(tree: Tree, arms: Sequence[_Arm]) -> Tree:
    """Returns the tree with a baseline among its arms: of a given one, the first that came of it."""
    baseline = tree.data.get("baseline")
    if not baseline or baseline in tree.data["arms"]:
        return tree
    first = next((arm.name for arm in arms if arm.given == baseline), baseline)
    return Tree({**tree.data, "baseline": first}, tree.places, tree.inherited)


def _with_claims(tree: Tree, arms: Sequence[_Arm], axes: Sequence[Axis]) -> Tree:
    """Returns the tree with each claim about given arms repeated for every combination of what multiplied them."""
    claims = tree.data.get("claims")
    if not isinstance(claims, list):
        return tree
    names = _names(arms)
    multiplied = {given for given, steps in names if steps}
    repeated: list[Any] = []
    places = {keys: place for keys, place in tree.places.items() if keys[:1] != ("claims",) or len(keys) == 1}
    for i, claim in enumerate(claims):
        for copy in _copies(claim, multiplied, names, axes):
            own = {keys: place for keys, place in tree.places.items() if keys[:2] == ("claims", i)}
            places |= {("claims", len(repeated), *keys[2:]): place for keys, place in own.items()}
            repeated.append(copy)
    return Tree({**tree.data, "claims": repeated}, places, tree.inherited)


def _names(arms: Sequence[_Arm]) -> _Names:
    """Returns the names of arms by what they came of."""
    return {(arm.given, arm.steps): arm.name for arm in arms}


def _own_steps(steps: Sequence[Step], axes: Sequence[Axis], arm: str) -> tuple[Step, ...]:
    """Returns the steps that are of axes which multiply an arm."""
    return tuple(step for step in steps if any(step in axis.steps for axis in axes if axis.touches(arm)))


def _copies(claim: Any, multiplied: set[str], names: _Names, axes: Sequence[Axis]) -> Iterator[Any]:
    """Yields a claim for every combination of the axes that multiply its arms, or just itself."""
    named = set(_arms_in(claim)) & multiplied
    if not named:
        yield claim
        return
    for steps in _product(axes, named):
        own = {arm: _own_steps(steps, axes, arm) for arm in named}
        if all((arm, own[arm]) in names for arm in named):
            copy = _renamed(claim, {arm: names[arm, own[arm]] for arm in named})
            if copy.get("say"):
                copy["say"] = f"{copy['say']} ({', '.join(step.label for step in steps)})"
            yield copy


def _arms_in(claim: Any, key: str = "") -> Iterator[str]:
    """Yields every text of a claim that is the name of an arm."""
    if isinstance(claim, Mapping):
        for name, value in claim.items():
            yield from _arms_in(value, name)
    elif isinstance(claim, list):
        for item in claim:
            yield from _arms_in(item, key)
    elif isinstance(claim, str) and key in _CLAIM_TERMS:
        yield claim


def _renamed(claim: Any, names: Mapping[str, str], key: str = "") -> Any:
    """Returns a claim about other arms."""
    if isinstance(claim, Mapping):
        return {name: _renamed(value, names, name) for name, value in claim.items()}
    if isinstance(claim, list):
        return [_renamed(item, names, key) for item in claim]
    return names.get(claim, claim) if isinstance(claim, str) and key in _CLAIM_TERMS else claim

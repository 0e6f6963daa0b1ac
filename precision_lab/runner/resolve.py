"""From the text of an experiment to its runs: base, arms and seeds become validated run configurations."""

from collections.abc import Mapping
from typing import Any

from precision_lab.runner.explain import LocatedError, known_keys, mistakes, stale, validate
from precision_lab.runner.starts import with_parents
from precision_lab.runner.tree import Tree, from_python, merge, spell_out_kinds
from precision_lab.runner.yaml12 import Keys, Place
from precision_lab.training import AnyRun, ProbeRun, RunConfig

Runs = Mapping[str, Mapping[int, AnyRun]]
"""The runs of an experiment, by arm and then by seed."""

BASE_KEYS = tuple(name for cls in (RunConfig, ProbeRun) for name in cls.model_fields if name != "seed")
"""What may stand at the top level of an experiment and in an arm; seeds are listed once, in `seeds`."""


TAGGED_KEYS = tuple(
    name for name in BASE_KEYS if any("kind" in known_keys(cls, (name,), {}) for cls in (RunConfig, ProbeRun))
)
"""Keys whose value is one of several kinds; the kind alone may stand for it, as in `loss_scale: dynamic`."""


def run_class(data: Any) -> type[RunConfig] | type[ProbeRun]:
    """Returns what validates a run: a probe where there is one, else a training."""
    return ProbeRun if isinstance(data, Mapping) and "probe" in data else RunConfig


def validate_run(data: Any, places: Mapping[Keys, Place], *, source: str) -> AnyRun:
    """Returns the run configuration that a resolved `config.yaml` holds."""
    if not isinstance(data, dict):
        raise LocatedError(f"{source}: a run's configuration is a mapping of keys to values.")
    return validate(run_class(data), Tree(data, places))


def resolve(base: Tree, arms: Mapping[str, Tree], seeds: tuple[int, ...]) -> dict[str, dict[int, AnyRun]]:
    """Returns the run of every arm and seed.

    Args:
      base: the keys that all arms share.
      arms: by name, what differs.
      seeds: one run of each arm for each seed.

    Raises:
      LocatedError: one line about the first arm that is not a valid run.
    """
    runs: dict[str, AnyRun] = {}
    for name, arm in arms.items():
        if isinstance(arm.data, dict) and "seed" in arm.data:
            raise LocatedError(arm.place(("seed",)).say("an arm has no seed of its own; list them in 'seeds'."))
        runs[name] = _resolve_arm(base, name, arm)

    def refuse(arm: str, key: str, message: str) -> LocatedError:
        return LocatedError(
            merge(base, arms[arm]).place(("start", key)).say(f"{message.rstrip('.')} (in arm {arm!r}).")
        )

    return with_parents(runs, seeds, refuse)


def prune(tree: Tree) -> Tree:
    """Returns the tree of a whole experiment without the keys that a preset or a setting left behind.

    `--set optim.kind=sgd` over an Adam leaves Adam's `b1` in place; here it goes, in the base and in every arm.
    """
    base = _base_of(tree)
    tree = tree.without(stale(run_class(base.data), base))
    arms = tree.data.get("arms")
    for name, change in arms.items() if isinstance(arms, Mapping) else ():
        if isinstance(change, Mapping):
            arm = tree.at("arms", name)
            merged = _merged(_base_of(tree), arm)
            gone = stale(run_class(merged.data), merged) & arm.inherited
            tree = tree.without(("arms", name, *keys) for keys in gone)
    return tree


def _base_of(tree: Tree) -> Tree:
    """Returns what all arms of a whole experiment share."""
    base = Tree({key: value for key, value in tree.data.items() if key in BASE_KEYS}, tree.places, tree.inherited)
    return spell_out_kinds(base, TAGGED_KEYS)


def _merged(base: Tree, arm: Tree) -> Tree:
    """Returns the base with what an arm changes; of a training nothing is left in an arm that is a probe."""
    if run_class(arm.data) is ProbeRun and run_class(base.data) is RunConfig:
        base = base.without((key,) for key in base.data)
    return merge(base, arm)


def _resolve_arm(base: Tree, name: str, arm: Tree) -> AnyRun:
    """Returns the run of one arm, whatever its seed."""
    if arm.data is None:  # `float32:` with nothing after it changes nothing.
        arm = Tree({}, arm.places)
    if not isinstance(arm.data, dict):
        raise LocatedError(arm.place(()).say(f"an arm is a mapping of what it changes, got {arm.data!r}."))
    merged = _merged(base, arm)
    cls = run_class(merged.data)
    try:
        return validate(cls, merged)
    except LocatedError:
        if not arm.data or mistakes(cls, merged) & mistakes(cls, base):
            raise
    _refuse_arm(name, Tree(merged.data, {**merged.places, (): arm.place(())}, merged.inherited))
    raise AssertionError("an arm was invalid and then valid")


def _refuse_arm(name: str, merged: Tree) -> None:
    """Raises for an arm that breaks a valid base; what concerns the run as a whole is said of the arm."""
    try:
        validate(run_class(merged.data), merged)
    except LocatedError as error:
        told = f"arms.{name}" in str(error)
        raise error if told else LocatedError(f"{str(error).rstrip('.')} (in arm {name!r}).") from None


def base_and_arms(
    base: Mapping[str, Any], arms: Mapping[str, Any], places: Mapping[Keys, Place]
) -> tuple[Tree, dict[str, Tree]]:
    """Returns the shared keys and the arms as trees; what has no place counts as written in Python."""
    whole = from_python({**base, "arms": arms})
    tree = Tree(whole.data, {**whole.places, **places})
    shared = Tree(
        {key: value for key, value in tree.data.items() if key != "arms"},
        {path: place for path, place in tree.places.items() if path[:1] != ("arms",)},
    )
    changes = {name: spell_out_kinds(tree.at("arms", name), TAGGED_KEYS) for name in arms}
    return spell_out_kinds(shared, TAGGED_KEYS), changes

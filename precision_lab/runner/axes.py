"""Axes of a sweep, as data: what `sweep:`, `--axis` and `.axis()` say, before it becomes arms.

    sweep:
      bits: {axis: {policy: ["weight=int2@channel", "weight=int4@channel"]}, labels: [2, 4]}
      size: {axis: {model.width: [64, 128], train.steps: [100, 200]}, mode: zip}
      optim.lr: [1e-3, 3e-3]
      exclude: [{bits: 2, lr: 3e-3}]
      max_trials: 20

Axes multiply. Within one axis the keys multiply too (`grid`), or go hand in hand (`zip`). A name with a list is an axis
over the key of that name. `arms:` within an axis keeps it to some of the given arms.
"""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from precision_lab.runner.explain import LocatedError
from precision_lab.runner.identity import digest, policy_name
from precision_lab.runner.tree import Tree, from_python, suggestion
from precision_lab.runner.yaml12 import Keys, Place, parse

RESERVED = ("exclude", "max_trials")
_AXIS_KEYS = ("axis", "mode", "labels", "arms")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@+-]*")
_LONGEST = 48


@dataclass(frozen=True, eq=False)
class Step:
    """One value of an axis.

    Attributes:
      label: as arms are named by it: `lr=0.001`.
      point: by name of the axis, the value; its label where the value is no single number or word.
      texts: by name of the axis, what an `exclude` may call the value.
      values: by dotted key, what the arm is given.
    """

    label: str
    point: Mapping[str, Any]
    texts: Mapping[str, str]
    values: Mapping[str, Tree]

    def matches(self, key: str, wanted: Any) -> bool:
        """Returns whether the value of an axis, or of a dotted key, is the wanted one or in the wanted list."""
        known = [tree.data for dotted, tree in self.values.items() if dotted == key]
        known += [names[key] for names in (self.point, self.texts) if key in names]
        return any(one == item for one in known for item in (wanted if isinstance(wanted, list) else [wanted]))


@dataclass(frozen=True)
class Axis:
    """Steps that exclude one another; `arms` are those that it multiplies, None for all of them."""

    name: str
    place: Place
    steps: tuple[Step, ...]
    arms: frozenset[str] | None = None
    keys: tuple[str, ...] = field(default=())

    def touches(self, arm: str) -> bool:
        """Returns whether the axis multiplies an arm."""
        return self.arms is None or arm in self.arms


def read_axes(sweep: Tree, known: Iterable[str]) -> list[Axis]:
    """Returns the axes of a `sweep`, in order; one of several keys in a grid gives an axis for each key.

    Args:
      sweep: the mapping under `sweep`.
      known: what an axis may change: the top-level keys of a run.

    Raises:
      LocatedError: an axis that is not written as above, or a key that two axes set.
    """
    if not isinstance(sweep.data, Mapping):
        raise LocatedError(sweep.place(()).say(f"a mapping of axes by name, got {sweep.data!r}."))
    axes = [axis for name in sweep.data if name not in RESERVED for axis in _read_axis(name, sweep, list(known))]
    for i, axis in enumerate(axes):
        for other in axes[:i]:
            _refuse_overlap(axis, other)
    return axes


def _refuse_overlap(axis: Axis, other: Axis) -> None:
    """Raises if two axes that multiply the same arm have one name, or set one key."""
    if axis.name == other.name:
        raise LocatedError(axis.place.say(f"two axes are called {axis.name!r}; give one of them another name."))
    apart = axis.arms is not None and other.arms is not None and not axis.arms & other.arms
    for key, taken in itertools.product(axis.keys, other.keys):
        if not apart and f"{key}.".startswith(f"{taken}.") | f"{taken}.".startswith(f"{key}."):
            raise LocatedError(axis.place.say(f"{key} is set by the axis {other.name!r} already."))


def _read_axis(name: str, sweep: Tree, known: Sequence[str]) -> list[Axis]:
    """Returns what one entry of a sweep says."""
    tree, place = sweep.at(name), sweep.place((name,))
    if isinstance(tree.data, list):
        tree = _short(name, tree)
    if not isinstance(tree.data, Mapping) or not isinstance(tree.data.get("axis"), Mapping) or not tree.data["axis"]:
        raise LocatedError(place.say(f"an axis is a list of values, or {{axis: {{key: [...]}}}}; got {tree.data!r}."))
    for key in tree.data:
        if key not in _AXIS_KEYS:
            raise LocatedError(tree.place((key,)).say(f"unknown key{suggestion(key, _AXIS_KEYS)}"))
    columns = {key: _values(key, tree.at("axis", key), tree.place(("axis", key)), known) for key in tree.data["axis"]}
    name = _short_names(columns)[name] if [name] == list(columns) else name
    if not _NAME.fullmatch(name) or name in ("arm", "base"):
        raise LocatedError(place.say(f"{name!r} cannot be the name of an axis, since it becomes part of arms' names."))
    arms = _arms(tree)
    mode = tree.data.get("mode", "grid")
    if mode not in ("grid", "zip"):
        raise LocatedError(tree.place(("mode",)).say(f"unknown value {mode!r}{suggestion(str(mode), ['grid', 'zip'])}"))
    if mode == "zip" or len(columns) == 1:
        return [Axis(name, place, _steps(name, columns, tree), arms, tuple(columns))]
    if "labels" in tree.data:
        raise LocatedError(tree.place(("labels",)).say("labels are for an axis of one key, or of mode zip."))
    names = _short_names(columns)
    return [Axis(names[key], place, _steps(names[key], {key: values}, tree), arms, (key,))
            for key, values in columns.items()]  # fmt: skip


def _short(name: str, values: Tree) -> Tree:
    """Returns `optim.lr: [1, 2]` as `{axis: {optim.lr: [1, 2]}}`."""
    places = {("axis", name, *keys): place for keys, place in values.places.items()}
    return Tree({"axis": {name: values.data}}, {(): values.place(()), **places})


def _short_names(keys: Iterable[str]) -> dict[str, str]:
    """Returns the last word of each dotted key, the whole key where that is not enough."""
    keys = list(keys)
    last = [key.rpartition(".")[2] for key in keys]
    return {key: word if last.count(word) == 1 else key for key, word in zip(keys, last, strict=True)}


def _values(key: str, values: Tree, place: Place, known: Sequence[str]) -> list[Tree]:
    """Returns the values that a key takes."""
    first = key.partition(".")[0]
    if first in ("seed", "seeds"):
        raise LocatedError(place.say("seeds are no axis; list them in 'seeds', or after --seeds."))
    if first not in known:
        raise LocatedError(place.say(f"unknown key{suggestion(first, known)}"))
    if not all(key.split(".")):
        raise LocatedError(place.say("expected a dotted key such as optim.lr."))
    if not isinstance(values.data, list) or not values.data:
        raise LocatedError(place.say(f"expected a list of values, got {values.data!r}."))
    for i, value in enumerate(values.data):
        if value in values.data[:i]:
            raise LocatedError(values.place((i,)).say(f"{value!r} is listed twice."))
    return [values.at(i) for i in range(len(values.data))]


def _arms(tree: Tree) -> frozenset[str] | None:
    """Returns the arms that an axis is kept to, None for all."""
    arms = tree.data.get("arms")
    if arms is not None and not (isinstance(arms, list) and arms and all(isinstance(arm, str) for arm in arms)):
        raise LocatedError(tree.place(("arms",)).say(f"expected a list of arms, got {arms!r}."))
    return None if arms is None else frozenset(arms)


def _steps(name: str, columns: Mapping[str, Sequence[Tree]], tree: Tree) -> tuple[Step, ...]:
    """Returns the steps of one axis, whose keys go hand in hand."""
    lengths = {key: len(values) for key, values in columns.items()}
    if len(set(lengths.values())) > 1:
        told = ", ".join(f"{key} {length}" for key, length in lengths.items())
        raise LocatedError(tree.place(("axis",)).say(f"zipped keys need equally many values; there are {told}."))
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    texts = _labels(tree, len(rows)) or ["+".join(text_of(one.data) for one in row.values()) for row in rows]
    for i, text in enumerate(texts):
        if text in texts[:i]:
            raise LocatedError(tree.place(("axis",)).say(f"two values are called {text!r}; name them by 'labels'."))
    return tuple(
        Step(f"{name}={text}", {name: _scalar(row, text, named="labels" in tree.data)}, {name: text}, row)
        for row, text in zip(rows, texts, strict=True)
    )


def _labels(tree: Tree, count: int) -> list[str]:
    """Returns the given labels, empty if there are none."""
    labels = tree.data.get("labels")
    if labels is None:
        return []
    place = tree.place(("labels",))
    if not isinstance(labels, list) or len(labels) != count:
        raise LocatedError(place.say(f"expected a list of {count}, one for each value, got {labels!r}."))
    for i, label in enumerate(labels):
        if isinstance(label, list | Mapping) or text_of(label) != _plain_text(label):
            raise LocatedError(tree.place(("labels", i)).say(f"{label!r} cannot be part of a name."))
    return [text_of(label) for label in labels]


def _scalar(row: Mapping[str, Tree], text: str, *, named: bool) -> Any:
    """Returns the value itself if it is one number or word, else what it is called; numbers stay numbers."""
    if named or len(row) > 1:
        number = parse(text, "label")[0] if re.fullmatch(r"[-+0-9.e]+", text) else text
        return number if isinstance(number, int | float) else text
    value = next(iter(row.values())).data
    return value if isinstance(value, bool | int | float | str) else text


def text_of(value: Any) -> str:
    """Returns a value as a short text that may be part of a name: `0.001`, `int4@channel`, `128x128`."""
    if isinstance(value, Mapping):
        parts = [str(value["kind"])] if "kind" in value else []
        parts += [f"{key}{text_of(item)}" for key, item in value.items() if key != "kind"]
        text = "+".join(parts)
    elif isinstance(value, list | tuple):
        text = "x".join(text_of(item) for item in value)
    else:
        text = _plain_text(value)
    safe = re.sub(r"[^A-Za-z0-9_.@+-]+", "+", re.sub(r"\b\w+=", "", policy_name(text))).strip("+.") or "none"
    return safe if len(safe) <= _LONGEST else f"{safe[: _LONGEST - 9]}-{digest(text)[:8]}"


def _plain_text(value: Any) -> str:
    """Returns a scalar as YAML writes it."""
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else "none" if value is None else str(value)


def from_option(text: str) -> tuple[str, Tree]:
    """Returns the key and the values of one `--axis optim.lr=1e-3,3e-3`.

    The values are a YAML list without its brackets: a value with commas stands in quotes, or in brackets if it is a
    list. A list in brackets may also be given as such.

    Raises:
      LocatedError: there is no `=`, no key before it, or no value after it.
    """
    name, equals, listed = text.partition("=")
    if not equals or not name.strip() or not listed.strip():
        message = "expected key=value,value with a dotted key, such as --axis optim.lr=1e-3,3e-3."
        raise LocatedError(f"--axis {text!r}: {message}")
    values, _ = parse(f"[{listed}]", f"--axis {text}")
    if len(values) == 1 and isinstance(values[0], list):
        values = values[0]
    return name.strip(), values_tree(name.strip(), values, "--axis")


def values_tree(key: str, values: Sequence[Any], source: str) -> Tree:
    """Returns the values of an axis, each with a place that names the key."""
    tree = from_python(list(values))
    places: dict[Keys, Place] = {keys: Place(source, None, (key, *keys)) for keys in tree.places}
    return Tree(tree.data, places)


def with_axis(tree: Tree, key: str, values: Tree) -> Tree:
    """Returns a whole experiment with one more axis; one of the file's over the same key alone takes the new values."""
    sweep = tree.data.get("sweep") or {}
    if not isinstance(sweep, Mapping):
        raise LocatedError(tree.place(("sweep",)).say(f"a mapping of axes by name, got {sweep!r}."))
    short = key.rpartition(".")[2]
    name = next(
        (name for name, axis in sweep.items() if _keys_of(name, axis) == [key]), key if short in sweep else short
    )
    old = sweep[name] if isinstance(sweep.get(name), Mapping) else {}
    kept = {word: value for word, value in old.items() if word in ("mode", "arms")}
    places: dict[Keys, Place] = {("axis", key, *keys): place for keys, place in values.places.items()}
    entry = Tree({**kept, "axis": {key: values.data}}, {(): values.place(()), **places})
    return with_entry(tree, name, entry)


def with_entry(tree: Tree, name: str, entry: Tree) -> Tree:
    """Returns a whole experiment with one more entry in its sweep, in the place of one of that name."""
    sweep = {**(tree.data.get("sweep") or {}), name: entry.data}
    places = {path: place for path, place in tree.places.items() if path[:2] != ("sweep", name)}
    places |= {("sweep", name, *keys): place for keys, place in entry.places.items()}
    return Tree({**tree.data, "sweep": sweep}, places, tree.inherited)


def axis_entry(
    columns: Mapping[str, Sequence[Any]], name: str, mode: str, labels: Sequence[Any], arms: Sequence[str]
) -> tuple[str, dict[str, Any]]:
    """Returns the name and the entry in `sweep` of an axis that Python gives."""
    rest = {"mode": mode, "labels": list(labels), "arms": list(arms)}
    given = {word: value for word, value in rest.items() if value}
    axis = {
        key: list(values) if isinstance(values, list | tuple | range) else values for key, values in columns.items()
    }
    return name or next(iter(columns), "").rpartition(".")[2], {"axis": axis, **given}


def swept_by(tree: Tree, key: str) -> str:
    """Returns the name of the axis that sets a dotted key, or something around it, in all arms; empty if none does."""
    sweep = tree.data.get("sweep")
    for name, axis in sweep.items() if isinstance(sweep, Mapping) else ():
        own = _keys_of(name, axis) if name not in RESERVED else []
        kept_to = isinstance(axis, Mapping) and "arms" in axis
        if not kept_to and any(f"{key}.".startswith(f"{one}.") for one in own):
            return name
    return ""


def _keys_of(name: str, axis: Any) -> list[str]:
    """Returns the dotted keys that an entry of a sweep sets."""
    keys = axis.get("axis") if isinstance(axis, Mapping) else None
    return list(keys) if isinstance(keys, Mapping) else [name]


def parse_seeds(text: str, where: str = "--seeds") -> list[int]:
    """Returns the seeds of `0,1,2`, of `0..4` (both ends included), or of a mixture.

    Raises:
      ValueError: something else.
    """
    found: list[int] = []
    for part in filter(None, (part.strip() for part in text.split(","))):
        first, dots, last = part.partition("..")
        if not first.isdecimal() or (dots and not last.isdecimal()):
            raise ValueError(f"{where} {text}: expected numbers such as 0,1,2 or a range such as 0..4, got {part!r}.")
        if dots and int(last) < int(first):
            raise ValueError(f"{where} {text}: the range {part!r} runs backwards; write {last}..{first}.")
        if dots and int(last) - int(first) > 100_000:
            raise ValueError(f"{where} {text}: {part!r} is more than 100000 seeds.")
        found += range(int(first), int(last) + 1) if dots else [int(first)]
    if text and not found:
        raise ValueError(f"{where} {text}: no seed in it; expected 0,1,2 or a range such as 0..4.")
    return found

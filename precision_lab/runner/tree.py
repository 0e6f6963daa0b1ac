"""A configuration before validation: plain data that remembers where each key was written.

Bases, presets, arms and `--set` are merged here. Mappings merge key by key; lists and single values replace. Where an
override changes a `kind`, the keys of the old kind stay as long as the new kind has them too (see `explain.validate`).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from precision_lab.runner.yaml12 import Keys, Place, parse, parse_file


@dataclass(frozen=True)
class Tree:
    """Plain data with the place of each key.

    Attributes:
      data: nested mappings, lists and scalars.
      places: where each key and item was written, by its path in `data`.
      inherited: keys kept from another `kind`, to be dropped without a word if the new kind has no such key.
    """

    data: Any
    places: Mapping[Keys, Place] = field(default_factory=dict)
    inherited: frozenset[Keys] = frozenset()

    def place(self, keys: Keys) -> Place:
        """Returns where a key was written, or the nearest thing around it."""
        for end in range(len(keys), -1, -1):
            if keys[:end] in self.places:
                return self.places[keys[:end]]
        return Place("", None, keys)

    def at(self, *keys: str | int) -> "Tree":
        """Returns the part of the tree under `keys`, which must exist."""
        data = self.data
        for key in keys:
            data = data[key]
        n = len(keys)
        places = {path[n:]: place for path, place in self.places.items() if path[:n] == keys}
        inherited = frozenset(path[n:] for path in self.inherited if path[:n] == keys)
        return Tree(data, places, inherited)

    def without(self, drop: Iterable[Keys]) -> "Tree":
        """Returns the tree without some keys."""
        data, drop = self.data, set(drop)
        for keys in drop:
            data = _removed(data, keys)
        places = {path: place for path, place in self.places.items() if path not in drop}
        return Tree(data, places, self.inherited - drop)


def spell_out_kinds(tree: Tree, tagged: Iterable[str]) -> Tree:
    """Returns the tree with `loss_scale: dynamic` written as `loss_scale: {kind: dynamic}`, for the `tagged` keys."""
    if not isinstance(tree.data, dict):
        return tree
    short = [key for key in tagged if isinstance(tree.data.get(key), str)]
    data = {key: {"kind": value} if key in short else value for key, value in tree.data.items()}
    places = {(key, "kind"): tree.place((key,)) for key in short}
    return Tree(data, {**tree.places, **places}, tree.inherited)


def _removed(data: Any, keys: Keys) -> Any:
    """Returns nested data without the key at the end of a path."""
    head, *rest = keys
    if not rest:
        return {key: value for key, value in data.items() if key != head}
    if isinstance(data, list):
        return [_removed(value, tuple(rest)) if i == head else value for i, value in enumerate(data)]
    return {key: _removed(value, tuple(rest)) if key == head else value for key, value in data.items()}


def from_file(path: Path) -> Tree:
    """Returns the tree of a YAML file, whose top level must be a mapping."""
    tree = Tree(*parse_file(path))
    if not isinstance(tree.data, dict):
        raise ValueError(f"{path}: an experiment is a mapping of keys to values, this is {_what(tree.data)}.")
    return tree


def _what(data: Any) -> str:
    """Returns the kind of a value in words."""
    return "empty" if data is None else "a list" if isinstance(data, list) else "a single value"


def from_python(value: Any) -> Tree:
    """Returns the tree of nested Python values; configuration objects become what was given to them."""
    data = _plain(value)
    places: dict[Keys, Place] = {}
    _note_places(data, (), "", places)
    return Tree(data, places)


def _plain(value: Any) -> Any:
    """Returns mappings, lists and scalars; of a model only the fields that were set, and its kind."""
    if isinstance(value, BaseModel):
        given = value.model_fields_set | ({"kind"} & set(type(value).model_fields))
        return {name: _plain(getattr(value, name)) for name in type(value).model_fields if name in given}
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | range):
        return [_plain(item) for item in value]
    return value


def _note_places(data: Any, at: Keys, source: str, places: dict[Keys, Place]) -> None:
    """Notes for every key of plain data that it came from `source`."""
    places[at] = Place(source, None, at)
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        _note_places(value, (*at, key), source, places)


def from_setting(text: str) -> tuple[Keys, Tree]:
    """Returns the path and the value of one `--set a.b=c`; the value is YAML with the scalar rules of a file.

    Raises:
      ValueError: there is no `=`, or no key before it.
    """
    name, equals, value = text.partition("=")
    keys: Keys = tuple(part.strip() for part in name.split("."))
    if not equals or not all(keys):
        raise ValueError(f"--set {text!r}: expected key=value with a dotted key, such as --set optim.lr=1e-3.")
    data, _ = parse(value, f"--set {text}")
    for key in reversed(keys):
        data = {key: data}
    places: dict[Keys, Place] = {}
    _note_places(data, (), "--set", places)
    return keys, Tree(data, places)


def merge(base: Tree, override: Tree) -> Tree:
    """Returns `base` with everything that `override` says."""
    places, inherited = dict(base.places), set(base.inherited)
    data = _merge(base.data, override.data, (), override, places, inherited)
    return Tree(data, places, frozenset(inherited | override.inherited))


def _merge(old: Any, new: Any, at: Keys, override: Tree, places: dict[Keys, Place], inherited: set[Keys]) -> Any:
    """Returns the merged data under `at`, and brings places and inherited keys up to date."""
    if isinstance(old, dict) and isinstance(new, str) and "kind" in old:
        # `loss_scale: dynamic` over a mapping is a change of kind, and `{interval: 50}` over `dynamic` keeps it.
        return _merge(old, {"kind": new}, at, _kind_of(override, at), places, inherited)
    if isinstance(old, str) and isinstance(new, dict) and "kind" not in new:
        old = {"kind": old}
        places[(*at, "kind")] = places.get(at, Place("", None, at))
    if not (isinstance(old, dict) and isinstance(new, dict)):
        _replace_places(at, override, places, inherited)
        return new
    if "kind" in new and new["kind"] != old.get("kind"):
        inherited.update((*at, key) for key in old)
    if at in override.places:
        places.setdefault(at, override.places[at])
    merged = dict(old)
    for key, value in new.items():
        inherited.discard((*at, key))
        merged[key] = _merge(old.get(key), value, (*at, key), override, places, inherited)
        if (*at, key) in override.places:
            places[(*at, key)] = override.places[(*at, key)]
    return merged


def _kind_of(override: Tree, at: Keys) -> Tree:
    """Returns an override whose single value at `at` is the `kind` there."""
    return Tree(override.data, {**override.places, (*at, "kind"): override.place(at)}, override.inherited)


def _replace_places(at: Keys, override: Tree, places: dict[Keys, Place], inherited: set[Keys]) -> None:
    """Forgets the places under `at` and takes those of the override."""
    for path in [path for path in places if path[: len(at)] == at]:
        del places[path]
    places.update({path: place for path, place in override.places.items() if path[: len(at)] == at})
    inherited.difference_update([path for path in inherited if path[: len(at)] == at])


def suggestion(word: str, known: Iterable[str], *, what: str = "") -> str:
    """Returns `; did you mean 'lr'?` for a near miss, else the known words, else nothing."""
    known = sorted(set(known))
    near = get_close_matches(word, known, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    if not known:
        return "."
    return f"; {what or 'known'}: {', '.join(known)}."

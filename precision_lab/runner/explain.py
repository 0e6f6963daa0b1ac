"""Validation whose errors are one line: file, line, dotted path, what is wrong and the nearest right word."""

import re
import typing
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from precision_lab.runner.tree import Tree, suggestion
from precision_lab.runner.yaml12 import Keys

Model = TypeVar("Model", bound=BaseModel)


_EXPECTED = {
    "model_type": "a mapping of keys to values",
    "model_attributes_type": "a mapping of keys to values",
    "dict_type": "a mapping of keys to values",
    "list_type": "a list",
    "tuple_type": "a list",
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "too_short": "more items",
}
"""Pydantic's words for a wrong type, in the words of a config file."""


_NAMES = re.compile(r"\^\[A-Za-z0-9\]\[A-Za-z0-9(.*)-\]\*\$")
"""The pattern of a name, with the signs that it may have."""


class LocatedError(ValueError):
    """A complaint on one line that already says where; nothing is put before it."""

    def __init__(self, message: str) -> None:
        """Keeps the message, its line breaks turned into spaces."""
        super().__init__(" ".join(message.split()))


def validate(cls: type[Model], tree: Tree, *, context: Mapping[str, Any] | None = None) -> Model:
    """Returns `cls` validated from a tree.

    Keys inherited from another `kind` that the new kind does not know are dropped.

    Raises:
      LocatedError: one line about the first mistake, and how many more there are.
    """
    try:
        model, error, tree = _attempt(cls, tree, context)
    except TypeError as wrong:  # A validator that pydantic does not listen to, so that only the document is known.
        raise LocatedError(tree.place(()).say(str(wrong))) from None
    if error is not None:
        raise LocatedError(explain(error, cls, tree))
    return typing.cast(Model, model)


def mistakes(cls: type[BaseModel], tree: Tree) -> set[tuple[Keys, str]]:
    """Returns the path and the kind of every mistake in a tree."""
    try:
        _, error, tree = _attempt(cls, tree, None)
    except TypeError:
        return {((), "type_error")}
    return set() if error is None else set(_mistakes(error, tree))


def stale(cls: type[BaseModel], tree: Tree) -> set[Keys]:
    """Returns the keys kept from another `kind` that the new kind does not know."""
    try:
        _, _, pruned = _attempt(cls, tree, None)
    except TypeError:
        return set()
    return set(tree.inherited - pruned.inherited)


def _attempt(
    cls: type[Model], tree: Tree, context: Mapping[str, Any] | None
) -> tuple[Model | None, ValidationError | None, Tree]:
    """Returns the model or the error, and the tree without the inherited keys that did not fit."""
    while True:
        try:
            return cls.model_validate(tree.data, context=dict(context or {})), None, tree
        except ValidationError as error:
            foreign = {keys for keys, kind in _mistakes(error, tree) if kind == "extra_forbidden"}
            if not tree.inherited & foreign:
                return None, error, tree
            tree = tree.without(tree.inherited & foreign)


def _mistakes(error: ValidationError, tree: Tree) -> list[tuple[Keys, str]]:
    """Returns the path in the tree and pydantic's word for each mistake."""
    return [(_path(one["loc"], tree.data), one["type"]) for one in error.errors(include_url=False)]


def explain(error: ValidationError, cls: type[BaseModel], tree: Tree) -> str:
    """Returns the one line that a person needs about a failed validation.

    The first misspelt key is named before anything else: what is missing is often only misspelt.
    """
    found = error.errors(include_url=False)
    first = next((one for one in found if one["type"] == "extra_forbidden"), found[0])
    cause = first.get("ctx", {}).get("error")
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    if isinstance(cause, LocatedError):
        return f"{cause}{more}"
    keys = _path(first["loc"], tree.data)
    message = _message(first, keys, cls, tree)
    if first["type"] in {"union_tag_invalid", "union_tag_not_found"}:
        keys = (*keys, "kind") if first["type"] == "union_tag_invalid" else keys
    place = tree.place(keys)
    if keys != place.keys and keys not in tree.places:
        # The key itself was not written; name it, at the line of what is around it.
        place = type(place)(place.source, place.line, (*place.keys, *keys[_known_length(tree, keys) :]))
    return place.say(message) + more


def _known_length(tree: Tree, keys: Keys) -> int:
    """Returns how many leading keys of a path were written."""
    return next((end for end in range(len(keys), -1, -1) if keys[:end] in tree.places), 0)


def _path(loc: tuple[int | str, ...], data: Any) -> Keys:
    """Returns a pydantic location without the tags of unions and other words that are no keys of the data."""
    keys: list[str | int] = []
    for position, part in enumerate(part for part in loc if part != "[key]"):
        last = position == len(loc) - 1
        if isinstance(data, Mapping):
            if part in data:
                keys.append(part)
                data = data[part]
            elif last and part != data.get("kind"):
                keys.append(part)
        elif isinstance(data, list | tuple) and isinstance(part, int):
            keys.append(part)
            data = data[part] if part < len(data) else None
    return tuple(keys)


def _message(one: Mapping[str, Any], keys: Keys, cls: type[BaseModel], tree: Tree) -> str:
    """Returns what is wrong with one value, and the way out."""
    kind, context, value = one["type"], one.get("ctx", {}), one.get("input")
    if kind == "extra_forbidden":
        written = getattr(cls, "written_keys", None) if len(keys) == 1 else None
        known = written() if written else known_keys(cls, keys[:-1], tree.data)
        return f"unknown key{suggestion(str(keys[-1]), known)}"
    if kind == "unknown_kind":
        return str(one["msg"])
    if kind == "missing":
        return "required, and missing."
    if kind == "union_tag_invalid":
        tags = [tag.strip(" '\"") for tag in str(context["expected_tags"]).split(",")]
        return f"unknown kind {context['tag']!r}{suggestion(str(context['tag']), tags, what='kinds')}"
    if kind == "union_tag_not_found":
        return f"needs a kind, such as {{kind: ...}}; got {_short(value)}."
    if kind in {"value_error", "assertion_error"}:
        return str(one["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if kind in {"literal_error", "enum"} and isinstance(value, str):
        words = str(context.get("expected", "")).replace(" or ", ", ").split(", ")
        return f"unknown value {value!r}{suggestion(value, [word.strip(chr(39)) for word in words])}"
    if kind in _EXPECTED:
        return f"expected {_EXPECTED[kind]}, got {_short(value)}."
    if kind == "string_pattern_mismatch" and (name := _NAMES.fullmatch(str(context["pattern"]))):
        return f"a name is letters, digits and {name[1]}-, first a letter or digit; got {_short(value)}."
    message = str(one["msg"])
    return f"{message[:1].lower()}{message[1:]}, got {_short(value)}."


def _short(value: Any) -> str:
    """Returns a value as short text."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def known_keys(cls: type[BaseModel], keys: Keys, data: Any) -> list[str]:
    """Returns the keys that may stand under a path, empty where that cannot be told."""
    classes: list[type[BaseModel]] = [cls]
    for key in keys:
        data = _child(data, key)
        annotations = [one.model_fields[key].annotation for one in classes if key in one.model_fields]
        classes = [found for annotation in annotations for found in _models(annotation)] or (
            classes if isinstance(key, int) or not annotations else []
        )
        kind = data.get("kind") if isinstance(data, Mapping) else None
        matching = [one for one in classes if kind is not None and _kind_of(one) == kind]
        classes = matching or classes
    return sorted({name for one in classes for name in one.model_fields})


def _child(data: Any, key: str | int) -> Any:
    """Returns what nested data holds under a key, None where there is nothing."""
    try:
        return data[key]
    except (KeyError, IndexError, TypeError):
        return None


def _kind_of(cls: type[BaseModel]) -> Any:
    """Returns the `kind` a configuration class stands for."""
    return cls.model_fields["kind"].default if "kind" in cls.model_fields else None


def _models(annotation: Any) -> list[type[BaseModel]]:
    """Returns every configuration class that a type annotation allows, registered kinds included."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation, *(found for sub in annotation.__subclasses__() for found in _models(sub))]
    return [found for part in typing.get_args(annotation) for found in _models(part)]

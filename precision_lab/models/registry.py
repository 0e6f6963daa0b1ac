"""Registries: the kinds that a tagged config field may have, and what builds each of them.

A config names what it wants by `kind` (`{kind: mlp, hidden: [128]}`), never by an import path. The registry turns
the mapping into the config class of that kind, and later finds the function that builds the thing. Importing this
module, and validating a config with it, needs no JAX: a builder may be a "module:function" string, imported at
first use.
"""

import dataclasses
import difflib
import importlib
import operator
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ValidationError

from precision_lab.models.fields import located_error

ConfigT = TypeVar("ConfigT", bound=BaseModel)
Builder = Callable[..., Any]


@dataclasses.dataclass(frozen=True)
class _Entry:
    config_cls: type[BaseModel]
    builder: Builder | str


class Registry(Generic[ConfigT]):
    """The kinds of one tagged union, extendable at run time."""

    def __init__(self, noun: str, base: type[ConfigT]) -> None:
        """`noun` names the union in messages; every config class derives from `base`."""
        self._noun = noun
        self._base = base
        self._entries: dict[str, _Entry] = {}

    def register(self, kind: str, config_cls: type[ConfigT], builder: Builder | str) -> None:
        """Adds `kind`, so that configs may name it.

        Args:
          kind: the tag; must be the default of `config_cls`'s field `kind`.
          config_cls: frozen pydantic model derived from the union's base.
          builder: function that takes the config first, or "module:function" to import it at first use.

        Raises:
          TypeError: `config_cls` does not derive from the base.
          ValueError: `kind` is taken by another class, or is not `config_cls`'s tag.
        """
        if not (isinstance(config_cls, type) and issubclass(config_cls, self._base)):
            raise TypeError(f"a {self._noun} config must derive from {self._base.__name__}, got {config_cls!r}.")
        tag = config_cls.model_fields["kind"].default
        if tag != kind:
            raise ValueError(
                f"{self._noun} kind {kind!r}: {config_cls.__name__}.kind is {tag!r}. "
                f'Declare it as `kind: Literal["{kind}"] = "{kind}"`.'
            )
        held = self._entries.get(kind)
        if held is not None and _qualified(held.config_cls) != _qualified(config_cls):
            raise ValueError(f"{self._noun} kind {kind!r} is taken by {_qualified(held.config_cls)}; choose another.")
        self._entries[kind] = _Entry(config_cls, builder)

    def kinds(self) -> list[str]:
        """Returns the registered kinds, sorted."""
        return sorted(self._entries)

    def validate(self, value: Any) -> Any:
        """Returns the config that `value`, a mapping with a `kind` or such a config, stands for.

        Raises:
          ValidationError: located at the offending key, so that a nested field reports its full path.
        """
        if isinstance(value, self._base):
            return value
        if not isinstance(value, dict):
            raise ValueError(f"expected a mapping with a 'kind', one of {', '.join(self.kinds())}")
        kind = value.get("kind")
        if not isinstance(kind, str) or kind not in self._entries:
            raise _unknown_kind(self._noun, kind, self.kinds(), missing="kind" not in value)
        return self._entries[kind].config_cls.model_validate(value)

    def builder(self, config: ConfigT) -> Builder:
        """Returns the function that builds what `config` describes."""
        entry = self._entries[config.kind]  # type: ignore[attr-defined]
        if isinstance(entry.builder, str):
            module, _, name = entry.builder.partition(":")
            return operator.attrgetter(name)(importlib.import_module(module))
        return entry.builder


def _qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _unknown_kind(noun: str, kind: Any, kinds: Iterable[str], *, missing: bool) -> ValidationError:
    """Returns the error for a missing or unknown `kind`, located at the key."""
    listed = ", ".join(kinds)
    if missing:
        return located_error(("kind",), f"a {noun} needs a kind: one of {listed}", kind)
    near = difflib.get_close_matches(str(kind), list(kinds), n=1)
    hint = f" Did you mean '{near[0]}'?" if near else ""
    return located_error(("kind",), f"unknown {noun} kind {kind!r}.{hint} Kinds: {listed}", kind)

"""YAML as people expect it: the scalars of the YAML 1.2 core schema, and a place for every key.

PyYAML reads YAML 1.1, where `off` is false, `010` is eight and `1e-3` is a string. Here `off`, `yes` and `on` stay
strings, `010` is ten and `1e-3` is a number. Duplicate keys and tags are refused, since neither can be meant.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Keys = tuple[str | int, ...]
"""Where a value sits in a document: `("arms", "float32", "policy")`."""

_NULL, _BOOL, _INT, _FLOAT, _STR = (f"tag:yaml.org,2002:{kind}" for kind in ("null", "bool", "int", "float", "str"))
# Source: YAML 1.2.2, section 10.3.2, "Tag resolution" of the core schema.
_SCALARS = [
    (_NULL, re.compile(r"null|Null|NULL|~|"), lambda text: None),
    (_BOOL, re.compile(r"true|True|TRUE"), lambda text: True),
    (_BOOL, re.compile(r"false|False|FALSE"), lambda text: False),
    (_INT, re.compile(r"[-+]?[0-9]+"), lambda text: int(text)),
    (_INT, re.compile(r"0o[0-7]+"), lambda text: int(text[2:], 8)),
    (_INT, re.compile(r"0x[0-9a-fA-F]+"), lambda text: int(text[2:], 16)),
    (_FLOAT, re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"), float),
    (_FLOAT, re.compile(r"[-+]?\.(inf|Inf|INF)"), lambda text: float(text.replace(".", ""))),
    (_FLOAT, re.compile(r"\.(nan|NaN|NAN)"), lambda text: float("nan")),
]


@dataclass(frozen=True)
class Place:
    """Where something was written: a file and a line, or the command-line option."""

    source: str
    line: int | None = None
    keys: Keys = ()

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"

    def say(self, message: str) -> str:
        """Returns one line: where, which key, and what is to be said about it."""
        return ": ".join(part for part in (str(self), dotted(self.keys), message) if part)


def scalar(text: str) -> Any:
    """Returns what a plain (unquoted) scalar means under the core schema."""
    return _resolve(text)[1]


def _resolve(text: str) -> tuple[str, Any]:
    """Returns the tag of a plain scalar and its value."""
    for tag, pattern, convert in _SCALARS:
        if pattern.fullmatch(text):
            return tag, convert(text)
    return _STR, text


class _Loader(yaml.SafeLoader):
    """Composes nodes only; `_read` gives them their values."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 (PyYAML's own attribute)


class _QuickLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """As `_Loader`, through libyaml where PyYAML was built with it: ten times as fast."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 (PyYAML's own attribute)


class _Dumper(yaml.SafeDumper):
    """Quotes exactly those strings that `scalar` would read as something else."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012 (PyYAML's own attribute)

    def ignore_aliases(self, data: Any) -> bool:
        return True


for _tag, _pattern, _ in _SCALARS:
    _Dumper.add_implicit_resolver(_tag, re.compile(rf"(?:{_pattern.pattern})\Z"), None)  # type: ignore[arg-type]


def _float_text(value: float) -> str:
    """Returns the shortest text that reads back as the same float."""
    text = repr(value)
    return {"inf": ".inf", "-inf": "-.inf", "nan": ".nan"}.get(text, text)


def _represent_text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    """Returns text of several lines as a block, all other text in the shortest safe form."""
    odd = any(char != "\n" and not char.isprintable() for char in value)
    return dumper.represent_scalar(_STR, value, style='"' if odd else "|" if "\n" in value else None)


_Dumper.add_representer(float, lambda dumper, value: dumper.represent_scalar(_FLOAT, _float_text(value)))
_Dumper.add_representer(str, _represent_text)


def parse(text: str, source: str) -> tuple[Any, dict[Keys, Place]]:
    """Returns the value of a YAML document and the place of each of its keys and items.

    Args:
      text: one YAML document.
      source: name used in places and errors, normally the file's path.

    Raises:
      ValueError: not YAML, a duplicate key, a tag, a merge key, or an alias that contains itself.
    """
    try:
        node = _composed(text)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = Place(source, mark.line + 1 if mark else None)
        raise ValueError(f"{place}: not valid YAML: {error.problem or error.context}.") from None
    except yaml.YAMLError as error:
        raise ValueError(f"{source}: not valid YAML: {' '.join(str(error).split())}.") from None
    # What concerns the document as a whole is at no line of it.
    places: dict[Keys, Place] = {(): Place(source)}
    value = None if node is None else _read(node, (), source, places, ())
    return value, places


def _composed(text: str) -> yaml.Node | None:
    """Returns the nodes of a document; what libyaml refuses is left to PyYAML, whose messages say more."""
    try:
        return yaml.compose(text, Loader=_QuickLoader)
    except yaml.YAMLError:
        return yaml.compose(text, Loader=_Loader)


def parse_file(path: Path) -> tuple[Any, dict[Keys, Place]]:
    """Returns the value and the places of a UTF-8 YAML file."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a UTF-8 text file (byte {error.start}).") from None
    return parse(text, str(path))


def _read(node: yaml.Node, at: Keys, source: str, places: dict[Keys, Place], inside: tuple[yaml.Node, ...]) -> Any:
    """Returns the value of one node, noting the places of what it holds."""
    place = Place(source, node.start_mark.line + 1, at)
    places.setdefault(at, place)
    if any(node is outer for outer in inside):
        raise ValueError(f"{place}: an alias that contains itself.")
    inside = (*inside, node)
    if isinstance(node, yaml.MappingNode):
        return _read_mapping(node, at, source, places, inside)
    if isinstance(node, yaml.SequenceNode):
        _refuse_tag(node, "tag:yaml.org,2002:seq", place)
        return [_read(item, (*at, i), source, places, inside) for i, item in enumerate(node.value)]
    _refuse_tag(node, _STR, place)
    return scalar(node.value) if _is_plain(node) else node.value


def _is_plain(node: yaml.Node) -> bool:
    """Returns whether a scalar stands without quotes and is no block of text."""
    return isinstance(node, yaml.ScalarNode) and not node.style


def _read_mapping(
    node: yaml.MappingNode, at: Keys, source: str, places: dict[Keys, Place], inside: tuple[yaml.Node, ...]
) -> dict[str, Any]:
    """Returns a mapping whose keys are the texts as written, so an arm may be called `1e-3`."""
    _refuse_tag(node, "tag:yaml.org,2002:map", Place(source, node.start_mark.line + 1))
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        if not isinstance(key_node, yaml.ScalarNode):
            raise ValueError(f"{Place(source, key_node.start_mark.line + 1)}: a key must be plain text.")
        key = key_node.value
        place = Place(source, key_node.start_mark.line + 1, (*at, key))
        if key == "<<":
            raise ValueError(place.say("merge keys are not part of YAML 1.2; write the keys out."))
        if key in result:
            raise ValueError(place.say(f"duplicate key, first given on line {places[(*at, key)].line}."))
        places[(*at, key)] = place
        result[key] = _read(value_node, (*at, key), source, places, inside)
    return result


def _refuse_tag(node: yaml.Node, expected: str, place: Place) -> None:
    """Refuses `!!python/object` and its like: a configuration holds plain data only."""
    if node.tag != expected:
        raise ValueError(f"{place}: tags such as {node.tag!r} are not supported; write plain data.")


def dotted(keys: Keys) -> str:
    """Returns keys as people write them: `arms.float32.hidden[1]`."""
    text = ""
    for key in keys:
        text += f"[{key}]" if isinstance(key, int) else f".{key}" if text else str(key)
    return text


def dump(value: Any) -> str:
    """Returns plain data as YAML that `parse` reads back unchanged, keys in the order given."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=110, default_flow_style=None)

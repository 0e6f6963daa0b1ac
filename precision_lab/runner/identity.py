"""Identity: what makes two runs the same run, as one line of canonical JSON and its hash.

The hash is taken of the validated configuration, defaults included, so that `1`, `1.0` and `1e0`, any order of keys,
and YAML, Python and command line all agree, and so that a changed default is a different run. What must not count is
said by the field itself, in its `json_schema_extra`:

* `{"semantic": False}`: never part of the identity (how often to save, say);
* `{"legacy": value}`: left out while it has that value, so that an option added later orphans no earlier run.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from precision_lab.policy import PRESETS

_HEX_DIGITS = 12


def semantic(value: Any) -> Any:
    """Returns the plain data that identifies a configuration: mappings, lists, text, numbers, booleans and None.

    Whole floats become integers and minus zero becomes zero; infinities and NaN become tagged text, since JSON has
    none. Tuples and lists are the same.

    Raises:
      TypeError: a value that has no canonical text, such as a function.
    """
    if isinstance(value, BaseModel):
        return {name: semantic(getattr(value, name)) for name in _semantic_fields(value)}
    if isinstance(value, Mapping):
        return {str(key): semantic(item) for key, item in value.items()}
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, Path):
        return value.as_posix()
    if isinstance(value, int | float):
        return _number(value)
    if isinstance(value, Sequence):
        return [semantic(item) for item in value]
    if isinstance(value, set | frozenset):
        return sorted((semantic(item) for item in value), key=canonical_json)
    raise TypeError(f"no canonical form for {type(value).__name__} in a configuration: {value!r}.")


def plain(value: Any) -> Any:
    """Returns a configuration as mappings, lists and scalars, every field included and every number as it is."""
    if isinstance(value, BaseModel):
        return {name: plain(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value


def _semantic_fields(model: BaseModel) -> list[str]:
    """Returns the fields of a model that count, sorted."""
    names = []
    for name, field in type(model).model_fields.items():
        marks = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        legacy = "legacy" in marks and semantic(getattr(model, name)) == semantic(marks["legacy"])
        if marks.get("semantic", True) and not legacy:
            names.append(name)
    return sorted(names)


def _number(value: int | float) -> int | float | dict[str, str]:
    """Returns a number in the one form that JSON and a hash agree on."""
    if isinstance(value, int):
        return int(value)
    if not math.isfinite(value):
        return {"float": repr(value)}
    return int(value) if value.is_integer() and abs(value) < 2**53 else value


def canonical_json(value: Any) -> str:
    """Returns sorted, compact JSON, the same text for the same meaning on every platform and version."""
    return json.dumps(semantic(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest(value: Any) -> str:
    """Returns the first 12 hexadecimal digits of the SHA-256 of the canonical JSON."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:_HEX_DIGITS]


def slug(text: str, limit: int = 32) -> str:
    """Returns text that is safe in a file name: letters, digits, dot, dash and underscore, at most `limit` of them."""
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-._")[:limit].strip("-._") or "run"


def run_id(config: BaseModel) -> str:
    """Returns the name of one run, readable at the front and unique at the end.

    The readable part is made of the model, the data, the policy and the seed, which are all part of the hash, so
    the same configuration has the same name in every experiment and under every arm.
    """
    parts = [getattr(getattr(config, part, None), "kind", "") for part in ("model", "data", "probe")]
    policy = re.sub(r"\b\w+=", "", policy_name(getattr(config, "policy", "")))
    parts += [slug(policy, 32) if policy else "", f"s{getattr(config, 'seed', 0)}"]
    return f"{slug('-'.join(part for part in parts if part), 72)}-{digest(config)}"


@lru_cache(maxsize=4096)
def policy_name(policy: str) -> str:
    """Returns the name of the preset that a policy's canonical string equals, else the string."""
    return next((name for name, preset in PRESETS.items() if str(preset.policy) == policy), policy)


def experiment_id(name: str, runs: Mapping[str, Mapping[int, BaseModel]]) -> str:
    """Returns the name of an experiment's folder: its name and the hash of its arms and seeds.

    Claims, notes and the paper's numbers are not in it: editing them judges the same runs again, in the same folder.
    """
    return f"{slug(name)}-{digest({arm: [digest(run) for run in seeds.values()] for arm, seeds in runs.items()})}"

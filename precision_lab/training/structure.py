"""How the structures of two runs differ, in words: why they cannot share a compiled program."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel

from precision_lab.policy import Policy
from precision_lab.policy.treatment import SETTINGS
from precision_lab.training.config import RunConfig
from precision_lab.training.numbers import policy_apart, static_part


def structural_differences(config: RunConfig, other: RunConfig) -> list[str]:
    """Returns, for each field in which the structures of two runs differ, what it is and what it is not.

    An empty list says that the runs share a compiled program.
    """
    mine, theirs = (dict(_leaves(static_part(one))) for one in (config, other))
    # Where a part is of another kind, that says it all; fields that only one of them has do not count.
    differing = [path for path in mine if path in theirs and mine[path] != theirs[path]]
    own, others = dict(_leaves(config)), dict(_leaves(other))  # what people wrote, not what stands for all numbers
    words = [f"{path} is {_show(own[path])}, not {_show(others[path])}" for path in differing if path != "policy"]
    return [*(_policies(config, other) if "policy" in differing else ()), *words]


def _policies(config: RunConfig, other: RunConfig) -> Iterator[str]:
    """Yields how the structures of two policies differ, setting by setting, in the words of the policies themselves."""
    mine, theirs = policy_apart(config.policy), policy_apart(other.policy)
    written, others_written = Policy.parse(config.policy), Policy.parse(other.policy)
    for key in ("params", "output", "ops", *SETTINGS):
        if getattr(mine.policy, key) != getattr(theirs.policy, key):
            reason = mine.reasons.get(key) or theirs.reasons.get(key)
            a, b = (_word(getattr(one, key)) for one in (written, others_written))
            yield f"policy {key}={a}, not {b}" + (f" ({reason})" if reason else "")
    if mine.policy.rules != theirs.policy.rules:
        rules, others = ([str(rule) for rule in one.rules] for one in (written, others_written))
        yield f"policy rules are {'; '.join(rules) or 'none'}, not {'; '.join(others) or 'none'}"


def _leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the fields of a config by dotted path; of a part besides its fields that it is there, as it may not be."""
    if isinstance(value, BaseModel):
        if path:
            yield path, "given"
        value = {name: getattr(value, name) for name in type(value).model_fields}
    if not isinstance(value, Mapping):
        yield path, value
        return
    for name, inner in value.items():
        yield from _leaves(inner, f"{path}.{name}" if path else name)


def _show(value: Any) -> str:
    """Returns the value of a field for people."""
    return "nothing" if value is None else str(value)


def _word(value: Any) -> str:
    """Returns the value of a policy's setting as it is written."""
    return "none" if value is None else getattr(value, "name", str(value))

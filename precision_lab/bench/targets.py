"""Targets of benchmarks: the largest ratio that we allow ourselves, and on what hardware it is judged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class Target(NamedTuple):
    """The largest ratio that we allow ourselves, and what it supposes beside a CPU."""

    ratio: float
    needs: str = ""


def judged(target: Target | None, env: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a target, and what of it this machine lacks, as arguments of a row.

    Args:
      target: None if there is none.
      env: of `environment`.
    """
    if target is None:
        return {"target": None}
    if env["platform"] != "cpu":
        return {"target": target.ratio, "needs": "a CPU"}
    lacking = target.needs == "AMX" and "amx_bf16" not in env["bfloat16_units"]
    return {"target": target.ratio, "needs": target.needs if lacking else ""}

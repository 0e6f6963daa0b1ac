"""Slicing of what is given to the quantizers of a plan, for a scan over layers, which have quantizers of their own."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from precision_lab.rewrite.steps import Cast, Enter, Lookup, Observed, Plan


def map_given(plan: Plan, change: Callable[[Any], Any]) -> Plan:
    """Returns a plan with `change(array)` for each array in what is given to its quantizers; scalars stay."""
    return Plan(tuple(_mapped(step, change) for step in plan.steps))


def _mapped(step: Any, change: Callable[[Any], Any]) -> Any:
    """Returns one step with what is given changed."""
    if isinstance(step, (Cast, Lookup)):
        given = jax.tree.map(lambda leaf: change(leaf) if jnp.ndim(leaf) else leaf, step.given)
        return dataclasses.replace(step, given=given)
    if isinstance(step, Observed):
        return dataclasses.replace(step, step=_mapped(step.step, change))
    if isinstance(step, Enter):
        return dataclasses.replace(step, plans=tuple(map_given(plan, change) for plan in step.plans))
    return step


def given_arrays(plan: Plan) -> list[Any]:
    """Returns the arrays in what is given to the quantizers of a plan, in order."""
    arrays: list[Any] = []
    map_given(plan, lambda array: arrays.append(array) or array)
    return arrays


def with_given_arrays(plan: Plan, arrays: list[Any]) -> Plan:
    """Returns a plan with other arrays in their places."""
    rest = iter(arrays)
    return map_given(plan, lambda _: next(rest))

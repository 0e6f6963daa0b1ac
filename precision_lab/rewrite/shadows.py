"""Shadows: what each product would have been under other policies, from the operands that it has under this one."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from precision_lab.rewrite import _compat
from precision_lab.rewrite.steps import Enter, Observed, Plan


def with_shadows(plan: Plan, others: Sequence[Plan]) -> Plan:
    """Returns an observing plan whose products are also evaluated as other observing plans of its jaxpr say."""
    rows = zip(plan.steps, *(other.steps for other in others), strict=True)
    return Plan(tuple(_step(step, shadows) for step, *shadows in rows))


def _step(step: Any, shadows: Sequence[Any]) -> Any:
    """Returns one step with its shadows; plans that observe differ in nothing but what happens at products."""
    if isinstance(step, Observed):
        return dataclasses.replace(step, shadows=tuple(shadow.step for shadow in shadows))
    if not isinstance(step, Enter) or not all(isinstance(shadow, Enter) for shadow in shadows):
        return step  # without an `Enter` of its own a plan has no products there
    plans = zip(step.plans, *(shadow.plans for shadow in shadows), strict=True)

    def replan(jaxpr: Any, part: _compat.Part) -> Plan:
        return with_shadows(step.replan(jaxpr, part), [shadow.replan(jaxpr, part) for shadow in shadows])

    return dataclasses.replace(step, plans=tuple(with_shadows(one, others) for one, *others in plans), replan=replan)

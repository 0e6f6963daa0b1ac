"""Choices: several policies in one program, of which an integer for each site says at run time which one it follows.

So a search over sites and policies compiles once. The same walk over the plans of all policies also makes the program
that evaluates every alternative at every site, from the operands that the first policy has there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from precision_lab.policy import Policy
from precision_lab.policy.deriving import OF_TRAINING
from precision_lab.policy.treatment import QUANTIZERS
from precision_lab.rewrite import _compat
from precision_lab.rewrite.api import Traced, require_x64, trace
from precision_lab.rewrite.equations import already
from precision_lab.rewrite.interpreter import evaluate
from precision_lab.rewrite.plan import Planner
from precision_lab.rewrite.sites import SiteTable
from precision_lab.rewrite.steps import Cast, Chosen, Enter, Lookup, Observed, Plan

Build = Callable[[str, Sequence[Any]], Any]


@dataclasses.dataclass(frozen=True)
class Choosable:
    """Where policies differ.

    Attributes:
      tables: the sites under each policy.
      sites: names of the sites that have a choice, in program order.
      kept: names of those that differ too but follow the first policy always: inside custom derivatives and batching
        rules, linear solves and conditionals on the platform.
    """

    tables: tuple[SiteTable, ...]
    sites: tuple[str, ...]
    kept: tuple[str, ...]


def choosable(
    fn: Callable, policies: Sequence[Policy], params: Any, args: Sequence[Any], kwargs: dict[str, Any], **named: Any
) -> Choosable:
    """Returns where policies differ in `fn(params, *args, **kwargs)`; arguments and errors as `call_with_choices`."""
    return _planned(trace(fn, params, args, kwargs), policies, lambda _, steps: steps[0], **named)[1]


def call_with_choices(
    fn: Callable,
    policies: Sequence[Policy],
    choices: Mapping[str, Any],
    params: Any,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    **named: Any,
) -> Any:
    """Returns `fn(params, *args, **kwargs)`, each site under one of several policies; outputs keep their dtypes.

    Args:
      fn, params, args, kwargs: as in `call`; parameters are arrays.
      policies: what to choose from; they differ in products and lookups only.
      choices: number of the policy, int32 scalar that may be traced, by site; the first policy where there is none.
        A site in a scan has the same choice in all iterations.
      named: `root` and `types` as in `call`.

    Raises:
      ValueError: a policy changes other operations than products and lookups, one of its rules matches no site, or a
        choice is of a site at which policies do not differ.
    """

    def chosen(site: str, steps: Sequence[Any]) -> Any:
        return Chosen(site, tuple(steps), choices[site]) if site in choices else steps[0]

    traced = trace(fn, params, args, kwargs)
    plan, found = _planned(traced, policies, chosen, **named)
    if unknown := [site for site in choices if site not in found.sites]:
        raise ValueError(f"no choice at '{unknown[0]}'; the policies differ at {', '.join(found.sites) or 'no site'}.")
    return traced.rebuild(evaluate(plan, traced.jaxpr, traced.jaxpr.consts, traced.arrays))


def call_with_alternatives(
    fn: Callable, policies: Sequence[Policy], params: Any, args: Sequence[Any], kwargs: dict[str, Any], **named: Any
) -> Any:
    """Returns `fn(params, *args, **kwargs)` under the first policy, marking what each site gives under the others.

    The marks are "output" under the first and "shadow0" and so on under the others, from the same operands. Arguments
    and errors as `call_with_choices`.
    """

    def compared(site: str, steps: Sequence[Any]) -> Observed:
        return Observed(site, steps[0], (None, None), None, tuple(steps[1:]))

    traced = trace(fn, params, args, kwargs)
    plan, _ = _planned(traced, policies, compared, **named)
    return traced.rebuild(evaluate(plan, traced.jaxpr, traced.jaxpr.consts, traced.arrays))


def _planned(
    traced: Traced, policies: Sequence[Policy], build: Build, *, root: str = "", types: Mapping[str, str] | None = None
) -> tuple[Plan, Choosable]:
    """Returns the merged plan of several policies, and where they differ."""
    planners, plans = [], []
    for policy in policies:
        _require_products_only(policy)
        planner = Planner(policy, root, types)
        plans.append(planner.walk(traced.jaxpr, traced.origins)[0])
        planner.require_every_rule_used()
        planners.append(planner)
    walk = _Walk(build)
    plan = walk.merged(traced.jaxpr, plans)
    tables = tuple(planner.table() for planner in planners)
    return plan, Choosable(tables, tuple(dict.fromkeys(walk.sites)), tuple(dict.fromkeys(walk.kept)))


def _require_products_only(policy: Policy) -> None:
    """Raises ValueError for a policy with anything to say of other operations."""
    require_x64(policy)
    if policy.reaches_operations:
        raise ValueError(
            f"policy '{policy}' changes other operations than products and lookups (ops=autocast, op= or round=), of "
            "which no choice by site can be made; leave these settings out."
        )


class _Walk:
    """Merges plans of the same jaxpr, noting where they differ."""

    def __init__(self, build: Build) -> None:
        self.build = build
        self.sites: list[str] = []
        self.kept: list[str] = []

    def merged(self, jaxpr: Any, plans: Sequence[Plan]) -> Plan:
        """Returns one plan for several of a jaxpr."""
        rows = zip(jaxpr.eqns, *(plan.steps for plan in plans), strict=True)
        return Plan(tuple(self._step(eqn, steps) for eqn, *steps in rows))

    def _step(self, eqn: Any, steps: Sequence[Any]) -> Any:
        """Returns one step for several of an equation."""
        if any(isinstance(step, Enter) for step in steps):
            return self._enter(eqn, steps)
        effects = [_effect(step, eqn) for step in steps]
        if all(effect == effects[0] for effect in effects):
            return steps[0]
        name = next(step.site for step in steps if isinstance(step, Cast | Lookup))
        self.sites.append(name)
        return self.build(name, steps)

    def _enter(self, eqn: Any, steps: Sequence[Any]) -> Any:
        """Returns the step of an equation with something to do inside; a plan with nothing to do has None for it."""
        jaxprs = [part.jaxpr for part in _compat.inner_jaxprs(eqn)]
        by_jaxpr = [
            [_nothing(jaxpr) if step is None else step.plans[i] for step in steps] for i, jaxpr in enumerate(jaxprs)
        ]
        # What runs inside these is a jaxpr of its own, which takes no further operands such as a choice.
        if eqn.primitive.name in _compat.CLOSED or eqn.params.get("branches_platforms"):
            apart = _Walk(lambda _, steps: steps[0])
            for jaxpr, plans in zip(jaxprs, by_jaxpr, strict=True):
                apart.merged(jaxpr, plans)
            self.kept += [*apart.sites, *apart.kept]
            return steps[0]
        merged = tuple(self.merged(jaxpr, plans) for jaxpr, plans in zip(jaxprs, by_jaxpr, strict=True))
        return dataclasses.replace(next(step for step in steps if step is not None), plans=merged)


def _effect(step: Any, eqn: Any) -> Any:
    """Returns a step without what has no effect forward at this equation, such as the setting of other operands."""
    if not isinstance(step, Cast):
        return step
    quantizers = [*(operand.quantizer for operand in step.casting.operands), *(step.before or ())]
    others = dict.fromkeys((*QUANTIZERS, *OF_TRAINING))
    treatment = dataclasses.replace(step.treatment, **others)
    return None if already(eqn, treatment, quantizers) else dataclasses.replace(step, treatment=treatment)


def _nothing(jaxpr: Any) -> Plan:
    """Returns the plan that leaves a jaxpr as it stands."""
    return Plan((None,) * len(jaxpr.eqns))

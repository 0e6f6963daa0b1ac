"""The plan: one walk over a jaxpr that finds its sites, names them, and decides what happens at each.

The walk carries, beside each value, its provenance: the path of the parameter that it was computed from, if no data had
a part in it (the first path, where several parameters were joined). Nothing is evaluated here, so a plan is also the
dry run behind `sites`.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

from precision_lab.policy import OP_TABLE, Policy, Treatment
from precision_lab.policy.ops import ACTIVATIONS
from precision_lab.rewrite import _compat
from precision_lab.rewrite.adapters import Adapter, is_matrix
from precision_lab.rewrite.cast import casting_of, quantizers_of
from precision_lab.rewrite.equations import OPAQUE, UNSUPPORTED, already, describe, flops, is_opaque, why_not
from precision_lab.rewrite.held import Known, at_site
from precision_lab.rewrite.lookup import LOOKUP, looks_up_rows
from precision_lab.rewrite.marks import MARKED, OPERANDS
from precision_lab.rewrite.operations import CASTABLE, Operate, is_castable
from precision_lab.rewrite.provenance import (
    CONSTANT,
    FLAGS,
    Origins,
    captured,
    combined,
    has_zero,
    is_path,
    of_results,
    refuse_signs_of_masks,
    sees_one_sign,
)
from precision_lab.rewrite.rules import require_every_rule_used
from precision_lab.rewrite.scaled import Amaxes
from precision_lab.rewrite.sites import FULL_PRECISION, PRODUCTS, Site, SiteTable, clean_scope, module_types
from precision_lab.rewrite.steps import Cast, Enter, Lookup, Observed, Plan
from precision_lab.rewrite.traced_compute import compute_params

AS_WRITTEN, WHOLE = "as written: ops=products", "has rules of its own: runs as traced"


class Planner:
    """Walks jaxprs under one policy, collecting sites.

    Attributes:
      policy, root: what to apply, and the name scope to leave out of site paths.
      types: type names of modules by path, see `module_types`.
      observing: whether products get marks.
      sites: what was found so far.

    With `every_product` there is a step also for products that are as the policy wants them.
    """

    def __init__(
        self,
        policy: Policy,
        root: str = "",
        types: Mapping[str, str] | None = None,
        *,
        everything: bool = False,
        observing: bool = False,
        amaxes: Mapping[str, Amaxes] | None = None,
        given: Known | None = None,
        adapters: Mapping[str, Adapter] | None = None,
        every_product: bool = False,
        may_capture_data: bool | None = None,
    ) -> None:
        self.policy = policy
        self.root = root
        self.types = types or {}
        self.observing = observing
        self._amaxes = amaxes or {}
        self._given = given or Known({}, {})
        self._adapters = adapters or {}
        self._every_product = every_product
        # The idiom `lambda params: loss(params, batch)` is of functions; what models capture are their own constants.
        self._may_capture_data = not self.types if may_capture_data is None else may_capture_data
        self._everything = everything
        self.sites: list[Site] = []
        self.of_one_sign: list[str] = []  # products that take the signs of what is never negative
        self._counts: collections.Counter[tuple[str, str]] = collections.Counter()
        # JAX writes its default precision into every product; only what differs from it was the author's choice.
        self._default_precision = _compat.default_precision()
        self._call: Sequence[Site] | None = None
        self._of_tangents = False
        self._scans: tuple[bool, ...] = ()  # of each scan around, outermost first, whether it slices parameters
        # Custom derivatives are typed for what was traced, so operations inside them stay as they are.
        self._reaches_operations = everything or policy.reaches_operations

    def _again(self, counts: Mapping[tuple[str, str], int], call: Sequence[Site] | None, of_tangents: bool) -> Planner:
        """Returns a planner for a jaxpr that stands in for one walked before.

        Args:
          counts: the sites counted before that one.
          call: for a derivative rule, the sites of the function that it belongs to; None for the function itself.
          of_tangents: whether operands may be tangents.
        """
        options: dict[str, Any] = {"observing": self.observing, "amaxes": self._amaxes, "given": self._given}
        options |= {"adapters": self._adapters, "every_product": self._every_product}
        options["may_capture_data"] = self._may_capture_data
        planner = Planner(self.policy, self.root, self.types, **options)
        planner._counts = collections.Counter(counts)
        planner._default_precision = self._default_precision
        planner._call, planner._scans = self._call if call is None else call, self._scans
        planner._of_tangents = self._of_tangents or of_tangents
        planner._reaches_operations = False
        return planner

    def table(self) -> SiteTable:
        """Returns the sites found so far: products, what a rule names, and under `everything` the rest."""
        shown = [site for site in self.sites if self._everything or site.is_product or self._is_named(site)]
        return SiteTable(tuple(shown), str(self.policy))

    def _is_named(self, site: Site) -> bool:
        """Returns whether an operation is listed though it is no product."""
        always = site.op in UNSUPPORTED | {LOOKUP} or site.reason == OPAQUE
        return always or any(rule.matches(*site.names) for rule in self.policy.rules)

    def walk(self, jaxpr: Any, origins: Sequence[Any], scope: str = "") -> tuple[Plan, Origins]:
        """Returns the plan of a jaxpr and the provenance of its outputs.

        Args:
          jaxpr: jaxpr, open or closed.
          origins: provenance of each input.
          scope: name stack around the jaxpr.
        """
        known = dict(zip(jaxpr.invars, origins, strict=True)) | {
            var: captured(var.aval, may_be_data=self._may_capture_data) for var in jaxpr.constvars
        }

        def origin(atom: Any) -> Any:
            return CONSTANT if _compat.is_literal(atom) else known.get(atom)

        steps = []
        for eqn in jaxpr.eqns:
            sources = [origin(atom) for atom in eqn.invars]
            step, outputs = self._step(eqn, sources, _join(scope, _compat.scope_of(eqn)))
            steps.append(step)
            known.update(zip(eqn.outvars, outputs, strict=True))
        return Plan(tuple(steps)), [origin(atom) for atom in jaxpr.outvars]

    def _step(self, eqn: Any, sources: Origins, scope: str) -> tuple[Any, Origins]:
        """Decides on one equation; also returns the provenance of its results."""
        name = eqn.primitive.name
        unknown: Origins = [None] * len(eqn.outvars)
        if name in PRODUCTS:
            return self._observed(self._product(eqn, sources, scope), sources), unknown
        if name in _compat.ENTERED:
            return self._enter(eqn, sources, scope)
        if name in UNSUPPORTED:
            site = dataclasses.replace(self._site(eqn, sources, scope), reason="no policy reaches this operation yet")
            self.sites.append(site)
            return self._observed(None, sources), unknown
        if name == LOOKUP and is_path(sources[0]) and looks_up_rows(eqn):
            return self._lookup(eqn, sources, scope), unknown
        if is_opaque(eqn):
            return self._opaque(eqn, scope), [combined(sources)] * len(eqn.outvars)
        step = self._operation(eqn, None, scope) if self._reaches_operations else None
        return step, [of_results(eqn, sources)] * len(eqn.outvars)

    def _lookup(self, eqn: Any, sources: Origins, scope: str) -> Lookup | Operate | None:
        """Decides on a lookup of rows of a parameter, and records it as a site."""
        site = self._site(eqn, sources[:1], scope)
        treatment = self.policy.at(*site.names)
        if treatment.embedding is None and self._reaches_operations:
            return self._operation(eqn, site, scope)
        reason = "full_precision region" if _is_full_precision(scope) else ""
        reason = reason or ("" if is_castable(eqn.invars[0].aval) else f"{eqn.invars[0].aval.dtype} table")
        self.sites.append(dataclasses.replace(site, treatment=None if reason else treatment, reason=reason))
        if reason or treatment.embedding is None:
            return None
        return Lookup(treatment.embedding, site.name, self._known(site, "lhs", treatment))

    def _operation(self, eqn: Any, site: Site | None, scope: str) -> Operate | None:
        """Decides on an operation that is not a product, and records it as a site if it computes with floats."""
        if not any(is_castable(atom.aval) for atom in (*eqn.invars, *eqn.outvars)):
            return None
        site = site or self._site(eqn, [], scope)
        treatment = self.policy.at(*site.names)
        if _is_full_precision(scope):
            self.sites.append(dataclasses.replace(site, reason="full_precision region"))
            return None
        autocast, table = self.policy.ops == "autocast", {**OP_TABLE, MARKED: "follow"}
        category = treatment.op or (table.get(site.op, "never") if autocast else "never")
        reason = "" if site.op in table or not autocast or treatment.op else "not in the op table: runs as traced"
        if self.policy.ops == "products" and treatment.op is None and treatment.round is None:
            reason = AS_WRITTEN
        decided = dataclasses.replace(treatment, op=category)
        self.sites.append(dataclasses.replace(site, treatment=None if reason else decided, reason=reason))
        if category == "low" and treatment.compute.name not in CASTABLE:
            raise ValueError(
                f"op=low at '{site.full_name}' needs float16, bfloat16 or float32, not {treatment.compute.name}."
            )
        if category == "never" and treatment.round is None:
            return None
        return Operate(category, treatment.compute, treatment.round)

    def _opaque(self, eqn: Any, scope: str) -> Operate | None:
        """Records what policies do not enter, and the products inside it; only its results can be rounded."""
        for hidden in _compat.hidden_jaxprs(eqn):
            self._report_hidden(hidden, scope, eqn.primitive.name)
        site = self._site(eqn, [], scope)
        treatment = self.policy.at(*site.names)
        if treatment.round is None or _is_full_precision(scope):
            self.sites.append(dataclasses.replace(site, reason=OPAQUE))
            return None
        self.sites.append(dataclasses.replace(site, treatment=dataclasses.replace(treatment, op="never")))
        return Operate("never", treatment.compute, treatment.round)

    def _enter(self, eqn: Any, sources: Origins, scope: str) -> tuple[Enter | Operate | None, Origins]:
        """Plans the jaxprs inside an equation."""
        outputs: Origins = [None] * len(eqn.outvars)
        autocast = self.policy.ops == "autocast" and not _is_full_precision(scope)
        is_activation = autocast and _compat.function_name(eqn) in ACTIVATIONS
        whole = self._whole(eqn, scope, is_activation) if eqn.primitive.name in _compat.CLOSED else None
        counts, first = dict(self._counts), len(self.sites)
        plans, of_tangents, operations, scans = [], self._of_tangents, self._reaches_operations, self._scans
        layers = eqn.primitive.name == "scan" and any(map(is_path, sources[sum(_compat.scan_arity(eqn)) :]))
        self._scans += (layers,) * (eqn.primitive.name == "scan")
        # What a linear solve maps linearly is transposed, like a tangent.
        self._of_tangents |= eqn.primitive.name == _compat.LINEAR_SOLVE
        if eqn.primitive.name in _compat.CLOSED:
            self._reaches_operations = False
        for inner in _compat.inner_jaxprs(eqn):
            plan, returned = self.walk(inner.jaxpr, [None if i is None else sources[i] for i in inner.operands], scope)
            plans.append(plan)
            if eqn.primitive.name not in ("scan", "while", "cond", _compat.LINEAR_SOLVE):
                outputs = returned
        self._of_tangents, self._reaches_operations, self._scans = of_tangents, operations, scans
        empty = all(plan.is_empty for plan in plans) and not _compat.rule_may_hold(eqn, PRODUCTS)
        if empty and not is_activation:
            return whole, outputs
        call, kept = self.sites[first:], []

        def replan(jaxpr: Any, part: _compat.Part) -> Plan:
            known = _compat.residuals(eqn, kept, sources) if part is _compat.Part.BACKWARD else sources
            origins = [*known, *[None] * len(jaxpr.invars)][: len(jaxpr.invars)]
            rule_of = None if part is _compat.Part.CALL else call
            planner = self._again(counts, rule_of, part is _compat.Part.TANGENT)
            plan, kept[:] = planner.walk(jaxpr, origins, scope)
            return plan

        return Enter(tuple(plans), replan, is_activation, layers, whole.round if whole else None), outputs

    def _whole(self, eqn: Any, scope: str, is_activation: bool) -> Operate | None:
        """Decides on the results of a function with rules of its own, for derivatives or batches.

        To policies that reach operations it is one: what its rules compute is not what the function computes inside.
        """
        if not self._reaches_operations or not any(is_castable(atom.aval) for atom in eqn.outvars):
            return None
        site = self._site(eqn, [], scope)
        treatment = self.policy.at(*site.names)
        left = "" if treatment.round or is_activation else WHOLE if self.policy.ops == "autocast" else AS_WRITTEN
        reason = "full_precision region" if _is_full_precision(scope) else left
        decided = dataclasses.replace(treatment, op="follow" if is_activation else "never")
        self.sites.append(dataclasses.replace(site, treatment=None if reason else decided, reason=reason))
        return None if reason or treatment.round is None else Operate("never", treatment.compute, treatment.round)

    def _product(self, eqn: Any, sources: Origins, scope: str) -> Cast | None:
        """Names a product, asks the policy about it and records it as a site."""
        site = self._site(eqn, sources, scope)
        if _is_full_precision(scope):
            self.sites.append(dataclasses.replace(site, reason="full_precision region"))
            return None
        treatment = self.policy.at(*site.names) if self._call is None else self._treatment_in_rule(site)
        asked = any(rule.sets("compute") and rule.matches(*site.names) for rule in self.policy.rules)
        if not self._reaches_operations:  # inside of what is rounded as a whole
            treatment = dataclasses.replace(treatment, round=None)
        reason = why_not(eqn, treatment, asked, self._default_precision)
        if reason:
            self.sites.append(dataclasses.replace(site, reason=reason))
            return None
        parameters = (is_path(sources[0]), is_path(sources[1]))
        by = quantizers_of(treatment, parameters)
        refuse_signs_of_masks(site.name, sources, by)
        if any(source is FLAGS and qz and not has_zero(qz) for source, qz in zip(sources, by, strict=False)):
            # Signs would make +1 of both flags, such as those of a one-hot row.
            treatment = dataclasses.replace(treatment, activation=None, attention=None, outliers=None)
        self.of_one_sign += [site.name] * any(map(sees_one_sign, sources, by))
        self.sites.append(dataclasses.replace(site, treatment=treatment))
        adapter, known = self._adapter(eqn, sources), self._given
        compute = compute_params(known, self.policy, site, treatment, self._call) if known.numbers else None
        as_it_stands = already(eqn, treatment, quantizers_of(treatment, parameters))
        if as_it_stands and not (adapter or compute or self._every_product):
            return None
        result = self._result(eqn, treatment)
        casting, before = casting_of(treatment, parameters, result)
        given = self._known(site, OPERANDS[0], treatment), self._known(site, OPERANDS[1], treatment)
        amaxes = self._amaxes.get(site.name)
        return Cast(treatment, casting, before, self._of_tangents, site.name, amaxes, given, adapter, compute)

    def _known(self, site: Site, role: str, treatment: Treatment) -> Any:
        """Returns what is given for one operand of a site."""
        rule = functools.partial(self.policy.decided_by, names=site.names)
        return at_site(self._given, site, role, treatment, self._scans, rule)

    def _adapter(self, eqn: Any, sources: Origins) -> tuple[int, Adapter] | None:
        """Returns which operand of a product has an adapter, and that."""
        for operand, path in enumerate(sources[:2]):
            if path in self._adapters and is_matrix(eqn, operand):
                return operand, self._adapters[path]
        return None

    def _result(self, eqn: Any, treatment: Treatment) -> Any:
        """Returns the dtype of a product's result: the compute dtype under autocast, else what the model expects."""
        autocast = self._reaches_operations and self.policy.ops == "autocast"
        widened = eqn.outvars[0].aval.dtype != eqn.invars[0].aval.dtype  # the author asked for a wider result
        narrow = treatment.compute.name in ("float16", "bfloat16") and not widened
        return treatment.compute.dtype if autocast and narrow else eqn.outvars[0].aval.dtype

    def _observed(self, step: Cast | None, sources: Origins) -> Cast | Observed | None:
        """Returns the step of the product found last, marked if that is asked for.

        Not so inside a derivative rule or a linear solve: what flows there are tangents and residuals of the site.
        """
        if not self.observing or self._call is not None or self._of_tangents:
            return step
        name, treatment = self.sites[-1].name, self.sites[-1].treatment
        if treatment is None:
            return Observed(name, step, (None, None), None)
        # Under a quantizer's scale no number is outside of its format.
        quantizers = quantizers_of(treatment, (is_path(sources[0]), is_path(sources[1])))
        fmt = None if step and step.compute else treatment.compute
        left, right = (fmt if quantizer is None else None for quantizer in quantizers)
        return Observed(name, step, (left, right), fmt if treatment.gradient is None else None)

    def _treatment_in_rule(self, site: Site) -> Treatment:
        """Returns the treatment of a product inside a derivative rule: that of the products that it differentiates.

        Raises:
          ValueError: these differ, and the product has no parameter that tells to which of them it belongs.
        """
        done = [one for one in self._call or () if one.treatment is not None]
        own = [one for one in done if site.has_parameter and one.path == site.path]
        found = {one.treatment for one in own or done}
        where = site.path or "this function"
        if len(found) > 1:
            raise ValueError(
                f"rules give products inside one custom derivative at '{where}' different formats, but in its "
                "derivative rule these products cannot be told apart: give them one format."
            )
        treatment = found.pop() if found else self.policy.at(site.path)
        assert treatment is not None
        if treatment.quantizes:
            raise ValueError(
                f"'{where}' multiplies inside a custom derivative, whose hand-written rule cannot be quantized. Leave "
                f"it out by a rule: '{where}**:weight=none,activation=none,attention=none,gradient=none'."
            )
        return treatment

    def _site(self, eqn: Any, sources: Origins, scope: str) -> Site:
        """Builds the site of an operation, not yet decided."""
        parameter = next((source for source in (*sources[1:2], *sources[:1]) if is_path(source)), None)
        path, op = clean_scope(scope, self.root) if parameter is None else parameter, eqn.primitive.name
        function = _compat.function_name(eqn) if op in _compat.CLOSED else ""
        index, again = self._counts[path, op], self._counts[path, function]
        self._counts.update({(path, name): 1 for name in (op, function)})
        operands = tuple(describe(atom.aval) for atom in eqn.invars)
        out, module = describe(eqn.outvars[0].aval), module_types(path, self.types)
        by = _quantized_by(op, sources)
        named = {"label": f"{function}#{again}" if function else "", "module": module, "quantized_by": by}
        return Site(path, op, index, parameter is not None, operands, out, flops(eqn), **named)

    def _report_hidden(self, jaxpr: Any, scope: str, holder: str) -> None:
        """Records the products inside an equation that is not entered, so that they are not passed over in silence."""
        for eqn in jaxpr.eqns:
            if eqn.primitive.name in PRODUCTS:
                site = self._site(eqn, [None, None], _join(scope, _compat.scope_of(eqn)))
                self.sites.append(dataclasses.replace(site, reason=f"inside {holder}, which policies do not enter"))
            for inner in [*(i.jaxpr for i in _compat.inner_jaxprs(eqn)), *_compat.hidden_jaxprs(eqn)]:
                self._report_hidden(inner, scope, holder)

    def require_every_rule_used(self) -> None:
        """Raises ValueError if a rule, or something that it says, does nothing at the sites found so far."""
        require_every_rule_used(self.policy, self.sites)


def _quantized_by(op: str, sources: Origins) -> tuple[str, ...]:
    """Returns the settings that quantize the operands of an operation."""
    if op not in PRODUCTS:
        return ("embedding",) if op == LOOKUP and any(map(is_path, sources)) else ()
    if not any(map(is_path, sources)):
        return ("attention",) * len(sources)
    return tuple("weight" if is_path(source) else "activation" for source in sources)


def _is_full_precision(scope: str) -> bool:
    """Returns whether a name stack is inside `precision_lab.full_precision`."""
    return FULL_PRECISION in clean_scope(scope).split("/")


def _join(outer: str, inner: str) -> str:
    """Joins two name stacks."""
    return f"{outer}/{inner}" if outer and inner else outer or inner

"""The plan: one walk over a jaxpr that finds its sites, names them, and decides what happens at each.

The walk carries, beside each value, its provenance: the path of the parameter it came from, if it is one seen only
through layout operations and casts. Nothing is evaluated here, so a plan is also the dry run behind `sites`.
"""

from __future__ import annotations

import collections
import dataclasses
import difflib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from precision_lab.formats import Format
from precision_lab.policy import Policy
from precision_lab.rewrite import _compat
from precision_lab.rewrite.sites import Site, SiteTable, clean_scope

PRODUCTS = frozenset(("dot_general", "conv_general_dilated"))
UNSUPPORTED = frozenset(("ragged_dot_general", "ragged_dot"))
LAYOUT = frozenset(
    ["reshape", "transpose", "broadcast_in_dim", "squeeze", "expand_dims", "slice", "dynamic_slice", "rev", "copy"]
) | {"copy_p", "convert_element_type", "sharding_constraint", "optimization_barrier", "reduce_precision"}
# float64 and float8 operands were someone's explicit choice, which a policy leaves alone.
CASTABLE = frozenset(("float16", "bfloat16", "float32"))
Origins = list[str | None]


@dataclasses.dataclass(frozen=True)
class Cast:
    """A product whose operands are to be cast.

    Attributes:
      compute, accum: formats of operands and accumulator.
      parameters: which operands are parameters.
      of_tangents: whether an operand may be a tangent, in which the product will be transposed.
    """

    compute: Format
    accum: Format
    parameters: tuple[bool, bool]
    of_tangents: bool


@dataclasses.dataclass(frozen=True)
class Enter:
    """An equation with something to do inside.

    Attributes:
      plans: one per inner jaxpr.
      replan: plans a jaxpr that stands in for the equation's own, such as a derivative rule's, under the same names.
    """

    plans: tuple[Plan, ...]
    replan: Callable[[Any, _compat.Part], Plan]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to do at each equation of a jaxpr; None binds it as it stands."""

    steps: tuple[Cast | Enter | None, ...]

    @property
    def is_empty(self) -> bool:
        """Whether the jaxpr can be evaluated as it stands."""
        return not any(self.steps)


class Planner:
    """Walks jaxprs under one policy, collecting sites.

    Attributes:
      policy, root: what to apply, and the name scope to leave out of site paths.
      sites: what was found so far.
    """

    def __init__(self, policy: Policy, root: str = "") -> None:
        self.policy = policy
        self.root = root
        self.sites: list[Site] = []
        self._counts: collections.Counter[tuple[str, str]] = collections.Counter()
        # JAX writes its default precision into every product; only what differs from it was the author's choice.
        self._default_precision = _compat.default_precision()
        self._call: Sequence[Site] | None = None
        self._of_tangents = False

    def _again(self, counts: Mapping[tuple[str, str], int], call: Sequence[Site] | None, of_tangents: bool) -> Planner:
        """Returns a planner for a jaxpr that stands in for one walked before.

        Args:
          counts: the sites counted before that one.
          call: for a derivative rule, the sites of the function that it belongs to; None for the function itself.
          of_tangents: whether operands may be tangents.
        """
        planner = Planner(self.policy, self.root)
        planner._counts = collections.Counter(counts)
        planner._default_precision = self._default_precision
        planner._call = self._call if call is None else call
        planner._of_tangents = self._of_tangents or of_tangents
        return planner

    def table(self) -> SiteTable:
        """Returns the sites found so far."""
        return SiteTable(tuple(self.sites), str(self.policy))

    def walk(self, jaxpr: Any, origins: Sequence[str | None], scope: str = "") -> tuple[Plan, Origins]:
        """Returns the plan of a jaxpr and the provenance of its outputs.

        Args:
          jaxpr: jaxpr, open or closed.
          origins: provenance of each input.
          scope: name stack around the jaxpr.
        """
        known = dict(zip(jaxpr.invars, origins, strict=True))

        def origin(atom: Any) -> str | None:
            return None if _compat.is_literal(atom) else known.get(atom)

        steps = []
        for eqn in jaxpr.eqns:
            sources = [origin(atom) for atom in eqn.invars]
            step, outputs = self._step(eqn, sources, _join(scope, _compat.scope_of(eqn)))
            steps.append(step)
            known.update(zip(eqn.outvars, outputs, strict=True))
        return Plan(tuple(steps)), [origin(atom) for atom in jaxpr.outvars]

    def _step(self, eqn: Any, sources: Origins, scope: str) -> tuple[Cast | Enter | None, Origins]:
        """Decides on one equation; also returns the provenance of its results."""
        name = eqn.primitive.name
        unknown: Origins = [None] * len(eqn.outvars)
        if name in PRODUCTS:
            return self._product(eqn, sources, scope), unknown
        if name in LAYOUT:
            return None, [sources[0], *unknown[1:]]
        if name in UNSUPPORTED:
            site = dataclasses.replace(self._site(eqn, sources, scope), reason="no policy reaches this operation yet")
            self.sites.append(site)
        if name in _compat.ENTERED:
            return self._enter(eqn, sources, scope)
        for hidden in _compat.hidden_jaxprs(eqn):
            self._report_hidden(hidden, scope, name)
        return None, unknown

    def _enter(self, eqn: Any, sources: Origins, scope: str) -> tuple[Enter | None, Origins]:
        """Plans the jaxprs inside an equation."""
        outputs: Origins = [None] * len(eqn.outvars)
        counts, first = dict(self._counts), len(self.sites)
        plans = []
        for inner in _compat.inner_jaxprs(eqn):
            plan, returned = self.walk(inner.jaxpr, [None if i is None else sources[i] for i in inner.operands], scope)
            plans.append(plan)
            if eqn.primitive.name not in ("scan", "while", "cond"):
                outputs = returned
        if all(plan.is_empty for plan in plans) and not _compat.rule_may_hold(eqn, PRODUCTS):
            return None, outputs
        call, kept = self.sites[first:], []

        def replan(jaxpr: Any, part: _compat.Part) -> Plan:
            known = _compat.residuals(eqn, kept, sources) if part is _compat.Part.BACKWARD else sources
            origins = [*known, *[None] * len(jaxpr.invars)][: len(jaxpr.invars)]
            rule_of = None if part is _compat.Part.CALL else call
            planner = self._again(counts, rule_of, part is _compat.Part.TANGENT)
            plan, kept[:] = planner.walk(jaxpr, origins, scope)
            return plan

        return Enter(tuple(plans), replan), outputs

    def _product(self, eqn: Any, sources: Origins, scope: str) -> Cast | None:
        """Names a product, asks the policy about it and records it as a site."""
        site = self._site(eqn, sources, scope)
        names = (site.path, site.name, site.full_name)
        compute, accum = self.policy.at(*names) if self._call is None else self._formats_in_rule(site)
        asked = any(rule.compute and rule.matches(*names) for rule in self.policy.rules)
        reason = _why_not(eqn, compute, asked, self._default_precision)
        if reason:
            self.sites.append(dataclasses.replace(site, reason=reason))
            return None
        self.sites.append(dataclasses.replace(site, compute=compute, accum=accum))
        if _already(eqn, compute, accum):
            return None
        return Cast(compute, accum, (bool(sources[0]), bool(sources[1])), self._of_tangents)

    def _formats_in_rule(self, site: Site) -> tuple[Format, Format]:
        """Returns the formats of a product inside a derivative rule: those of the products that it differentiates.

        Raises:
          ValueError: these differ, and the product has no parameter that tells to which of them it belongs.
        """
        done = [one for one in self._call or () if one.compute is not None]
        own = [one for one in done if site.has_parameter and one.path == site.path]
        found = {(one.compute, one.accum) for one in own or done}
        if len(found) > 1:
            where = site.path or "this function"
            raise ValueError(
                f"rules give products inside one custom derivative at '{where}' different formats, but in its "
                "derivative rule these products cannot be told apart: give them one format."
            )
        return found.pop() if found else self.policy.at(site.path)  # pyright: ignore[reportReturnType]

    def _site(self, eqn: Any, sources: Origins, scope: str) -> Site:
        """Builds the site of a product, not yet decided."""
        parameter = sources[1] or sources[0]
        path, op = parameter or clean_scope(scope, self.root), eqn.primitive.name
        index = self._counts[path, op]
        self._counts[path, op] += 1
        lhs, rhs, out = (_describe(atom.aval) for atom in (*eqn.invars[:2], eqn.outvars[0]))
        return Site(path, op, index, bool(parameter), lhs, rhs, out, _flops(eqn))

    def _report_hidden(self, jaxpr: Any, scope: str, holder: str) -> None:
        """Records the products inside an equation that is not entered, so that they are not passed over in silence."""
        for eqn in jaxpr.eqns:
            if eqn.primitive.name in PRODUCTS:
                site = self._site(eqn, [None, None], _join(scope, _compat.scope_of(eqn)))
                self.sites.append(dataclasses.replace(site, reason=f"inside {holder}, which policies do not enter"))
            for inner in [*(i.jaxpr for i in _compat.inner_jaxprs(eqn)), *_compat.hidden_jaxprs(eqn)]:
                self._report_hidden(inner, scope, holder)

    def require_every_rule_used(self) -> None:
        """Raises ValueError if a rule matched no site, naming the nearest one."""
        names = [(site.path, site.name, site.full_name) for site in self.sites]
        unused = [rule for rule in self.policy.rules if not any(rule.matches(*each) for each in names)]
        if unused:
            raise ValueError(_unused_message(unused[0].pattern, len(unused), len(self.policy.rules), self.sites))
        for rule in self.policy.rules:
            matched = [site for site, each in zip(self.sites, names, strict=True) if rule.matches(*each)]
            if all(site.reason for site in matched):
                why = f"{matched[0].name}: {matched[0].reason}"
                raise ValueError(f"rule '{rule.pattern}' matches only sites that cannot be cast ({why}).")


def _unused_message(pattern: str, unused: int, total: int, sites: Sequence[Site]) -> str:
    """Says which rule matched nothing and what it may have meant."""
    names = list(dict.fromkeys(site.name for site in sites))
    if not names:
        return f"rule '{pattern}' matched no site: the computation has no products."
    literal = pattern.replace("**/", "").replace("/**", "")
    near = difflib.get_close_matches(literal, names, n=1, cutoff=0) or names[:1]
    return f"{unused} of {total} rules matched no site: '{pattern}'. Nearest site: '{near[0]}'."


def _why_not(eqn: Any, compute: Format, asked: bool, default_precision: Any) -> str:
    """Returns why a product is left alone, or an empty string."""
    dtypes = [str(atom.aval.dtype) for atom in eqn.invars[:2]]
    wide = compute.name == "float64"
    if other := [dtype for dtype in dtypes if dtype not in CASTABLE and not (wide and dtype == "float64")]:
        return f"{other[0]} operand"
    if str(eqn.outvars[0].aval.dtype) not in CASTABLE | {"float64"}:
        return f"{eqn.outvars[0].aval.dtype} result"
    precision = eqn.params.get("precision")
    explicit = {str(p) for p in (precision if isinstance(precision, tuple) else (precision,))} - {"None", "DEFAULT"}
    if explicit and not asked and precision != default_precision:
        return f"explicit precision {sorted(explicit)[0]}"
    return ""


def _already(eqn: Any, compute: Format, accum: Format) -> bool:
    """Returns whether a product is, as it stands, what the policy asks for."""
    if compute.name not in ("float32", "float64"):
        return False  # JAX's own derivative would multiply in mixed types.
    dtypes = {np.dtype(atom.aval.dtype) for atom in eqn.invars[:2]}
    return dtypes == {compute.dtype} and np.dtype(eqn.outvars[0].aval.dtype) == accum.dtype


def _flops(eqn: Any) -> int:
    """Returns two times the multiplications of a product."""
    lhs, rhs, out = (atom.aval.shape for atom in (*eqn.invars[:2], eqn.outvars[0]))
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = eqn.params["dimension_numbers"]
        return 2 * math.prod(out) * math.prod(lhs[axis] for axis in contracted)
    if eqn.primitive.name in UNSUPPORTED:
        return 2 * math.prod(out) * lhs[-1]
    out_features = rhs[eqn.params["dimension_numbers"].rhs_spec[0]]
    return 2 * math.prod(out) * math.prod(rhs) // max(out_features, 1)


def _describe(aval: Any) -> str:
    """Writes an abstract array as in `float32[8,128]`."""
    return f"{aval.dtype}[{','.join(map(str, aval.shape))}]"


def _join(outer: str, inner: str) -> str:
    """Joins two name stacks."""
    return f"{outer}/{inner}" if outer and inner else outer or inner

"""The harvest: evaluates a jaxpr and returns, beside its outputs, what a collector makes of the marked values in it.

It is purely functional, so it runs inside jit. Control flow is rebuilt with the collected as additional results: merged
over iterations (or stacked, one per iteration of a scan), empty for a branch that was not taken.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
from jax import lax

from precision_lab.rewrite import _compat
from precision_lab.rewrite.marks import MARKED, Mark

Found = dict[Mark, Any]
Values = list[Any]


class Collector(NamedTuple):
    """What is collected of marked values.

    Attributes:
      wants: whether a mark is collected.
      measure: from (mark, array) pairs to a pytree of arrays for each; it gets all pairs of a jaxpr at once.
      merge: joins two of these.
      empty: from the shapes of such a pytree to the one that changes nothing when merged.
      stacked: whether a scan keeps one per iteration on a new first axis, instead of merging them.
      differentiable: whether the outputs of the harvest are to be differentiated, what is collected being constant.
        Then there must be nothing to collect inside a custom derivative.
    """

    wants: Callable[[Mark], bool]
    measure: Callable[[Sequence[tuple[Mark, Any]]], Sequence[Any]]
    merge: Callable[[Any, Any], Any]
    empty: Callable[[Any], Any]
    stacked: bool = False
    differentiable: bool = False


def harvest(jaxpr: Any, operands: Sequence[Any], collector: Collector) -> tuple[Values, Found]:
    """Returns the outputs of a closed jaxpr and what was collected, in the order of execution.

    The result cannot be differentiated, unless the collector says so; observe what has been differentiated instead.
    """
    if collector.differentiable:
        return _evaluate(jaxpr, operands, collector)

    @jax.custom_jvp
    def run(*given: Any) -> tuple[Values, list[Any]]:
        out, found = _evaluate(jaxpr, given, collector)
        order[:] = found
        return out, list(found.values())

    @run.defjvp
    def _refuse(primals: Any, tangents: Any) -> Any:
        del primals, tangents
        raise ValueError("an observed function cannot be differentiated: observe the gradient, as observed(grad(f)).")

    order: list[Mark] = []
    out, collected = run(*operands)
    return out, dict(zip(order, collected, strict=True))


def marks_in(jaxpr: Any, collector: Collector) -> list[Mark]:
    """Returns the marks that a harvest of this jaxpr collects, in the order of execution, each once."""
    return list(dict.fromkeys(_marks_in(jaxpr, collector, again=False)))


def _marks_in(jaxpr: Any, collector: Collector, *, again: bool) -> list[Mark]:
    """Returns the marks of a jaxpr that are collected; see `_is_collected` for `again`."""
    marks = []
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == MARKED and _is_collected(eqn.params["mark"], collector, again):
            marks.append(eqn.params["mark"])
        for inner in _inner(eqn):
            marks += _marks_in(inner, collector, again=again or _is_rematerialised(eqn))
    return marks


def _inner(eqn: Any) -> list[Any]:
    """Returns the jaxprs in an equation in which marks are found."""
    if eqn.primitive.name == "shard_map":
        return [eqn.params["jaxpr"]]
    if eqn.primitive.name not in _REBUILD:
        return []
    inner = [part.jaxpr for part in _compat.inner_jaxprs(eqn)]
    return inner[1:] if eqn.primitive.name == "while" else inner  # a loop's condition has no results to carry


def _is_collected(mark: Mark, collector: Collector, again: bool) -> bool:
    """Returns whether a mark is collected; `again` says that forward values are seen a second time."""
    return not mark.is_tangent and collector.wants(mark) and (mark.is_cotangent or not again)


def _is_rematerialised(eqn: Any) -> bool:
    """Returns whether an equation is the backward pass of a checkpoint, which repeats its forward pass."""
    return eqn.primitive.name in _compat.REMATS and eqn.params["differentiated"]


def _evaluate(jaxpr: Any, operands: Sequence[Any], collector: Collector, again: bool = False) -> tuple[Values, Found]:
    """Evaluates a jaxpr; returns its outputs and the collected."""
    values = dict(zip(jaxpr.constvars, _compat.consts_of(jaxpr), strict=True))
    values |= dict(zip(jaxpr.invars, operands, strict=True))
    seen: list[tuple[Mark, Any]] = []  # in order of execution: a value to be measured, or what an inner jaxpr collected
    inner: list[bool] = []

    def read(atom: Any) -> Any:
        return atom.val if _compat.is_literal(atom) else values[atom]

    for eqn in jaxpr.eqns:
        given = [read(atom) for atom in eqn.invars]
        if eqn.primitive.name == MARKED:
            out, new = given[:1], {}
            if _is_collected(eqn.params["mark"], collector, again):
                seen.append((eqn.params["mark"], given[1:] or given[0]))
                inner.append(False)
            elif collector.differentiable:
                out = _compat.bind(eqn, given)
        else:
            with _compat.as_traced(eqn):
                out, new = _execute(eqn, given, collector, again)
        seen += new.items()
        inner += [True] * len(new)
        values.update(zip(eqn.outvars, out, strict=True))
    return [read(atom) for atom in jaxpr.outvars], _measured(seen, inner, collector)


def _measured(seen: Sequence[tuple[Mark, Any]], inner: Sequence[bool], collector: Collector) -> Found:
    """Returns what was collected; all values of a jaxpr are measured at once, `inner` says which were before."""
    new = [item for item, done in zip(seen, inner, strict=True) if not done]
    measured = iter(collector.measure(new) if new else ())
    found: Found = {}
    for (mark, value), done in zip(seen, inner, strict=True):
        collected = value if done else next(measured)
        found[mark] = collector.merge(found[mark], collected) if mark in found else collected
    return found


def _execute(eqn: Any, given: Values, collector: Collector, again: bool) -> tuple[Values, Found]:
    """Evaluates one equation that is no mark."""
    inside = [
        list(dict.fromkeys(_marks_in(inner, collector, again=again or _is_rematerialised(eqn))))
        for inner in _inner(eqn)
    ]
    if not any(inside):
        return _compat.bind(eqn, given), {}
    repeated = again or _is_rematerialised(eqn)
    run = [functools.partial(_run, inner, collector, repeated) for inner in _inner(eqn)]
    return _REBUILD[eqn.primitive.name](eqn, run, given, collector)


def _run(jaxpr: Any, collector: Collector, again: bool, *operands: Any) -> tuple[Values, Found]:
    """Evaluates a jaxpr inside an equation."""
    return _evaluate(jaxpr, operands, collector, again=again)


class _Flat(NamedTuple):
    """The collected as a pytree whose marks need no order: a list, and the marks beside it."""

    marks: list[Mark]

    def of(self, found: Found) -> list[Any]:
        """Returns the collected in the order of the marks."""
        return [found[mark] for mark in self.marks]

    def back(self, collected: Sequence[Any]) -> Found:
        """Returns the collected under their marks."""
        return dict(zip(self.marks, collected, strict=True))


def _shapes(run: Callable, operands: Sequence[Any]) -> Found:
    """Returns the shapes of what `run` collects at these operands."""
    found: Found = {}

    def collected(*given: Any) -> list[Any]:
        new = run(*given)[1]
        found.update(new)
        return list(new.values())

    shapes = jax.eval_shape(collected, *operands)
    return dict(zip(found, shapes, strict=True))


def _nothing(shape: Any, collector: Collector) -> Any:
    """Returns what changes nothing when merged, of the type that what is merged has."""
    return _compat.varying(collector.empty(shape))


def _jit(eqn: Any, run: Sequence[Callable], given: Values, collector: Collector) -> tuple[Values, Found]:
    """Rebuilds a jit."""
    del collector
    flat = _Flat([])

    def body(*operands: Any) -> tuple[Values, list[Any]]:
        out, found = run[0](*operands)
        flat.marks[:] = found
        return out, flat.of(found)

    body.__name__ = eqn.params["name"]
    out, collected = jax.jit(body)(*given)
    return out, flat.back(collected)


def _inline(eqn: Any, run: Sequence[Callable], given: Values, collector: Collector) -> tuple[Values, Found]:
    """Evaluates the body of a custom derivative, which is not differentiated any more, in place."""
    if collector.differentiable:
        raise ValueError(
            f"a quantizer with a state is inside a custom derivative ({_compat.function_name(eqn)}), whose own "
            "rule would pass it over: leave its products out by a rule, or differentiate what is written out."
        )
    return run[0](*given)


def _remat(eqn: Any, run: Sequence[Callable], given: Values, collector: Collector) -> tuple[Values, Found]:
    """Evaluates a checkpoint in place, behind the barrier that keeps XLA from undoing it."""
    if collector.differentiable and not eqn.params["differentiated"]:
        return _checkpoint(eqn, run[0], given)
    if eqn.params["differentiated"] and eqn.params["prevent_cse"]:
        given = list(lax.optimization_barrier(tuple(given)))
    return run[0](*given)


def _checkpoint(eqn: Any, run: Callable, given: Values) -> tuple[Values, Found]:
    """Rebuilds a checkpoint that is yet to be differentiated."""
    flat = _Flat([])

    def body(*operands: Any) -> tuple[Values, list[Any]]:
        out, found = run(*operands)
        flat.marks[:] = found
        return out, flat.of(found)

    out, collected = jax.checkpoint(body, **{key: eqn.params[key] for key in ("prevent_cse", "policy")})(*given)
    return out, flat.back(collected)


def _scan(eqn: Any, run: Sequence[Callable], given: Values, collector: Collector) -> tuple[Values, Found]:
    """Rebuilds a scan."""
    consts, carry = _compat.scan_arity(eqn)
    xs = given[consts + carry :]
    one = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in xs]
    shapes = _shapes(run[0], [*given[: consts + carry], *one])
    flat = _Flat(list(shapes))

    def body(state: Any, x: Values) -> tuple[Any, Any]:
        values, merged = state
        out, found = run[0](*given[:consts], *values, *x)
        if collector.stacked:
            return (out[:carry], merged), (out[carry:], flat.of(found))
        new = [collector.merge(old, each) for old, each in zip(merged, flat.of(found), strict=True)]
        return (out[:carry], new), (out[carry:], [])

    start = [] if collector.stacked else [_nothing(shape, collector) for shape in shapes.values()]
    options = {key: eqn.params[key] for key in ("length", "reverse", "unroll")}
    (state, merged), (ys, stacked) = lax.scan(body, (given[consts : consts + carry], start), xs, **options)
    return [*state, *ys], flat.back(stacked if collector.stacked else merged)


def _while(eqn: Any, run: Sequence[Callable], given: Values, collector: Collector) -> tuple[Values, Found]:
    """Rebuilds a while loop; what its iterations collect is merged."""
    cond, body = eqn.params["cond_nconsts"], eqn.params["cond_nconsts"] + eqn.params["body_nconsts"]
    shapes = _shapes(run[0], given[cond:])
    flat = _Flat(list(shapes))
    condition = _compat.inner_jaxprs(eqn)[0].jaxpr

    def step(state: Any) -> Any:
        out, found = run[0](*given[cond:body], *state[0])
        return out, [collector.merge(old, each) for old, each in zip(state[1], flat.of(found), strict=True)]

    start = [_nothing(shape, collector) for shape in shapes.values()]
    out, merged = lax.while_loop(
        lambda state: _compat.evaluate_jaxpr(condition, *given[:cond], *state[0])[0], step, (given[body:], start)
    )
    return out, flat.back(merged)


def _cond(eqn: Any, run: Sequence[Callable], given: Values, collector: Collector) -> tuple[Values, Found]:
    """Rebuilds a cond or switch; a branch that is not taken collects what is empty."""
    del eqn
    shapes: Found = {}
    for branch in run:
        shapes |= _shapes(branch, given[1:])
    flat = _Flat(list(shapes))

    def completed(branch: Callable, *operands: Any) -> tuple[Values, list[Any]]:
        out, found = branch(*operands)
        nothing = {mark: _nothing(shape, collector) for mark, shape in shapes.items()}
        return out, [collector.merge(nothing[mark], found[mark]) if mark in found else nothing[mark] for mark in shapes]

    out, collected = lax.switch(given[0], [functools.partial(completed, branch) for branch in run], *given[1:])
    return out, flat.back(collected)


def _shard_map(eqn: Any, run: Sequence[Callable], given: Values, collector: Collector) -> tuple[Values, Found]:
    """Rebuilds a shard_map; what its devices collect is merged, a replicated value counting once for each."""
    flat = _Flat([])

    def body(*operands: Any) -> tuple[Values, list[Any]]:
        out, found = run[0](*operands)
        flat.marks[:] = found
        return out, flat.of(found)

    out, apart = _compat.sharded(eqn, body)(*given)
    devices = jax.tree.leaves(apart)[0].shape[0]
    parts = [jax.tree.map(lambda leaf, i=i: leaf[i], apart) for i in range(devices)]
    merged = [functools.reduce(collector.merge, each) for each in zip(*parts, strict=True)]
    return out, flat.back(merged)


_REBUILD = {"scan": _scan, "while": _while, "cond": _cond, "shard_map": _shard_map}
_REBUILD |= dict.fromkeys(_compat.JITS, _jit) | dict.fromkeys(_compat.REMATS, _remat)
_REBUILD |= dict.fromkeys(_compat.CUSTOM_RULES | {_compat.CUSTOM_VMAP}, _inline)

"""The interpreter: evaluates a jaxpr as its plan says, and all else as it stood.

Control flow with something to do inside is rebuilt through JAX's public transformations, so the result can be jitted,
differentiated, batched, scanned and sharded like any function; a jaxpr with nothing to do is bound untouched.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax

from precision_lab.rewrite import _compat
from precision_lab.rewrite.adapters import adapted, is_matrix
from precision_lab.rewrite.bilinear import contracted_axes, layouts_of
from precision_lab.rewrite.cast import PRODUCT, cast_product
from precision_lab.rewrite.custom_vmap import bind_custom_vmap
from precision_lab.rewrite.held import require_state
from precision_lab.rewrite.lookup import looked_up
from precision_lab.rewrite.marks import OPERANDS, OUTPUT, SHADOW, mark_value
from precision_lab.rewrite.operations import Operate, as_traced, like_operand, operate, rounded
from precision_lab.rewrite.parameters import Parameter, can_scan, dense, is_stored, passed
from precision_lab.rewrite.quantized import NOTHING_GIVEN
from precision_lab.rewrite.scaled import scaled_product
from precision_lab.rewrite.slicing import given_arrays, with_given_arrays
from precision_lab.rewrite.steps import Cast, Chosen, Enter, Lookup, Observed, Plan
from precision_lab.rewrite.traced_compute import product_under_params

Values = list[Any]


def evaluate(plan: Plan, jaxpr: Any, consts: Sequence[Any], operands: Sequence[Any]) -> Values:
    """Returns the outputs of a jaxpr, evaluated as `plan` says, in the types that the jaxpr has for them."""
    return as_traced(jaxpr.outvars, [dense(x) for x in _evaluate(plan, jaxpr, consts, operands)])


def _evaluate(plan: Plan, jaxpr: Any, consts: Sequence[Any], operands: Sequence[Any]) -> Values:
    """Returns the outputs of a jaxpr in the types that they have under autocast."""
    values = dict(zip(jaxpr.constvars, consts, strict=True)) | dict(zip(jaxpr.invars, operands, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if _compat.is_literal(atom) else values[atom]

    for step, eqn in zip(plan.steps, jaxpr.eqns, strict=True):
        given = [read(atom) for atom in eqn.invars]
        with _compat.as_traced(eqn):
            values.update(zip(eqn.outvars, _execute(step, eqn, given), strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _execute(step: Cast | Lookup | Operate | Chosen | Observed | Enter | None, eqn: Any, given: Values) -> Values:
    """Evaluates one equation."""
    if step is None and (result := passed(eqn, given)):
        return result
    if not _takes_parameters(step, eqn, given):
        given = [dense(x) for x in given]
    if step is None:
        return _compat.bind(eqn, as_traced(eqn.invars, given))
    if isinstance(step, Lookup):
        return [looked_up(eqn, given[0], given[1], step)]
    if isinstance(step, Observed):
        return _observe(step, eqn, given)
    if isinstance(step, Chosen):
        return lax.switch(step.index, [functools.partial(_execute, one, eqn) for one in step.steps], given)
    if isinstance(step, Cast) and step.amaxes is not None:
        return rounded([_scaled(step, eqn, given)], step.treatment.round)
    if isinstance(step, Cast):
        return rounded([_product(step, eqn, given)], step.treatment.round)
    if isinstance(step, Operate):
        return operate(step, eqn, given)
    results = _enter(step, eqn, given)
    return rounded(like_operand(results, given) if step.is_activation else results, step.round)


def _takes_parameters(step: Any, eqn: Any, given: Values) -> bool:
    """Returns whether an equation takes parameters as they are stored."""
    if isinstance(step, Enter):
        scans = eqn.primitive.name == "scan" and all(map(can_scan, given[sum(_compat.scan_arity(eqn)) :]))
        return scans or eqn.primitive.name in _compat.JITS | _compat.REMATS
    return isinstance(step, Lookup) or (isinstance(step, Cast) and step.amaxes is None)


def _product(step: Cast, eqn: Any, given: Values) -> Any:
    """Evaluates a product of operands of which some may be parameters that are not arrays yet."""
    operands = list(given)
    _require_states(step, operands)
    for operand, quantizer in enumerate(step.before or (None, None)):
        x = operands[operand]
        if isinstance(x, Parameter):
            layout = layouts_of(eqn, given[0].shape, given[1].shape).operands[operand]
            axes = contracted_axes(eqn, operand)
            x.noted(step.site, quantizer, axes, OPERANDS[operand], layout, is_matrix(eqn, operand))
            operands[operand] = x if is_stored(x) and quantizer is not None else x.values().astype(x.dtype)
    options = {"before": step.before, "of_tangents": step.of_tangents, "given": step.given}
    if step.compute is None:
        out = cast_product(eqn, operands[0], operands[1], step.casting, **options)
    else:
        take = functools.partial(cast_product, eqn, **options)
        out = product_under_params(take, dense(operands[0]), dense(operands[1]), step.casting, step.compute)
    if step.adapter is None:
        return out
    operand, adapter = step.adapter
    return adapted(eqn, dense(given[1 - operand]), out, adapter, operand, step.treatment, step.compute)


def _require_states(step: Cast, operands: Values) -> None:
    """Raises ValueError where a quantizer of a product asks for a state that it has not."""
    known = step.given if step.before else (NOTHING_GIVEN, NOTHING_GIVEN)
    for role, x, one, given in zip(OPERANDS, operands, step.casting.operands, known, strict=True):
        if not is_stored(x):
            require_state(step.site, role, one.quantizer, given)
    require_state(step.site, "cotangent", step.casting.cotangent.quantizer, NOTHING_GIVEN)


def _scaled(step: Cast, eqn: Any, given: Values) -> Any:
    """Evaluates a product under scales from outside."""
    assert step.amaxes is not None
    before = step.before is not None
    return scaled_product(eqn, given[0], given[1], step.casting, step.amaxes, before=before)


def _enter(step: Enter, eqn: Any, given: Values) -> Values:
    """Evaluates an equation with something to do inside; jit and checkpoint pass on the types that they find."""
    name, parts = eqn.primitive.name, _compat.inner_jaxprs(eqn)
    if name in _compat.JITS | _compat.REMATS:
        inner = [_callable(plan, part.jaxpr, _evaluate) for plan, part in zip(step.plans, parts, strict=True)]
        return list(_REBUILD[name](eqn, inner, given))
    if name == "scan":
        return _scan(step, eqn, parts[0].jaxpr, given)
    given = as_traced(eqn.invars, given)
    if name in _compat.CUSTOM_RULES:
        return _compat.bind_custom_rule(eqn, given, functools.partial(_rewritten, step))
    if name == _compat.CUSTOM_VMAP:
        return bind_custom_vmap(eqn, given, functools.partial(_rewritten, step))
    if name == _compat.LINEAR_SOLVE or eqn.params.get("branches_platforms"):
        bind = _compat.bind_linear_solve if name == _compat.LINEAR_SOLVE else _compat.bind_platform_cond
        return bind(eqn, given, [_traced(plan, part.jaxpr) for plan, part in zip(step.plans, parts, strict=True)])
    inner = [_callable(plan, part.jaxpr) for plan, part in zip(step.plans, parts, strict=True)]
    return list(_REBUILD[name](eqn, inner, given))


def _observe(step: Observed, eqn: Any, given: Values) -> Values:
    """Evaluates a product, marking what goes in and what comes out."""
    marked = [mark_value(x, step.site, role, fmt) for x, role, fmt in zip(given, OPERANDS, step.operands, strict=False)]
    [out] = _execute(step.step, eqn, [*marked, *given[len(marked) :]])
    for number, shadow in enumerate(step.shadows):
        mark_value(_execute(shadow, eqn, given)[0], step.site, f"{SHADOW}{number}")
    return [mark_value(out, step.site, OUTPUT, cotangent_fmt=step.cotangent)]


def _callable(plan: Plan, jaxpr: Any, how: Callable[..., Values] = evaluate) -> Callable[..., Values]:
    """Returns the function that a planned jaxpr computes."""
    return lambda *operands: how(plan, jaxpr, _compat.consts_of(jaxpr), operands)


def _rewritten(step: Enter, jaxpr: Any, part: _compat.Part) -> Any:
    """Returns a jaxpr of the same signature, rewritten."""
    plan = step.replan(jaxpr, part)
    return jaxpr if plan.is_empty else _traced(plan, jaxpr)


def _traced(plan: Plan, jaxpr: Any) -> Any:
    """Returns a jaxpr evaluated as planned, as a jaxpr again."""
    return jax.make_jaxpr(_callable(plan, jaxpr))(*(atom.aval for atom in jaxpr.invars))


def _jit(eqn: Any, inner: Sequence[Callable], given: Values) -> Values:
    """Rebuilds a jit, so that its name stays in profiles and its body is compiled once."""
    run = inner[0]
    run.__name__ = eqn.params["name"]
    shardings = {key: _given_shardings(eqn.params[key]) for key in ("in_shardings", "out_shardings")}
    return jax.jit(run, **{key: value for key, value in shardings.items() if any(value)})(*given)


def _given_shardings(shardings: Sequence[Any]) -> Any:
    """Returns the shardings of a jit, None where it leaves them open."""
    return [sharding if isinstance(sharding, jax.sharding.Sharding) else None for sharding in shardings]


def _remat(eqn: Any, inner: Sequence[Callable], given: Values) -> Values:
    """Rebuilds a checkpoint."""
    policy = eqn.params["policy"] and _compat.saves_products(eqn.params["policy"], PRODUCT)
    return jax.checkpoint(inner[0], prevent_cse=eqn.params["prevent_cse"], policy=policy)(*given)


def _scan(step: Enter, eqn: Any, jaxpr: Any, given: Values) -> Values:
    """Rebuilds a scan; one over layers slices what is given to their quantizers too."""
    plan = step.plans[0]
    known = given_arrays(plan) if step.is_over_layers else []
    consts, carry = _compat.scan_arity(eqn)
    whole = [
        x if isinstance(x, Parameter) else as_traced([atom], [x])[0] for atom, x in zip(eqn.invars, given, strict=True)
    ]

    def body(state: Values, of_layer: tuple[Values, Values]) -> tuple[Values, Values]:
        x, own = of_layer
        run = _callable(with_given_arrays(plan, own) if own else plan, jaxpr)
        slices = [each.sliced() if isinstance(each, Parameter) else each for each in x]
        out = run(*whole[:consts], *state, *slices)
        return out[:carry], out[carry:]

    options = {key: eqn.params[key] for key in ("length", "reverse", "unroll")}
    start, xs = [dense(x) for x in whole[consts : consts + carry]], (whole[consts + carry :], known)
    state, ys = lax.scan(body, start, xs, **options)
    return [*state, *ys]


def _while(eqn: Any, inner: Sequence[Callable], given: Values) -> Values:
    """Rebuilds a while loop."""
    cond, body = eqn.params["cond_nconsts"], eqn.params["cond_nconsts"] + eqn.params["body_nconsts"]
    return lax.while_loop(
        lambda state: inner[0](*given[:cond], *state)[0],
        lambda state: inner[1](*given[cond:body], *state),
        given[body:],
    )


def _cond(eqn: Any, inner: Sequence[Callable], given: Values) -> Values:
    """Rebuilds a cond or switch."""
    return lax.switch(given[0], inner, *given[1:])


def _shard_map(eqn: Any, inner: Sequence[Callable], given: Values) -> Values:
    """Rebuilds a shard_map."""
    axes = eqn.params["newly_manual_axes"]
    options = {key: eqn.params[key] for key in ("mesh", "in_specs", "check_vma")}
    run = jax.shard_map(inner[0], out_specs=list(eqn.params["out_specs"]), axis_names=axes, **options)
    return run(*given)


def _inlined(eqn: Any, inner: Sequence[Callable], given: Values) -> Values:
    """Evaluates a call that says nothing but what it calls."""
    del eqn
    return inner[0](*given)


_REBUILD = {"while": _while, "cond": _cond, "shard_map": _shard_map}
_REBUILD |= dict.fromkeys(_compat.JITS, _jit) | dict.fromkeys(_compat.REMATS, _remat)
_REBUILD |= dict.fromkeys(_compat.INLINED, _inlined)

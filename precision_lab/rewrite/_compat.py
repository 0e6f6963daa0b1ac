"""Every use of what JAX does not promise to keep: the insides of jaxpr equations, and how a primitive is made.

Tested with JAX 0.10.2 and 0.12.0; `tests/rewrite/test_compat.py` names the versions and fails on others. Between these
two, `ClosedJaxpr` and `Jaxpr` became one class and `scan` replaced its counts by trees.
"""

from __future__ import annotations

import contextlib
import enum
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.extend.linear_util
from jax.core import ShapedArray
from jax.extend import source_info_util
from jax.interpreters import ad, batching, mlir

Equation = Any
Jaxpr = Any


class Inner(NamedTuple):
    """A jaxpr inside an equation; `operands[i]` is the equation's operand that its i-th input is, on every entry."""

    jaxpr: Jaxpr
    operands: tuple[int | None, ...]


JITS = frozenset(("jit", "pjit"))
REMATS = frozenset(("remat2", "remat", "checkpoint"))
CUSTOM_RULES = frozenset(("custom_jvp_call", "custom_vjp_call"))
INLINED = frozenset(("closed_call", "call"))
LINEAR_SOLVE, CUSTOM_VMAP = "custom_linear_solve", "custom_vmap_call"
CLOSED = CUSTOM_RULES | {LINEAR_SOLVE, CUSTOM_VMAP}  # what runs inside these is typed for what was traced
ENTERED = JITS | REMATS | CLOSED | INLINED | {"scan", "while", "cond", "shard_map"}


def inner_jaxprs(eqn: Equation) -> list[Inner]:
    """Returns the jaxprs of an equation that the interpreter enters, in a fixed order; empty for all others."""
    name, params, count = eqn.primitive.name, eqn.params, len(eqn.invars)
    if name in JITS | REMATS | {"shard_map"}:
        return [Inner(params["jaxpr"], tuple(range(count)))]
    if name in CUSTOM_RULES | INLINED:
        return [Inner(params["call_jaxpr"], tuple(range(count)))]
    if name == "scan":
        consts, carry = scan_arity(eqn)
        carried = range(consts, consts + carry)
        return [Inner(params["jaxpr"], tuple(None if i in carried else i for i in range(count)))]
    if name == "while":
        cond, body = params["cond_nconsts"], params["body_nconsts"]
        carry = (None,) * (count - cond - body)
        return [
            Inner(params["cond_jaxpr"], (*range(cond), *carry)),
            Inner(params["body_jaxpr"], (*range(cond, cond + body), *carry)),
        ]
    if name == "cond":
        return [Inner(branch, tuple(range(1, count))) for branch in params["branches"]]
    if name == CUSTOM_VMAP:
        return [Inner(params["call"], tuple(range(count)))]
    if name == LINEAR_SOLVE:
        return _linear_solve_jaxprs(params)
    return []


def _linear_solve_jaxprs(params: dict[str, Any]) -> list[Inner]:
    """Returns the jaxprs of a linear solve: the map, its transpose, and the solvers of both, as far as given."""
    inner, start = [], 0
    for jaxpr, consts in zip(params["jaxprs"], params["const_lengths"], strict=True):
        if jaxpr is not None:
            given = (None,) * (len(jaxpr.in_avals) - consts)
            inner.append(Inner(jaxpr, (*range(start, start + consts), *given)))
        start += consts
    return inner


def bind_linear_solve(eqn: Equation, operands: Sequence[Any], jaxprs: Sequence[Jaxpr]) -> list[Any]:
    """Evaluates a linear solve with the jaxprs of `inner_jaxprs` replaced."""
    new, old = iter(jaxprs), eqn.params["jaxprs"]
    params = eqn.params | {"jaxprs": type(old)(*(None if jaxpr is None else next(new) for jaxpr in old))}
    return list(eqn.primitive.bind(*operands, **params))


def bind_platform_cond(eqn: Equation, operands: Sequence[Any], branches: Sequence[Jaxpr]) -> list[Any]:
    """Evaluates a cond with its branches replaced; keeps to which platforms they belong."""
    return list(eqn.primitive.bind(*operands, **(eqn.params | {"branches": tuple(branches)})))


def saves_products(policy: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Returns a policy of `jax.checkpoint` that judges products of ours as it would the products that they take.

    Args:
      policy: what JAX asks of each equation: `policy(primitive, *avals, **params)`.
      name: of the functions and the primitive that our products are.
    """

    def judge(primitive: Any, *avals: Any, **params: Any) -> Any:
        jaxpr = None
        if primitive.name == name:
            jaxpr = jax.make_jaxpr(lambda *operands: primitive.impl(*operands, **params))(*avals)
        elif primitive.name == "custom_jvp_call" and _function_name(params["call_jaxpr"]) == name:
            jaxpr = params["call_jaxpr"]
        for eqn in getattr(jaxpr, "eqns", ()):
            if eqn.primitive.name in ("dot_general", "conv_general_dilated"):
                return policy(eqn.primitive, *(atom.aval for atom in eqn.invars), **eqn.params)
        return policy(primitive, *avals, **params)

    return judge


def _function_name(jaxpr: Jaxpr) -> str:
    """Returns the name of the function that was traced to a jaxpr, as far as known."""
    info = getattr(jaxpr, "jaxpr", jaxpr).debug_info
    return str(getattr(info, "func_src_info", "")).split(" ")[0]


def hidden_jaxprs(eqn: Equation) -> list[Jaxpr]:
    """Returns the jaxprs in the parameters of an equation that the interpreter does not enter."""
    if eqn.primitive.name in ENTERED:
        return []
    values = [v for value in eqn.params.values() for v in (value if isinstance(value, (tuple, list)) else (value,))]
    return [value for value in values if hasattr(value, "eqns") and hasattr(value, "invars")]


def scan_arity(eqn: Equation) -> tuple[int, int]:
    """Returns how many of a scan's operands are constants and how many are carried; the rest are scanned over."""
    if "num_consts" in eqn.params:  # JAX 0.10
        return eqn.params["num_consts"], eqn.params["num_carry"]
    consts, carry, _ = (len(list(group)) for group in eqn.params["ft_in"].unpack())
    return consts, carry


def sharded(eqn: Equation, body: Callable[..., tuple[list[Any], Any]]) -> Callable[..., tuple[list[Any], Any]]:
    """Returns the shard_map of `body` that a shard_map equation is, with one more result.

    Args:
      eqn: the equation.
      body: from its operands on one device to (its results, a pytree), whose parts get a new first axis for devices.
    """
    axes = tuple(sorted(eqn.params["newly_manual_axes"]))

    def apart(*operands: Any) -> tuple[list[Any], Any]:
        out, more = body(*operands)
        return out, jax.tree.map(lambda leaf: leaf[None], more)

    return jax.shard_map(
        apart,
        mesh=eqn.params["mesh"],
        in_specs=tuple(eqn.params["in_specs"]),
        out_specs=(list(eqn.params["out_specs"]), jax.sharding.PartitionSpec(axes)),
        axis_names=set(axes),
        check_vma=eqn.params["check_vma"],
    )


def varying(tree: Any) -> Any:
    """Returns arrays as values that may differ between the devices of the shard_map being traced, if there is one."""
    axes = jax.sharding.get_abstract_mesh().manual_axes

    def vary(leaf: Any) -> Any:
        new = tuple(axis for axis in axes if axis not in jax.typeof(leaf).manual_axis_type.varying)
        return jax.lax.pcast(leaf, new, to="varying") if new else leaf

    return jax.tree.map(vary, tree) if axes else tree


def consts_of(jaxpr: Jaxpr) -> Sequence[Any]:
    """Returns the values of a jaxpr's constants; an open jaxpr has none."""
    return getattr(jaxpr, "consts", ())


def evaluate_jaxpr(jaxpr: Jaxpr, *operands: Any) -> list[Any]:
    """Evaluates a closed jaxpr as it stands."""
    return jex.jaxpr_as_fun(jaxpr)(*operands)


def is_literal(atom: Any) -> bool:
    """Returns whether an operand is a constant written into the equation."""
    return isinstance(atom, jex.Literal)


def function_name(eqn: Equation) -> str:
    """Returns the name of the function that a jit or one with rules of its own calls; empty if there is none."""
    if eqn.primitive.name in JITS:
        return eqn.params["name"]
    if eqn.primitive.name not in CUSTOM_RULES | {CUSTOM_VMAP}:
        return ""
    call = eqn.params["call" if eqn.primitive.name == CUSTOM_VMAP else "call_jaxpr"]
    name = getattr(getattr(call, "jaxpr", call).debug_info, "func_name", "")
    return name if name.isidentifier() else ""


def scope_of(eqn: Equation) -> str:
    """Returns the names in force where the equation was traced, relative to its jaxpr, joined by '/'."""
    return str(eqn.source_info.name_stack)


@contextlib.contextmanager
def as_traced(eqn: Equation) -> Iterator[None]:
    """Restores the name scopes and the context (mesh, compute type) under which the equation was traced."""
    names = source_info_util.current_name_stack() + eqn.source_info.name_stack
    with source_info_util.user_context(eqn.source_info.traceback, name_stack=names), eqn.ctx.manager:
        yield


def bind(eqn: Equation, operands: Sequence[Any]) -> list[Any]:
    """Evaluates an equation as it stands."""
    out = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(eqn.params))
    return list(out) if eqn.primitive.multiple_results else [out]


def default_precision() -> Any:
    """Returns the `precision` that a product gets now if its author names none."""
    [eqn] = jax.make_jaxpr(jax.lax.dot)(*[jax.ShapeDtypeStruct((1, 1), "float32")] * 2).eqns
    return eqn.params["precision"]


def rule_may_hold(eqn: Equation, primitives: frozenset[str]) -> bool:
    """Returns whether the rule of an equation, for derivatives or batches, may contain some of `primitives`.

    A custom_jvp's rule is looked into; others, and any in a shard_map, cannot be before they are called.
    """
    if eqn.primitive.name == CUSTOM_VMAP:
        return True
    if eqn.primitive.name not in CUSTOM_RULES:
        return False
    on_mesh = any(not atom.aval.sharding.mesh.empty for atom in eqn.outvars)
    if on_mesh or eqn.primitive.name == "custom_vjp_call":
        return True
    tangents = len(eqn.invars) - eqn.params["num_consts"]
    return _holds(eqn.params["jvp_jaxpr_fun"].call_wrapped(*[False] * tangents)[0], primitives)


def _holds(jaxpr: Jaxpr, primitives: frozenset[str]) -> bool:
    """Returns whether a jaxpr, or one inside it, has an equation of `primitives`."""
    for eqn in jaxpr.eqns:
        inner = [*(part.jaxpr for part in inner_jaxprs(eqn)), *hidden_jaxprs(eqn)]
        if eqn.primitive.name in primitives or any(_holds(one, primitives) for one in inner):
            return True
    return False


def residuals(eqn: Equation, forward: Sequence[Any], operands: Sequence[Any]) -> list[Any]:
    """Returns what the backward rule of a custom_vjp call is given before the cotangents.

    Args:
      eqn: the call, whose forward rule has been traced.
      forward: something for each output of the forward rule, residuals first.
      operands: something for each input of the call.
    """
    _, _, forwarded = eqn.params["out_trees"]()
    outputs = iter(forward)
    return [next(outputs) if i is None else operands[i] for i in forwarded]


class Part(enum.Enum):
    """Which part of a custom derivative a jaxpr is, and so what its inputs are."""

    CALL = "the function or its forward rule: the inputs are the call's"
    TANGENT = "a custom_jvp's rule: the call's inputs, then their tangents"
    BACKWARD = "a custom_vjp's backward rule: what was kept, then the cotangents"


Rewrite = Callable[[Jaxpr, Part], Jaxpr]


def bind_custom_rule(eqn: Equation, operands: Sequence[Any], rewritten: Rewrite) -> list[Any]:
    """Evaluates a custom_jvp or custom_vjp call with its function and its derivative rule rewritten.

    Args:
      eqn: the call.
      operands: its inputs.
      rewritten: maps a jaxpr to one of the same signature, told which part it is.
    """
    params = dict(eqn.params)
    params["call_jaxpr"] = rewritten(params["call_jaxpr"], Part.CALL)
    if "jvp_jaxpr_fun" in params:
        params["jvp_jaxpr_fun"] = _rewrite_thunk(params["jvp_jaxpr_fun"], rewritten, Part.TANGENT)
    else:
        params["fwd_jaxpr_thunk"] = _rewrite_thunk(params["fwd_jaxpr_thunk"], rewritten, Part.CALL)
        params["bwd"] = _rewrite_backward(params["bwd"], rewritten)
    return list(eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(params)))


def _rewrite_thunk(rule: Any, rewritten: Rewrite, part: Part) -> Any:
    """Wraps a thunk that returns (jaxpr, consts, ...) so that its jaxpr is rewritten."""

    def call(*flags: Any) -> tuple[Any, ...]:
        jaxpr, consts, *rest = rule.call_wrapped(*flags)
        new = rewritten(_closed(jaxpr, consts), part)
        return (getattr(new, "jaxpr", new), consts_of(new), *rest)

    return jax.extend.linear_util.wrap_init(call, debug_info=rule.debug_info)


def _rewrite_backward(rule: Any, rewritten: Rewrite) -> Any:
    """Wraps the backward rule of a custom_vjp; it is traced when it is called, and may take and return zeros."""

    def call(*values: Any) -> Any:
        is_array = [hasattr(value, "dtype") and hasattr(value, "shape") for value in values]
        static: list[Any] = []

        def arrays_only(*arrays: Any) -> list[Any]:
            given = iter(arrays)
            out = rule.call_wrapped(*(next(given) if a else v for a, v in zip(is_array, values, strict=True)))
            leaves, tree = jax.tree.flatten(out, is_leaf=lambda leaf: not isinstance(leaf, (list, tuple)))
            kept = [hasattr(leaf, "dtype") and hasattr(leaf, "shape") for leaf in leaves]
            static[:] = [tree, [None if k else leaf for k, leaf in zip(kept, leaves, strict=True)], kept]
            return [leaf for k, leaf in zip(kept, leaves, strict=True) if k]

        arrays = [v for a, v in zip(is_array, values, strict=True) if a]
        jaxpr = rewritten(jax.make_jaxpr(arrays_only)(*arrays), Part.BACKWARD)
        results = iter(evaluate_jaxpr(jaxpr, *arrays))
        tree, leaves, kept = static
        return jax.tree.unflatten(tree, [next(results) if k else leaf for k, leaf in zip(kept, leaves, strict=True)])

    return jax.extend.linear_util.wrap_init(call, debug_info=rule.debug_info)


def _closed(jaxpr: Jaxpr, consts: Sequence[Any]) -> Jaxpr:
    """Binds constants to a jaxpr."""
    if hasattr(jaxpr, "with_consts"):  # JAX 0.12
        return jaxpr.with_consts(consts) if consts else jaxpr
    return jex.ClosedJaxpr(jaxpr, consts)  # pyright: ignore[reportPrivateImportUsage]


def bilinear_primitive(
    name: str,
    *,
    evaluate: Callable,
    shape: Callable,
    gradient_of_lhs: Callable,
    gradient_of_rhs: Callable,
    batched: Callable,
) -> jex.Primitive:
    """Returns a new primitive that is linear in each of its two operands.

    Args:
      name: how it prints.
      evaluate: `(lhs, rhs, **params) -> array`, in JAX; also what it is lowered to.
      shape: `(lhs shape, rhs shape, **params) -> (shape, dtype)`, for operands on no mesh; on a mesh it is derived.
      gradient_of_lhs, gradient_of_rhs: `(cotangent, lhs, rhs, **params) -> array`; of the operand asked for there is
        only `.aval`.
      batched: `((lhs, rhs), axes, **params) -> (array, axis)`, an axis being None where an operand has none.
    """
    primitive = jex.Primitive(name)

    def abstract(lhs: Any, rhs: Any, **params: Any) -> Any:
        if lhs.sharding.mesh.empty:
            return ShapedArray(*shape(lhs.shape, rhs.shape, **params))
        return jax.make_jaxpr(lambda *operands: evaluate(*operands, **params))(lhs, rhs).out_avals[0]

    primitive.def_impl(evaluate)
    primitive.def_abstract_eval(abstract)
    mlir.register_lowering(primitive, mlir.lower_fun(evaluate, multiple_results=False))
    ad.defbilinear(primitive, gradient_of_lhs, gradient_of_rhs)
    batching.primitive_batchers[primitive] = batched
    return primitive


def marker_primitive(
    name: str, *, tangent: Callable[[Any], Any], cotangent: Callable[[Any], Any]
) -> tuple[jex.Primitive, Callable[..., jax.Array]]:
    """Returns a new primitive, an identity that lowers to nothing, and what binds it: `(x, mark, *carried)`.

    Carried arrays have no part in the result; a mark that carries some is not put on tangents.

    Args:
      name: how it prints.
      tangent: from the mark of a value to that of its tangent.
      cotangent: from the mark of a tangent to that of the cotangent into which it is transposed.
    """
    primitive = jex.Primitive(name)

    def bind_mark(x: Any, mark: Any, *carried: Any) -> Any:
        return primitive.bind(x, *carried, mark=mark)

    def jvp(primals: Any, tangents: Any, *, mark: Any) -> tuple[Any, Any]:
        plain = type(tangents[0]) is ad.Zero or len(primals) > 1
        return bind_mark(primals[0], mark, *primals[1:]), tangents[0] if plain else bind_mark(
            tangents[0], tangent(mark)
        )

    def transpose(ct: Any, x: Any, *, mark: Any) -> list[Any]:
        del x
        return [ct if type(ct) is ad.Zero else bind_mark(ct, cotangent(mark))]

    primitive.def_impl(lambda x, *_, mark: x)
    primitive.def_abstract_eval(lambda x, *_, mark: x)
    mlir.register_lowering(primitive, lambda _, x, *__, mark: [x])
    ad.primitive_jvps[primitive] = jvp
    ad.primitive_transposes[primitive] = transpose
    batching.primitive_batchers[primitive] = lambda given, dims, *, mark: (
        bind_mark(given[0], mark, *given[1:]),
        dims[0],
    )
    return primitive, bind_mark

"""NNX models under a policy: a copy whose class runs `__call__` through the rewrite.

The copy's root and its callable submodules get subclasses of their own classes: the root's applies the policy, the
others' open a name scope, because NNX leaves no module paths in a jaxpr. Subclasses survive `nnx.split`, `nnx.merge`
and every NNX transformation, which keep a node's type and no more. All use of NNX beyond its everyday API is here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from flax import nnx

from precision_lab.policy import Policy
from precision_lab.rewrite import SiteTable, call, sites_of_function


def nnx_under_policy(model: nnx.Module, policy: Policy) -> Any:
    """Returns a copy of `model` under `policy`; a policy that it already has is replaced."""
    copy = nnx.clone(model)
    nnx.update(copy, policy.cast_to_param(nnx.state(copy, nnx.Param)))
    plain = _plain_class(type(copy))
    if not _is_called(plain):
        raise TypeError(f"{plain.__name__} has no __call__; apply the policy to a function of its parameters instead.")
    _open_scopes(copy)
    copy.__class__ = _class_under_policy(plain, policy)
    return copy


def nnx_sites(model: nnx.Module, policy: Policy, args: Any, kwargs: Any, *, everything: bool) -> SiteTable:
    """Returns the sites of `model(*args, **kwargs)` under `policy`; see `sites_of_function`."""
    copy = nnx.clone(model)
    plain = _plain_class(type(copy))
    _open_scopes(copy)
    leaves, tree = jax.tree.flatten((args, kwargs))
    structs = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, jax.ShapeDtypeStruct)}
    tables = []

    def trace(arrays: dict[int, Any]) -> None:
        # NNX takes arrays apart, and structs for constants; so under a trace, where structs are arrays.
        args, kwargs = jax.tree.unflatten(tree, [arrays.get(i, leaf) for i, leaf in enumerate(leaves)])
        pure = _pure(plain, copy, args, kwargs)
        tables.append(sites_of_function(pure.fn, policy, pure.params, [pure.rest], {}, everything=everything))

    jax.eval_shape(trace, structs)
    return tables[0]


class _Pure(NamedTuple):
    """A call of a model as a pure function of (params by path, everything else), with these arguments."""

    fn: Callable[[dict[str, Any], Any], tuple[Any, Any]]
    params: dict[str, Any]
    rest: Any


def _pure(plain: type, model: nnx.Module, args: Any, kwargs: Any) -> _Pure:
    """Takes a call apart; `fn` returns (output, state of the variables that the call changed or made)."""
    graphdef, params, rest = nnx.split((model, args, kwargs), nnx.Param, ...)
    flat = dict(nnx.to_flat_state(params))
    names = {path: "/".join(map(str, path[1:] if path[0] == 0 else path)) for path in flat}  # (0,) is the model

    def fn(arrays: dict[str, Any], rest: Any) -> tuple[Any, Any]:
        given = [(path, variable.replace(arrays[names[path]])) for path, variable in flat.items()]
        call = nnx.merge(graphdef, nnx.from_flat_state(given), rest)
        before = _values(call)
        out = plain.__call__(call[0], *call[1], **call[2])
        changed = [
            (path, variable)
            for path, variable in nnx.to_flat_state(nnx.state(call, nnx.Variable))
            if path not in before or variable.get_raw_value() is not before[path]
        ]
        return out, nnx.from_flat_state(changed)

    return _Pure(fn, {names[path]: variable.get_raw_value() for path, variable in flat.items()}, rest)


def _values(node: Any) -> dict[Any, Any]:
    """Returns what each variable of a node holds, by path."""
    return {path: variable.get_raw_value() for path, variable in nnx.to_flat_state(nnx.state(node, nnx.Variable))}


@functools.cache
def _class_under_policy(plain: type, policy: Policy) -> type:
    """Returns the subclass of `plain` whose calls follow `policy`; the same one each time, as jit caches need."""

    @functools.wraps(plain.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        pure = _pure(plain, self, args, kwargs)
        out, changed = call(pure.fn, policy, pure.params, [pure.rest], {})
        nnx.update((self, args, kwargs), changed)
        return policy.cast_to_output(out)

    return _subclass(plain, {"__call__": __call__, "precision_policy": policy})


@functools.cache
def _class_in_scope(plain: type, scope: str) -> type:
    """Returns the subclass of `plain` whose calls open the name scope `scope`."""

    @functools.wraps(plain.__call__)
    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        with jax.named_scope(scope):
            return plain.__call__(self, *args, **kwargs)

    return _subclass(plain, {"__call__": __call__})


def _subclass(plain: type, members: dict[str, Any]) -> type:
    """Returns a subclass that goes by the name of `plain`."""
    names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    return type(plain)(plain.__name__, (plain,), {**names, **members, "_plain_class": plain})


def _plain_class(cls: type) -> type:
    """Returns the class as its author wrote it."""
    return cls.__dict__.get("_plain_class", cls)


def _is_called(cls: type) -> bool:
    """Returns whether instances of `cls` can be called; containers such as `nnx.List` cannot."""
    return any("__call__" in base.__dict__ for base in cls.__mro__)


def _open_scopes(model: nnx.Module) -> None:
    """Gives each callable submodule of `model` a subclass that opens its part of the path, in place."""
    modules = [(path, module) for path, module in nnx.iter_modules(model) if path and _is_called(type(module))]
    called = {path for path, _ in modules}
    for path, module in modules:
        above = max((len(path[:n]) for n in range(len(path)) if path[:n] in called), default=0)
        module.__class__ = _class_in_scope(_plain_class(type(module)), "/".join(map(str, path[above:])))

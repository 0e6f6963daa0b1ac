"""NNX models under a policy: a copy whose class runs its methods through the rewrite.

The copy's root and its submodules get subclasses of their own classes: the root's applies the policy, the
others' open a name scope, because NNX leaves no module paths in a jaxpr. Subclasses survive `nnx.split`, `nnx.merge`
and every NNX transformation, which keep a node's type and no more. All use of NNX beyond its everyday API is here.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from precision_lab.nn.carried import LORA, LORA_FACTOR, NUMBERS, SCALES, adapters_of, given_scales
from precision_lab.nn.qat import QAT
from precision_lab.nn.quantizer_states import STATES, QuantizerStates
from precision_lab.policy import Policy
from precision_lab.rewrite import SiteTable, call, sites_of_function


def nnx_under_policy(model: nnx.Module, policy: Policy) -> Any:
    """Returns a copy of `model` under `policy`; a policy that it already has is replaced."""
    copy = nnx.clone(model)
    _refuse_policies_inside(copy)
    if hasattr(copy, STATES):
        delattr(copy, STATES)
    nnx.update(copy, policy.cast_to_param(nnx.state(copy, nnx.Param)))
    plain = _plain_class(type(copy))
    if isinstance(copy, CONTAINERS) or not _methods(plain):
        raise TypeError(f"{plain.__name__} has no __call__; apply the policy to a function of its parameters instead.")
    _open_scopes(copy)
    copy.__class__ = _class_under_policy(plain, policy, None)
    return copy


class QuantizationScales(nnx.Variable):
    """The static scales of a model's activations, by site and operand; no parameter."""


def nnx_with_stored(model: nnx.Module, policy: Policy, stored: dict[str, Any], scales: Any) -> Any:
    """Returns a copy of `model` under `policy` with some of its parameters stored quantized.

    Args:
      model, policy: as for `nnx_under_policy`.
      stored: QTensors by path.
      scales: static scales by site and operand, or nothing.
    """
    copy = nnx_under_policy(model, policy)
    replace_params(copy, stored)
    if scales:
        setattr(copy, SCALES, QuantizationScales(scales))
    return copy


class QuantizerNumbers(nnx.Variable):
    """The numbers of a model's quantizers, by setting; no parameter."""


def set_numbers(model: nnx.Module, numbers: Mapping[str, Any]) -> None:
    """Gives the quantizers of a model under a policy other numbers, in place; nothing for their own."""
    if hasattr(model, NUMBERS):
        delattr(model, NUMBERS)
    if numbers:
        setattr(model, NUMBERS, QuantizerNumbers(dict(numbers)))


def replace_params(model: nnx.Module, new: Mapping[str, Any]) -> None:
    """Puts arrays or QTensors in the place of those that `Param`s hold, by path, in place."""
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if (name := "/".join(map(str, path))) in new:
            nnx.update(model, nnx.from_flat_state([(path, variable.replace(new[name]))]))


def carried_by(model: nnx.Module) -> dict[str, Any]:
    """Returns what a model carries for the rewrite: static scales, adapters, numbers of quantizers."""
    scales, pairs, factor, numbers = (getattr(model, name, None) for name in (SCALES, LORA, LORA_FACTOR, NUMBERS))
    carried: dict[str, Any] = {} if numbers is None else {"numbers": numbers.get_raw_value()}
    if scales is not None:
        carried["given"] = given_scales(scales.get_raw_value())
    if pairs is not None and factor is not None:
        arrays = {path: {key: one.get_raw_value() for key, one in pair.items()} for path, pair in pairs.items()}
        carried["adapters"] = adapters_of(arrays, factor.get_raw_value())
    return carried


def nnx_under_qat(model: nnx.Module, qat: QAT, args: Any, kwargs: Any) -> Any:
    """Returns a copy of `model` under a policy whose quantizers have a state, started from a call with real data."""
    copy = nnx_under_policy(model, qat.policy)
    if hasattr(copy, STATES):
        raise ValueError(f"{type(copy).__name__} has an attribute {STATES!r}, where the states of quantizers would be.")
    plain = _plain_class(type(copy))
    pure = _pure(plain, "__call__", nnx.clone(copy), args, kwargs)
    setattr(copy, STATES, QuantizerStates(qat.started(pure.fn, pure.params, [pure.rest], {}, types=_types(copy))))
    copy.__class__ = _class_under_policy(plain, qat.policy, qat)
    return copy


def _call(model: Any, pure: _Pure, policy: Policy, qat: QAT | None, options: dict[str, Any]) -> Any:
    """Returns what a call returns under a policy; moves the running numbers of quantizers in training."""
    if qat is None:
        return call(pure.fn, policy, pure.params, [pure.rest], {}, **options, **carried_by(model))
    states = getattr(model, STATES)
    train = not states.use_running_average
    out, after = qat.stepped(pure.fn, pure.params, [pure.rest], {}, states.state, train=train, **options)
    if train:
        states.move(after)
    return out


def _refuse_policies_inside(model: nnx.Module) -> None:
    """Raises ValueError if a part of `model` has a policy, which the policy of the whole would replace in silence."""
    for path, module in nnx.iter_modules(model):
        if path and "precision_policy" in type(module).__dict__:
            where = "/".join(map(str, path))
            raise ValueError(
                f"'{where}' is under a policy already, and one policy cannot be a part of another: apply the policy to "
                f"the whole model, with rules for its parts, such as '{where}/**:compute=float32'."
            )


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
        pure = _pure(plain, "__call__", copy, args, kwargs)
        options = {"types": _types(copy), "everything": everything}
        tables.append(sites_of_function(pure.fn, policy, pure.params, [pure.rest], {}, **options))

    jax.eval_shape(trace, structs)
    return tables[0]


def nnx_call(model: nnx.Module, args: Any, kwargs: Any, *, as_it_is: bool = False) -> tuple[_Pure, dict[str, str]]:
    """Returns the call of `model`, without a policy or as it is, its submodules' paths as scopes, and types by path."""
    copy = nnx.clone(model)
    plain = type(copy) if as_it_is else _plain_class(type(copy))
    if "__call__" not in _methods(plain):
        raise TypeError(f"{plain.__name__} has no __call__; give a function of its parameters instead.")
    _open_scopes(copy)
    return _pure(plain, "__call__", copy, args, kwargs), _types(copy)


CONTAINERS = (nnx.List, nnx.Dict)


class _HandsOutAPartError(Exception):
    """A method returned modules or variables, which must stay those of the model."""


class _Pure(NamedTuple):
    """A call of a model as a pure function of (params by path, everything else), with these arguments."""

    fn: Callable[[dict[str, Any], Any], tuple[Any, Any, Any]]
    params: dict[str, Any]
    rest: Any


def _pure(plain: type, method: str, model: nnx.Module, args: Any, kwargs: Any) -> _Pure:
    """Takes a call apart; `fn` returns (output, state of the variables that it changed or made, plain attributes)."""
    graphdef, params, rest = nnx.split((model, args, kwargs), nnx.Param, ...)
    constants, rest = _constants(rest)
    flat = dict(nnx.to_flat_state(params))
    names = {path: "/".join(map(str, path[1:] if path[0] == 0 else path)) for path in flat}  # (0,) is the model

    def fn(arrays: dict[str, Any], rest: Any) -> tuple[Any, Any, Any]:
        given = [(path, variable.replace(arrays[names[path]])) for path, variable in flat.items()]
        call = nnx.merge(graphdef, nnx.from_flat_state(given), rest, constants)
        call[0].__class__ = plain  # so that methods that call others are one call
        before, attributes = _values(call), _attributes(call[0])
        out = getattr(plain, method)(call[0], *call[1], **call[2])
        if any(isinstance(leaf, (nnx.Module, nnx.Variable)) for leaf in jax.tree.leaves(out, is_leaf=_is_node)):
            raise _HandsOutAPartError
        changed = [
            (path, variable)
            for path, variable in nnx.to_flat_state(nnx.state(call, nnx.Variable))
            if path not in before or variable.get_raw_value() is not before[path]
        ]
        missing = object()
        moved = [(*key, v) for key, v in _attributes(call[0]).items() if attributes.get(key, missing) is not v]
        return out, nnx.from_flat_state(changed), moved

    return _Pure(fn, {names[path]: variable.get_raw_value() for path, variable in flat.items()}, rest)


def _constants(rest: nnx.State) -> tuple[nnx.State, nnx.State]:
    """Returns the arrays that a model has as plain attributes, such as masks, and everything else.

    A call captures them, where arguments may be data: a weight times a mask is a weight.
    """
    flat = [
        (path, leaf, path[0] == 0 and isinstance(leaf, jax.Array | np.ndarray))
        for path, leaf in nnx.to_flat_state(rest)
    ]
    apart = [[(path, leaf) for path, leaf, is_constant in flat if is_constant == which] for which in (True, False)]
    return nnx.from_flat_state(apart[0]), nnx.from_flat_state(apart[1])


def _is_node(value: Any) -> bool:
    """Returns whether a value is a part of a model."""
    return isinstance(value, (nnx.Pytree, nnx.Variable))


def _values(node: Any) -> dict[Any, Any]:
    """Returns what each variable of a node holds, by path."""
    return {path: variable.get_raw_value() for path, variable in nnx.to_flat_state(nnx.state(node, nnx.Variable))}


def _attributes(model: nnx.Module) -> dict[tuple[str, str], Any]:
    """Returns the attributes of modules that are neither variables nor modules, by path and name."""
    return {
        ("/".join(map(str, path)), name): value
        for path, module in nnx.iter_modules(model)
        if not isinstance(module, CONTAINERS)
        for name, value in vars(module).items()
        if not name.startswith("_pytree__") and not _is_node(value)
    }


@functools.cache
def _class_under_policy(plain: type, policy: Policy, qat: QAT | None) -> type:
    """Returns the subclass of `plain` whose calls follow `policy`; the same one each time, as jit caches need."""

    def under_policy(name: str) -> Callable[..., Any]:
        @functools.wraps(getattr(plain, name))
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            pure = _pure(plain, name, self, args, kwargs)
            options = {"types": _types(self), "every_rule": name == "__call__"}
            try:
                out, changed, moved = _call(self, pure, policy, qat, options)
            except _HandsOutAPartError:
                return getattr(plain, name)(self, *args, **kwargs)
            _write_back(self, args, kwargs, changed, moved)
            return policy.cast_to_output(out)

        return method

    members = {name: under_policy(name) for name in _methods(plain)}
    recipe = (_class_from_text, plain, str(policy), None if qat is None else qat.schedule)
    return _subclass(plain, {**members, "precision_policy": policy, "precision_qat": qat}, recipe)


def _write_back(model: nnx.Module, args: Any, kwargs: Any, changed: nnx.State, moved: Any) -> None:
    """Gives the model, and modules among the arguments, what a call changed: variables and plain attributes."""
    flat, updates = nnx.to_flat_state(changed), []
    if not flat and not moved:
        return
    modules = {"/".join(map(str, path)): module for path, module in nnx.iter_modules(model)}
    for path, variable in flat:
        module = modules.get("/".join(map(str, path[1:-1]))) if path[0] == 0 else None
        if module is not None and not _is_node(getattr(module, str(path[-1]), variable)):
            setattr(module, str(path[-1]), variable)  # A variable in place of something else, such as None.
        else:
            updates.append((path, variable))
    nnx.update((model, args, kwargs), nnx.from_flat_state(updates))
    for path, name, value in moved:
        setattr(modules[path], name, value)


def _class_from_text(plain: type, policy: str, schedule: tuple[Any, ...] | None = None) -> type:
    """Returns the class under the policy that a string describes; for pickles."""
    qat = None if schedule is None else QAT(policy, *schedule)
    return _class_under_policy(plain, Policy.parse(policy), qat)


class _OpenScopes(threading.local):
    """The paths of the modules whose methods are running, innermost last."""

    def __init__(self) -> None:
        self.paths: list[str] = []


_open = _OpenScopes()


@functools.cache
def _class_in_scope(plain: type, scope: str, path: str) -> type:
    """Returns the subclass of `plain` whose methods open the name scope `scope`, unless they are in it already."""

    def in_scope(name: str) -> Callable[..., Any]:
        @functools.wraps(getattr(plain, name))
        def method(self: Any, *args: Any, **kwargs: Any) -> Any:
            if _open.paths[-1:] == [path]:
                return getattr(plain, name)(self, *args, **kwargs)
            _open.paths.append(path)
            try:
                with jax.named_scope(scope):
                    return getattr(plain, name)(self, *args, **kwargs)
            finally:
                _open.paths.pop()

        return method

    return _subclass(plain, {name: in_scope(name) for name in _methods(plain)}, (_class_in_scope, plain, scope, path))


def _subclass(plain: type, members: dict[str, Any], recipe: tuple[Any, ...]) -> type:
    """Returns a subclass that goes by the name of `plain`, and whose instances are pickled by its recipe."""

    def __reduce_ex__(self: Any, protocol: Any) -> Any:  # noqa: N807
        del protocol
        return _empty, recipe, self.__getstate__()

    names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    members = {**names, **members, "__reduce_ex__": __reduce_ex__, "_plain_class": plain}
    return type(plain)(plain.__name__, (plain,), members)


def _empty(recipe: Callable[..., type], *args: Any) -> Any:
    """Returns an instance without attributes of the class that a recipe makes; for pickles."""
    return object.__new__(recipe(*args))


def _plain_class(cls: type) -> type:
    """Returns the class as its author wrote it."""
    return cls.__dict__.get("_plain_class", cls)


@functools.cache
def _methods(cls: type) -> tuple[str, ...]:
    """Returns the names of `__call__` and of the public methods that a class has beyond every module's."""
    own = [base for base in cls.__mro__ if issubclass(base, nnx.Pytree) and not issubclass(nnx.Module, base)]
    names = dict.fromkeys(name for base in own for name in vars(base) if name == "__call__" or name[0] != "_")
    functions = {name: inspect.getattr_static(cls, name) for name in names}
    # A generator runs as its values are asked for; what it calls on the model follows the policy by itself.
    return tuple(n for n, f in functions.items() if inspect.isfunction(f) and not inspect.isgeneratorfunction(f))


def _types(model: nnx.Module) -> dict[str, str]:
    """Returns the type name of each module by path."""
    return {
        "/".join(map(str, path)): _plain_class(type(module)).__name__
        for path, module in nnx.iter_modules(model)
        if not isinstance(module, CONTAINERS)
    }


def _open_scopes(model: nnx.Module) -> None:
    """Gives each submodule of `model` a subclass that opens its part of the path, in place."""
    modules = [(p, m) for p, m in nnx.iter_modules(model) if p and not isinstance(m, CONTAINERS)]
    called = {path for path, module in modules if _methods(_plain_class(type(module)))}
    for path, module in modules:
        if path in called:
            above = max((len(path[:n]) for n in range(len(path)) if path[:n] in called), default=0)
            scope, whole = ("/".join(map(str, part)) for part in (path[above:], path))
            module.__class__ = _class_in_scope(_plain_class(type(module)), scope, whole)

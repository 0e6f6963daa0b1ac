"""Linen models under a policy: a module of a subclass whose `init` and `apply` go through the rewrite.

The policy belongs to the outermost module, because only there a call is a pure function of its variables; inside
another module it would be passed over in silence, so that is refused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from flax import linen
from flax.core import Scope

from precision_lab.nn.carried import LORA, LORA_FACTOR, SCALES, adapters_of, given_scales
from precision_lab.nn.linen_qat import started, stepped, stored_params
from precision_lab.nn.qat import QAT
from precision_lab.policy import Policy
from precision_lab.rewrite import SiteTable, call, sites_of_function

LIFTED = ("Scan", "Vmap", "Checkpoint", "Remat", "Jit")  # how Linen names the classes that its transformations make


def linen_under_policy(module: linen.Module, policy: Policy, qat: QAT | None = None) -> Any:
    """Returns `module` under `policy`; a policy that it already has is replaced.

    Raises:
      ValueError: the module is bound, or is part of another module.
    """
    if module.scope is not None or module.parent is not None:
        name = type(module).__name__
        raise ValueError(f"{name} is bound to a parent or a scope; apply the policy to the outermost module.")
    return _as_class(module, _class_under_policy(_plain_class(type(module)), policy, qat))


def linen_sites(module: linen.Module, policy: Policy, args: Any, kwargs: Any, *, everything: bool) -> SiteTable:
    """Returns the sites of `module.apply(*args, **kwargs)` under `policy`; see `sites_of_function`."""
    types: dict[str, str] = {}
    fn, params, rest, root = linen_call(module, *args, **kwargs, types=types)
    return sites_of_function(fn, policy, params, rest, {}, root=root, types=types, everything=everything)


def linen_call(
    module: linen.Module, variables: Any, *args: Any, types: dict[str, str] | None = None, **kwargs: Any
) -> tuple[Callable[..., Any], Any, list[Any], str]:
    """Returns `module.apply` without a policy as a function, its params, its other arguments, and its root scope.

    Args:
      module, variables, args, kwargs: as of `apply`.
      types: filled, when the function runs, with the type name of each module by its path.
    """
    params, rest = _split(variables)
    fn = _apply(module, {} if types is None else types)
    return fn, params, [rest, args, kwargs], _plain_class(type(module)).__name__


def linen_call_as_it_is(module: linen.Module, variables: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any, list[Any]]:
    """Returns `module.apply` under the policy of the module as a function, its params, and its other arguments."""
    params, rest = _split(variables)

    def fn(params: Any, rest: Any, args: Any, kwargs: Any) -> Any:
        return module.apply(_join(params, rest), *args, **kwargs)

    return fn, params, [rest, args, kwargs]


@functools.cache
def _class_under_policy(plain: Any, policy: Policy, qat: QAT | None) -> type:
    """Returns the subclass of `plain` that follows `policy`; its own code always runs as `plain`."""

    def __post_init__(self: Any) -> None:  # noqa: N807
        plain.__post_init__(self)
        if isinstance(self.parent, Scope):
            raise ValueError(
                f"{plain.__name__} under a policy cannot be bound to a scope, where it would run without it (as in "
                "flax.linen.apply); call apply(variables, ..., method=fn), which takes functions of the module too."
            )
        if isinstance(self.parent, linen.Module):
            raise ValueError(
                f"{plain.__name__} under a policy cannot be a part of {type(self.parent).__name__}: apply the policy "
                "to the outermost module, with rules for its parts."
            )

    def apply(self: Any, variables: Any, *args: Any, **kwargs: Any) -> Any:
        params, rest = _split(variables)
        types: dict[str, str] = {}
        options = {"root": plain.__name__, "types": types, "every_rule": kwargs.get("method") is None}
        if qat is None:
            out = call(_apply(self, types), policy, params, [rest, args, kwargs], {}, **options, **_taken(rest))
        else:
            out = stepped(qat, _apply(self, types), params, rest, args, kwargs, options)
        if kwargs.get("mutable") or kwargs.get("capture_intermediates"):
            return policy.cast_to_output(out[0]), out[1]
        return policy.cast_to_output(out)

    def init(self: Any, *args: Any, **kwargs: Any) -> Any:
        params, rest = _split(_as_class(self, plain).init(*args, **kwargs))
        params = stored_params(policy, params, rest)
        if qat is not None:
            options = {"root": plain.__name__, "types": (types := {})}
            params, rest = started(qat, _apply(self, types), params, rest, args, kwargs, options)
        return _join(params, rest)

    def lazy_init(self: Any, *args: Any, **kwargs: Any) -> Any:
        if qat is not None:
            raise ValueError(f"{plain.__name__}: quantizers start from data, which lazy_init has not; call init.")
        params, rest = _split(_as_class(self, plain).lazy_init(*args, **kwargs))
        return _join(stored_params(policy, params, rest), rest)

    def tabulate(self: Any, *args: Any, **kwargs: Any) -> str:
        return _as_class(self, plain).tabulate(*args, **kwargs)

    def init_with_output(self: Any, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        variables = self.init(rngs, *args, **kwargs)
        kwargs.pop("mutable", None)
        return self.apply(variables, *args, rngs=rngs, mutable=True, **kwargs)[0], variables

    def bind(self: Any, *_: Any, **__: Any) -> Any:
        raise ValueError(
            f"{plain.__name__} under a policy has no bind, which would run without it; call apply(variables, ..., "
            "method=fn) instead, which takes functions of the module too."
        )

    def __reduce_ex__(self: Any, protocol: Any) -> Any:  # noqa: N807
        return _unpickled, (_as_class(self, plain), str(policy), None if qat is None else qat.schedule)

    names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    cls = type(plain)(plain.__name__, (plain,), {**names, "__post_init__": __post_init__})
    methods = {"apply": apply, "init": init, "init_with_output": init_with_output, "bind": bind}
    methods |= {"lazy_init": lazy_init, "tabulate": tabulate, "__reduce_ex__": __reduce_ex__}
    for name, method in methods.items():
        # Set afterwards, because Linen wraps the methods that a class is created with.
        setattr(cls, name, functools.wraps(getattr(plain, name))(method))
    for name, value in (("_plain_class", plain), ("precision_policy", policy), ("precision_qat", qat)):
        setattr(cls, name, value)
    return cls


def _taken(collections: dict[str, Any]) -> dict[str, Any]:
    """Takes out of a model's collections what it carries for the rewrite: static scales, adapters."""
    scales, pairs, factor = (collections.pop(name, None) for name in (SCALES, LORA, LORA_FACTOR))
    carried: dict[str, Any] = {} if scales is None else {"given": given_scales(scales)}
    return carried if pairs is None or factor is None else carried | {"adapters": adapters_of(pairs, factor["value"])}


def _unpickled(module: Any, policy: str, schedule: tuple[Any, ...] | None = None) -> Any:
    """Returns a module under the policy that a string describes."""
    return linen_under_policy(module, Policy.parse(policy), None if schedule is None else QAT(policy, *schedule))


def _apply(module: linen.Module, types: dict[str, str]) -> Callable[[Any, Any, Any, Any], Any]:
    """Returns `apply` of the module as its author wrote it, as a function of (params, rest, args, kwargs).

    When called, it notes in `types` the type name of each module by path.
    """
    plain = _as_class(module, _plain_class(type(module)))

    def note(method: Callable, args: Any, kwargs: Any, context: Any) -> Any:
        # The first is the outermost: inside a lifted transformation, a module may go by the root's empty path.
        types.setdefault("/".join(context.module.path), _type_name(type(context.module)))
        return method(*args, **kwargs)

    def fn(params: Any, rest: Any, args: Any, kwargs: Any) -> Any:
        with linen.intercept_methods(note):
            return plain.apply(_join(params, rest), *args, **kwargs)

    return fn


def _type_name(cls: type) -> str:
    """Returns the name of a module's class, without what a transformation puts before it (`ScanBlock`)."""
    while any(cls.__name__ == prefix + cls.__mro__[1].__name__ for prefix in LIFTED):
        cls = cls.__mro__[1]
    return cls.__name__


def _as_class(module: linen.Module, cls: Any) -> Any:
    """Returns a copy of an unbound module as an instance of `cls`, which has the same fields."""
    copy = module.clone()
    object.__setattr__(copy, "__class__", cls)
    return copy


def _plain_class(cls: type) -> Any:
    """Returns the class as its author wrote it."""
    return cls.__dict__.get("_plain_class", cls)


def _split(variables: Any) -> tuple[Any, dict[str, Any]]:
    """Returns the params collection and all others."""
    if not isinstance(variables, Mapping):
        kind = type(variables).__name__
        raise TypeError(f"a Linen module takes its variables first, a mapping of collections; got {kind}.")
    return variables.get("params", {}), {name: tree for name, tree in variables.items() if name != "params"}


def _join(params: Any, rest: dict[str, Any]) -> dict[str, Any]:
    """Puts the collections together again."""
    return {"params": params, **rest} if params else rest

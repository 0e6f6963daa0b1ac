"""Linen models under a policy: a module of a subclass whose `init` and `apply` go through the rewrite.

The policy belongs to the outermost module, because only there a call is a pure function of its variables; inside
another module it would be passed over in silence, so that is refused.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from flax import linen

from precision_lab.policy import Policy
from precision_lab.rewrite import SiteTable, call, sites_of_function


def linen_under_policy(module: linen.Module, policy: Policy) -> Any:
    """Returns `module` under `policy`; a policy that it already has is replaced.

    Raises:
      ValueError: the module is bound, or is part of another module.
    """
    if module.scope is not None or module.parent is not None:
        name = type(module).__name__
        raise ValueError(f"{name} is bound to a parent or a scope; apply the policy to the outermost module.")
    return _as_class(module, _class_under_policy(_plain_class(type(module)), policy))


def linen_sites(module: linen.Module, policy: Policy, args: Any, kwargs: Any, *, everything: bool) -> SiteTable:
    """Returns the sites of `module.apply(*args, **kwargs)` under `policy`; see `sites_of_function`."""
    variables, *others = args
    params, rest = _split(variables)
    root = _plain_class(type(module)).__name__
    call_args = [rest, tuple(others), kwargs]
    return sites_of_function(_apply(module), policy, params, call_args, {}, root=root, everything=everything)


@functools.cache
def _class_under_policy(plain: Any, policy: Policy) -> type:
    """Returns the subclass of `plain` that follows `policy`; its own code always runs as `plain`."""

    def __post_init__(self: Any) -> None:  # noqa: N807
        plain.__post_init__(self)
        if isinstance(self.parent, linen.Module):
            raise ValueError(
                f"{plain.__name__} under a policy cannot be a part of {type(self.parent).__name__}: apply the policy "
                "to the outermost module, with rules for its parts."
            )

    def apply(self: Any, variables: Any, *args: Any, **kwargs: Any) -> Any:
        params, rest = _split(variables)
        out = call(_apply(self), policy, params, [rest, args, kwargs], {}, root=plain.__name__)
        if kwargs.get("mutable") or kwargs.get("capture_intermediates"):
            return policy.cast_to_output(out[0]), out[1]
        return policy.cast_to_output(out)

    def init(self: Any, *args: Any, **kwargs: Any) -> Any:
        params, rest = _split(_as_class(self, plain).init(*args, **kwargs))
        return _join(policy.cast_to_param(params), rest)

    def init_with_output(self: Any, rngs: Any, *args: Any, **kwargs: Any) -> Any:
        variables = self.init(rngs, *args, **kwargs)
        kwargs.pop("mutable", None)
        return self.apply(variables, *args, rngs=rngs, mutable=True, **kwargs)[0], variables

    def bind(self: Any, *_: Any, **__: Any) -> Any:
        raise ValueError(
            f"{plain.__name__} under a policy has no bind, which would run without it; call apply instead."
        )

    names = {"__module__": plain.__module__, "__qualname__": plain.__qualname__, "__doc__": plain.__doc__}
    cls = type(plain)(plain.__name__, (plain,), {**names, "__post_init__": __post_init__})
    for name, method in {"apply": apply, "init": init, "init_with_output": init_with_output, "bind": bind}.items():
        # Set afterwards, because Linen wraps the methods that a class is created with.
        setattr(cls, name, functools.wraps(getattr(plain, name))(method))
    cls._plain_class, cls.precision_policy = plain, policy  # pyright: ignore[reportAttributeAccessIssue]
    return cls


def _apply(module: linen.Module) -> Callable[[Any, Any, Any, Any], Any]:
    """Returns `apply` of the module as its author wrote it, as a function of (params, rest, args, kwargs)."""
    plain = _as_class(module, _plain_class(type(module)))
    return lambda params, rest, args, kwargs: plain.apply(_join(params, rest), *args, **kwargs)


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

"""The policy that a target is under already, and its calls as they are, with all that it carries."""

from __future__ import annotations

from typing import Any

from flax import linen, nnx

from precision_lab.nn.linen_policy import linen_call_as_it_is
from precision_lab.nn.nnx_policy import nnx_call
from precision_lab.nn.pure import PureCall
from precision_lab.policy import Policy
from precision_lab.rewrite import UNDER


def own_policy(target: Any) -> Policy | None:
    """Returns the policy that a model or function is under, by `apply_policy`, `convert` or `prepare_qat`, or None."""
    return getattr(target, UNDER, None)


def call_as_it_is(target: Any, args: Any, kwargs: dict[str, Any]) -> PureCall:
    """Returns the call `target(*args, **kwargs)` of what is under a policy as a function of its parameters.

    Raises:
      TypeError: the params of a function are missing.
    """
    if isinstance(target, nnx.Module):
        (fn, params, rest), types = nnx_call(target, args, kwargs, as_it_is=True)
        return PureCall(lambda params, rest: fn(params, rest)[0], params, [rest], {}, "", types, True)
    if isinstance(target, linen.Module):
        fn, params, rest = linen_call_as_it_is(target, *args, **kwargs)
        has_state = bool(kwargs.get("mutable") or kwargs.get("capture_intermediates"))
        return PureCall(lambda *given: fn(*given)[0] if has_state else fn(*given), params, rest, {}, "", {}, True)
    if not args:
        raise TypeError("a function is observed at fn(params, ...); give its params first.")
    return PureCall(target, args[0], list(args[1:]), kwargs, "", {}, False)

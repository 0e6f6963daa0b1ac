"""Watching a model as it is called: which layer's output a batch norm gets, by the identity of the arrays.

A module's attributes do not say in which order it calls them; one call, without jit, does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
from flax import linen, nnx

_LAYERS = (nnx.Linear, nnx.Conv, nnx.ConvTranspose, linen.Dense, linen.Conv, linen.ConvTranspose)
_NORMS = (nnx.BatchNorm, linen.BatchNorm)


class Pair(NamedTuple):
    """The path of a batch norm that gets what a layer returns; its epsilon; whether both compute in float32."""

    norm: str
    epsilon: float
    is_float32: bool


class _Call(NamedTuple):
    """A call of a module; the arrays are kept, so that no other can have their identity."""

    path: str
    module: Any
    x: Any
    out: Any


def pairs_of(model: Any, args: Any, kwargs: Any) -> dict[str, Pair]:
    """Returns the batch norm that gets what a layer returns, by the path of the layer.

    Raises:
      TypeError: `model` is neither of NNX nor of Linen.
    """
    calls: list[_Call] = []
    if isinstance(model, nnx.Module):
        copy = nnx.clone(model)
        for path, module in list(nnx.iter_modules(copy)):
            if isinstance(module, (*_LAYERS, *_NORMS)):
                module.__class__ = _watched(type(module), "/".join(map(str, path)), calls)
        evaluated(copy, args, kwargs)
    elif isinstance(model, linen.Module):

        def watch(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
            out = call(*args, **kwargs)
            module = context.module
            if context.method_name == "__call__" and type(module) in (*_LAYERS, *_NORMS):
                calls.append(_Call("/".join(module.path), module, _first(args, kwargs), out))
            return out

        with linen.intercept_methods(watch):
            evaluated(model, args, kwargs)
    else:
        raise TypeError(f"batch norms are found in an nnx.Module or linen.Module, got {type(model).__name__}.")
    return _matched(calls)


def evaluated(model: Any, args: Any, kwargs: Any) -> Any:
    """Returns what a model says in evaluation: of NNX, called on a copy; of Linen, applied."""
    if isinstance(model, nnx.Module):
        model = nnx.clone(model)
        model.eval()
        return model(*args, **kwargs)  # pyright: ignore[reportCallIssue]
    if not args or not isinstance(args[0], Mapping):
        came = type(args[0]).__name__ if args else "nothing"
        raise TypeError(f"a Linen module is called with its variables first, a mapping of collections; got {came}.")
    return model.apply(*args, **kwargs)


def _watched(plain: type, path: str, calls: list[_Call]) -> type:
    """Returns the subclass of a module's class that notes its calls."""

    def __call__(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N807
        out = plain.__call__(self, *args, **kwargs)
        calls.append(_Call(path, self, _first(args, kwargs), out))
        return out

    return type(plain)(plain.__name__, (plain,), {"__call__": __call__})


def _first(args: Any, kwargs: Any) -> Any:
    """Returns the input of a call."""
    return args[0] if args else next(iter(kwargs.values()), None)


def _matched(calls: list[_Call]) -> dict[str, Pair]:
    """Returns the pairs among calls."""
    layers = [call for call in calls if isinstance(call.module, _LAYERS) and _ends_in_features(call.module)]
    found = {}
    for norm in calls:
        if not isinstance(norm.module, _NORMS) or norm.module.axis not in (-1, norm.out.ndim - 1):
            continue
        for layer in layers:
            if layer.out is norm.x:
                is_float32 = layer.out.dtype == jnp.float32 and norm.out.dtype == jnp.float32
                found[layer.path] = Pair(norm.path, norm.module.epsilon, is_float32)
    return found


def _ends_in_features(layer: Any) -> bool:
    """Returns whether the last axis of a kernel is that of the output."""
    return not getattr(layer, "transpose_kernel", False)

"""A pair of primitives that are each other's transposes; beside `_compat`, the one file that makes primitives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.extend.core as jex
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir


def adjoint_primitives(names: tuple[str, str], evaluate: Callable[..., Any]) -> tuple[Callable, Callable]:
    """Returns two functions of `(x, *arrays)`: what `evaluate` computes, and `x` itself; each the other's transpose.

    JAX takes both for linear in `x`, so that tangents go through the same function as values. They work under every
    transformation and have derivatives of any order.

    Args:
      names: how the two print.
      evaluate: an elementwise function of `x`, of its shape and dtype; `arrays`, without axes or with as many as `x`,
        are broadcast against it.
    """
    there, back = (jex.Primitive(name) for name in names)
    _define(there, back, evaluate)
    _define(back, there, lambda x, *_: x)
    return there.bind, back.bind


def _define(primitive: jex.Primitive, adjoint: jex.Primitive, run: Callable[..., Any]) -> None:
    """Says what a primitive computes, and what it does under transformations."""

    def jvp(primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
        t, arrays = tangents[0], primals[1:]
        return primitive.bind(*primals), t if type(t) is ad.Zero else primitive.bind(t, *arrays)

    def transpose(ct: Any, x: Any, *arrays: Any) -> list[Any]:
        del x
        return [ct if type(ct) is ad.Zero else adjoint.bind(ct, *arrays), *[None] * len(arrays)]

    def batched(given: Sequence[Any], axes: Sequence[Any]) -> tuple[Any, int]:
        size = next(x.shape[axis] for x, axis in zip(given, axes, strict=True) if axis is not None)
        x = given[0] if axes[0] is not None else jnp.broadcast_to(given[0], (size, *given[0].shape))
        x = x if axes[0] is None else jnp.moveaxis(x, axes[0], 0)
        return primitive.bind(x, *(_in_front(a, axis, x.ndim) for a, axis in zip(given[1:], axes[1:], strict=True))), 0

    primitive.def_impl(run)
    primitive.def_abstract_eval(lambda x, *_: x)
    mlir.register_lowering(primitive, mlir.lower_fun(run, multiple_results=False))
    ad.primitive_jvps[primitive] = jvp
    ad.primitive_transposes[primitive] = transpose
    batching.primitive_batchers[primitive] = batched


def _in_front(array: Any, axis: int | None, ndim: int) -> Any:
    """Returns an array with its batch axis, or one of length 1, before the others, and as many axes as are wanted."""
    if axis is None:
        return array[None] if jnp.ndim(array) else array
    first = jnp.moveaxis(array, axis, 0)
    return first.reshape((first.shape[0], *[1] * (ndim - first.ndim), *first.shape[1:]))

"""Elementwise operations as lax has them: what those of jnp become once types are promoted, in a quarter of the time.

Quantizing is some forty operations on arrays of one type, at every operand of every product of a model, so that much of
the time that tracing a step takes goes there. `lax.add` and its like take two arrays of one shape, or a number for one.
"""

from __future__ import annotations

from typing import Any

import jax
from jax import lax


def where(chosen: jax.Array, x: Any, y: Any) -> jax.Array:
    """Returns `x` where `chosen` and else `y`, each of its shape or a scalar, both of one dtype."""
    return lax.select(chosen, spread(x, chosen.shape), spread(y, chosen.shape))


def spread(x: Any, shape: tuple[int, ...]) -> Any:
    """Returns an array, or a NumPy scalar, broadcast to a shape."""
    if x.shape == shape:
        return x
    return lax.broadcast_in_dim(x, shape, tuple(range(len(shape) - x.ndim, len(shape))))

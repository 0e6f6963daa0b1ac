"""Division and multiplication by scales as IEEE 754 has them: one definition for everything that quantizes.

XLA turns a division by a broadcast array into a product with its reciprocal, which differs in up to a third of all
values, and fuses a product and a later sum into one rounding. Both change what a quantized value is from one program
to the next, so neither may happen. Where an operand looks different for NaN, neither does, at the cost of a select.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from precision_lab import formats
from precision_lab.formats import round_to
from precision_lab.formats.elementwise import spread, where

TINY = np.float32(np.finfo(np.float32).tiny)
ZERO, ONE, NAN = np.float32(0), np.float32(1), np.float32(np.nan)


def divide(x: Any, scale: Any) -> jax.Array:
    """Returns `x / scale` in float32, correctly rounded on CPU; `x` itself where the scale is zero.

    Args:
      x: float32 array or number.
      scale: float32 array or number that broadcasts with `x`.
    """
    known = isinstance(scale, np.generic) and bool(scale != 0)
    x, scale = jnp.asarray(x, jnp.float32), jnp.asarray(scale, jnp.float32)
    shape = np.broadcast_shapes(x.shape, scale.shape)
    numerator = spread(x, shape)
    # Were `x` a constant, XLA would know that no value is NaN; behind a barrier it does not.
    fixed = lax.optimization_barrier(lax.stop_gradient(numerator))
    usable = scale if known else where(lax.eq(scale, ZERO), ONE, scale)
    return lax.div(numerator, lax.select(lax.ne(fixed, fixed), fixed, spread(usable, shape)))


def multiply(values: Any, scale: Any) -> jax.Array:
    """Returns `values * scale`, rounded to float32 whatever it is added to afterwards."""
    values, scale = jnp.asarray(values, jnp.float32), jnp.asarray(scale, jnp.float32)
    shape = np.broadcast_shapes(values.shape, scale.shape)
    product = lax.mul(spread(values, shape), spread(scale, shape))
    return where(lax.ne(product, product), NAN, product)


def widen(x: jax.Array) -> jax.Array:
    """Returns `x` as float32."""
    return x.astype(jnp.float32)


def narrow(x: jax.Array, dtype: Any) -> jax.Array:
    """Returns float32 values rounded to `dtype`, and to its largest value beyond that; XLA cannot drop the rounding."""
    if dtype == jnp.float32:
        return x
    return round_to(x, formats.format(np.dtype(dtype)), overflow="saturate_finite").astype(dtype)


def kept_shape(x: jax.Array, axes: tuple[int, ...]) -> tuple[int, ...]:
    """Returns the shape of an array of which some axes are reduced to length 1."""
    return tuple(1 if axis in axes else size for axis, size in enumerate(x.shape))


def ordered_sum(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Returns the sum along `axes`, which are kept, in an order that is the same in every program.

    XLA adds up in an order that depends on what it fuses the sum with, and the last bit of a scale with it.
    """
    kept = kept_shape(x, axes)
    moved = jnp.moveaxis(x, axes, range(len(axes)))
    return _fold(moved.reshape(-1, *moved.shape[len(axes) :])).reshape(kept)


def _fold(x: jax.Array) -> jax.Array:
    """Returns the sum along the first axis: rows of lanes are added one after another, then the lanes alike."""
    if len(x) <= 8:
        total = jnp.zeros(x.shape[1:], x.dtype)
        for row in x:
            total = total + row
        return total
    lanes = 1 << (math.isqrt(len(x) - 1)).bit_length()
    rows = jnp.pad(x, [(0, -len(x) % lanes)] + [(0, 0)] * (x.ndim - 1)).reshape(-1, lanes, *x.shape[1:])
    return _fold(jax.lax.scan(lambda total, row: (total + row, None), jnp.zeros_like(rows[0]), rows)[0])


def ordered_mean(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Returns the mean along `axes`, which are kept; zero of no elements."""
    return divide(ordered_sum(x, axes), max(math.prod(x.shape[axis] for axis in axes), 1))

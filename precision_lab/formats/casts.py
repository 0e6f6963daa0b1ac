"""cast_through: the same rounding as `round_to`, by real casts, where the hardware or XLA has the type."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from precision_lab.formats.catalogue import format
from precision_lab.formats.rounding import round_to

# XLA lists these types and compiles no conversion to them.
_NOT_COMPILED = ("float6_e2m3fn", "float6_e3m2fn")


def cast_through(x: Any, dtype: Any) -> jax.Array:
    """Returns `x` cast to `dtype` and back, with a gradient that is straight through.

    A plain pair of casts may be removed by XLA on accelerators, and its backward pass casts the cotangent. Here
    neither happens. The values are those of `round_to(x, dtype)`, except where the types of XLA differ from the rule:
    ties of float8_e8m0fnu go up ("nearest_away"), formats without NaN make some number of one, and on CPU the
    subnormals of a float32 are zero to a cast from float64. Types that XLA cannot convert to are rounded to instead.

    Args:
      x: floating array of any shape.
      dtype: a floating dtype of NumPy, JAX or ml_dtypes.

    Raises:
      TypeError: `x` or `dtype` is not floating.
    """
    x = jnp.asarray(x)
    fmt = format(dtype)
    if fmt.kind != "float" or fmt.dtype is None or not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"cast_through casts floats to a floating dtype and back, got {x.dtype} and {dtype!r}.")
    return round_to(x, fmt) if fmt.name in _NOT_COMPILED else _cast_pair(x, fmt.dtype)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
@partial(jax.jit, static_argnums=(1,), inline=True)
def _cast_pair(x: jax.Array, dtype: np.dtype) -> jax.Array:
    """Returns `x` cast to `dtype` and back."""
    return lax.optimization_barrier(x.astype(dtype)).astype(x.dtype)


@_cast_pair.defjvp
def _cast_pair_jvp(dtype: np.dtype, primals: Any, tangents: Any) -> Any:
    return _cast_pair(primals[0], dtype), tangents[0]

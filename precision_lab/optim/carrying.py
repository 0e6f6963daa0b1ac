"""How a low-precision parameter is made to become one given value by an update that is added to it."""

from typing import Any

import jax
import jax.numpy as jnp

from precision_lab.optim.trees import is_low_precision, is_masked, is_overwritten, is_trainable


def carry(target: jax.Array, p: jax.Array) -> jax.Array:
    """Returns the float32 update that takes `p` to `target`, in the same dtype, by `optax.apply_updates`.

    That adds in float32 and casts, which is exact unless

    - the parameter shrinks in one step by more than a factor of 2**12 (float16) or 2**15 (bfloat16) and does not
      become zero: no float32 number may get there by addition. The result is then off by less than 2**-24 of the
      old value;
    - the parameter becomes -0.0 from another value (it becomes 0.0), or comes back from infinity (it becomes NaN);
    - in bfloat16, whose range is that of float32, the difference leaves float32's normal range: it is above 3.4e38,
      or below 2**-126, which XLA may take for zero.
    """
    difference = target.astype(jnp.float32) - p.astype(jnp.float32)
    # Adding -0.0 changes no value, neither zero nor infinity, whose difference to itself would be NaN.
    return jnp.where(target == p, jnp.float32(-0.0), difference)


def apply_updates(params: Any, updates: Any) -> Any:
    """Returns `params` plus `updates`, like `optax.apply_updates`, for every kind of leaf that may stand in a model.

    - Parameters narrower than float32, float8 too, are added to in float32 and rounded to nearest even.
    - Integers, booleans and keys stay as they are; optax fails on their float0 updates.
    - Leaves of Flax's collection `_overwrite_with_gradient` become their "update", which is their next value.

    Args:
      params: the parameters.
      updates: what `update` of an optax transformation returned; None or MaskedNode leaves a parameter as it is.
    """
    return jax.tree_util.tree_map_with_path(_applied, params, updates)


def _applied(path: Any, p: Any, u: Any) -> Any:
    """Returns one leaf after its update."""
    if u is None or is_masked(u):
        return p
    if is_overwritten(path):
        return u
    if not is_trainable(path, p):
        return p
    p = jnp.asarray(p)
    wide = p.astype(jnp.float32) if is_low_precision(p) else p
    return (wide + u).astype(p.dtype)

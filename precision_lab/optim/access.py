"""Reading what `loss_scaling` knows, wherever in an optimizer state it stands."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from precision_lab.optim.scaling import LossScaleState
from precision_lab.optim.trees import is_low_precision

StateT = TypeVar("StateT")


def scale_loss(loss: Any, opt_state: Any) -> jax.Array:
    """Returns `loss` times the current loss scale, in float32 (float64 stays).

    Args:
      loss: floating scalar; a float16 loss is widened first, since a scale of 65536 is infinite in float16.
      opt_state: optimizer state with one `loss_scaling` in it.

    Raises:
      TypeError: `loss` is not floating.
      ValueError: the state holds no loss scale, or several.
    """
    loss = jnp.asarray(loss)
    if not jnp.issubdtype(loss.dtype, jnp.floating):
        raise TypeError(f"scale_loss expects a floating loss, got {loss.dtype}.")
    dtype = jnp.float32 if is_low_precision(loss) else loss.dtype
    return loss.astype(dtype) * current_loss_scale(opt_state).astype(dtype)


def current_loss_scale(opt_state: Any) -> jax.Array:
    """Returns the float32 scale of the next loss; see `scale_loss` for errors."""
    return jnp.asarray(_loss_scale_state(opt_state).loss_scale)


def step_was_applied(opt_state: Any) -> jax.Array:
    """Returns a scalar bool: whether the last `update` was applied and not skipped (True before the first).

    What lives outside the optimizer (batch statistics, averages, step counters) is kept back by it on a skip.
    """
    return jnp.asarray(_loss_scale_state(opt_state).consecutive_skips) == 0


def skipped_steps(opt_state: Any) -> jax.Array:
    """Returns the int32 number of steps skipped so far."""
    return jnp.asarray(_loss_scale_state(opt_state).skipped)


def find_state(opt_state: Any, cls: type[StateT], made_by: str) -> StateT:
    """Returns the one state of type `cls` in `opt_state`.

    The search goes by type, because a name such as `inner` may occur many times.

    Raises:
      ValueError: there is none, or there are several; tells which transformation makes it.
    """
    found = [
        (path, leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(opt_state, is_leaf=lambda x: isinstance(x, cls))
        if isinstance(leaf, cls)
    ]
    if len(found) == 1:
        return found[0][1]
    if not found:
        raise ValueError(f"this optimizer state holds no {cls.__name__}: wrap the optimizer in {made_by}(...).")
    places = ", ".join(jax.tree_util.keystr(path) or "the root" for path, _ in found)
    raise ValueError(f"this optimizer state holds {len(found)} of {cls.__name__}, at {places}: pass one of them.")


def _loss_scale_state(opt_state: Any) -> LossScaleState:
    return find_state(opt_state, LossScaleState, "loss_scaling")

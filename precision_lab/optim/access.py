"""Reading what `loss_scaling` knows, wherever in an optimizer state it stands."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from precision_lab.optim.state import LossScaleState
from precision_lab.optim.trees import path_text

StateT = TypeVar("StateT")


def current_loss_scale(opt_state: Any) -> jax.Array:
    """Returns the float32 scale of the next loss; see `scale_loss` for errors."""
    return jnp.asarray(_loss_scale_state(opt_state).loss_scale)


def step_was_applied(opt_state: Any) -> jax.Array:
    """Returns a scalar bool: whether the last `update` was applied and not skipped (True before the first).

    What lives outside the optimizer (batch statistics, averages, step counters) is kept back by it on a skip; see
    `commit`.
    """
    return jnp.asarray(_loss_scale_state(opt_state).consecutive_skips) == 0


def skipped_steps(opt_state: Any) -> jax.Array:
    """Returns the int32 number of steps skipped so far."""
    return jnp.asarray(_loss_scale_state(opt_state).skipped)


def no_usable_scale(opt_state: Any) -> jax.Array:
    """Returns a scalar bool: whether the last step was skipped although the scale was at its smallest.

    A smaller scale cannot help then: the gradients overflow, or are NaN, whatever it is. That may happen once by bad
    luck; `require_usable_scale` counts.
    """
    return jnp.asarray(_loss_scale_state(opt_state).floor_skips) > 0


def first_nonfinite(opt_state: Any, params: Any) -> str | None:
    """Returns the path of the gradient that was the first not to be finite, such as "block_0/kernel"; None if none was.

    It is the first in the order of the tree, at the first step of the latest run of non-finite steps, and stays until
    the next run. For use outside jit; inside, `bad_leaf` of the state is its number.

    Args:
      opt_state: optimizer state with one `loss_scaling` in it.
      params: the parameters or gradients, or any tree of their structure.

    Raises:
      ValueError: the state is that of several models (vmapped), or `params` has too few leaves to be theirs.
    """
    number = _loss_scale_state(opt_state).bad_leaf
    if jnp.ndim(number):
        raise ValueError(f"the state is that of {number.shape} models; take one: jax.tree.map(lambda x: x[i], state).")
    if int(number) < 0:
        return None
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    if int(number) >= len(paths):
        raise ValueError(f"the first bad leaf has number {int(number)}, but params has {len(paths)} leaves.")
    return path_text(paths[int(number)])


def require_usable_scale(opt_state: Any, params: Any, *, patience: int = 1) -> None:
    """Raises FloatingPointError if the last steps were skipped although the scale was at its smallest.

    For use outside jit, now and then: it waits for the device.

    Args:
      opt_state: optimizer state with one `loss_scaling` in it.
      params: the parameters or gradients, to name the first bad one.
      patience: so many such steps in a row are an error.
    """
    state = _loss_scale_state(opt_state)
    steps = int(state.floor_skips)
    if steps >= patience:
        raise FloatingPointError(
            f"no usable loss scale: gradients were not finite at the smallest one, {float(state.loss_scale):g}, in "
            f"{steps} steps in a row, the first of them '{first_nonfinite(opt_state, params)}'. Lower "
            "DynamicLossScale.min, or look for NaN where that gradient comes from."
        )


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

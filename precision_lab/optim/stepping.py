"""What a training step does around its optimizer: scaling the loss, and keeping state back on a skipped step.

(loss, aux), grads = value_and_scaled_grad(loss_fn, has_aux=True)(opt_state, params, batch)
updates, opt_state = tx.update(grads, opt_state, params)
params = optax.apply_updates(params, updates)
batch_stats = commit(opt_state, aux, batch_stats)
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from precision_lab.optim.access import current_loss_scale, step_was_applied
from precision_lab.optim.trees import is_low_precision, path_text


def scale_loss(loss: Any, opt_state: Any) -> jax.Array:
    """Returns `loss` times the current loss scale, in float32 (float64 stays).

    Args:
      loss: floating scalar; a float16 loss is widened first, since a scale of 65536 is infinite in float16. Its
        gradient still enters backpropagation in float16, so compute the loss itself in float32 for such scales.
      opt_state: optimizer state with one `loss_scaling` in it.

    Raises:
      TypeError: `loss` is not floating.
      ValueError: the state holds no loss scale, or several.
    """
    loss = _wide(loss)
    return loss * current_loss_scale(opt_state).astype(loss.dtype)


def value_and_scaled_grad(loss_fn: Callable[..., Any], *, has_aux: bool = False) -> Callable[..., tuple[Any, Any]]:
    """Returns a function from (opt_state, params, ...) to the loss as it is and its gradient, scaled.

    Args:
      loss_fn: function from (params, ...) to a floating scalar, or with `has_aux` to that and anything else.
      has_aux: whether `loss_fn` returns a pair.

    Returns:
      A function whose arguments after `opt_state` are those of `loss_fn`. It returns (loss, gradients), or
      ((loss, aux), gradients): the loss in float32 (float64 stays) and without the scale, the gradients with it and
      as `loss_scaling` takes them. Parameters that are integers have float0 gradients.

    Raises:
      TypeError: the loss is not floating.
      ValueError: the state holds no loss scale, or several.
    """

    @functools.wraps(loss_fn)
    def value_and_grad(opt_state: Any, params: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        def scaled(params: Any) -> tuple[jax.Array, Any]:
            out = loss_fn(params, *args, **kwargs)
            loss, aux = out if has_aux else (out, None)
            return scale_loss(loss, opt_state), (_wide(loss), aux)

        grads, (loss, aux) = jax.grad(scaled, has_aux=True, allow_int=True)(params)
        return ((loss, aux) if has_aux else loss), grads

    return value_and_grad


def commit(opt_state: Any, new: Any, old: Any) -> Any:
    """Returns `new` if the last step was applied, else `old`, bit for bit.

    For what a step changes outside its optimizer: batch statistics, averages of parameters, RNG keys, counters. A
    forward pass that overflows has put infinities into them before the optimizer skips the step.

    Args:
      opt_state: optimizer state after the step, with one `loss_scaling` in it. That of a vmapped ensemble belongs
        inside the vmap.
      new: any tree of arrays, keys included, after the step.
      old: the same tree before it.

    Raises:
      TypeError: a leaf changed its dtype or shape.
      ValueError: the trees differ in structure, or the state is that of several models.
    """
    applied = step_was_applied(opt_state)
    if applied.ndim:
        raise ValueError(f"the state is that of {applied.shape} models: call commit inside the vmap over them.")

    def kept(path: Any, n: Any, o: Any) -> jax.Array:
        n, o = jnp.asarray(n), jnp.asarray(o)
        if (n.shape, n.dtype) != (o.shape, o.dtype):
            raise TypeError(
                f"commit expects leaves that keep shape and dtype, but '{path_text(path)}' was {o.dtype} {o.shape} and "
                f"is {n.dtype} {n.shape}. Cast it before."
            )
        return jnp.where(applied, n, o)

    return jax.tree_util.tree_map_with_path(kept, new, old)


def _wide(loss: Any) -> jax.Array:
    """Returns the loss in float32, or in float64 if it is."""
    loss = jnp.asarray(loss)
    if not jnp.issubdtype(loss.dtype, jnp.floating):
        raise TypeError(f"scale_loss expects a floating loss, got {loss.dtype}.")
    return loss.astype(jnp.float32) if is_low_precision(loss) else loss

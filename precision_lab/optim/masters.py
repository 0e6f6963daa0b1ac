"""Float32 master weights as an optax transformation.

    tx = loss_scaling(master_weights(optax.adamw(1e-3)), DynamicLossScale())

The parameters of the model are stored in 16 bits; the state holds a float32 master of each. The inner transformation
sees float32 gradients and masters, and after `optax.apply_updates` the parameters are the masters, rounded.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from precision_lab.optim.transformation import as_transformation, transformation
from precision_lab.optim.trees import (
    fill_hidden,
    hide_untrainable,
    is_low_precision,
    keep_dtypes,
    strong,
    to_float32,
)


class MasterWeightsState(NamedTuple):
    """State of `master_weights`.

    Attributes:
      master: the parameters' tree with a float32 array for each low-precision parameter, MaskedNode for the others.
      inner: state of the inner transformation.
    """

    master: Any
    inner: Any


def master_weights(inner: Any, *, param_dtype: Any = None) -> optax.GradientTransformationExtraArgs:
    """Returns `inner`, applied to float32 masters of the low-precision parameters.

    The update of such a parameter `p` is the float32 number `u = cast(master) - p`, so that
    `optax.apply_updates(p, u)`, which adds in float32 and casts, gives `cast(master)`. That is exact unless

    - one step shrinks a parameter by more than a factor of 2**12 (float16) or 2**15 (bfloat16) and it does not
      become zero: no float32 `u` gets there by addition. The result is then off by less than 2**-24 of the old value,
      and the next step makes up for it, since `u` starts from the parameter as it is;
    - a parameter becomes -0.0 from another value (it becomes 0.0), or comes back from infinity (it becomes NaN);
    - in bfloat16, whose range is that of float32, the difference leaves float32's normal range: it is above 3.4e38,
      or below 2**-126, which XLA may take for zero.

    `sync` is exact in these cases too. Nothing may come after this in a chain, because the update carries a rounding
    and not a direction; clipping and schedules go inside. Parameters in float32 or wider have no master and are
    updated as `inner` says; leaves that are not floating are hidden from it.

    Args:
      inner: optax transformation; it sees float32 gradients, masters and moments.
      param_dtype: dtype in which parameters will be stored, if `init` is given the float32 originals. The masters
        then start from the originals instead of from rounded values. Leaves in float64, or float8, stay as they are.

    Raises:
      TypeError: `inner` is no transformation; or, from `update`, a parameter with a master came in float32.
      ValueError: from `update`, no parameters came.

    Source: Micikevicius et al., "Mixed Precision Training", 2018, arXiv:1710.03740, section 3.1.
    """
    inner = as_transformation(inner)
    stored = None if param_dtype is None else jnp.dtype(param_dtype)
    if stored is not None and not jnp.issubdtype(stored, jnp.floating):
        raise TypeError(f"param_dtype must be a floating dtype, got {stored}.")

    def master_of(p: Any) -> Any:
        # A copy, so that donating the parameters does not take the masters along.
        return jnp.array(p, jnp.float32, copy=True) if _needs_master(p, stored) else optax.MaskedNode()

    def init(params: Any) -> MasterWeightsState:
        master = jax.tree.map(master_of, params)
        full = hide_untrainable(fill_hidden(master, params))
        return MasterWeightsState(master, strong(inner.init(full)))

    def update(updates: Any, state: MasterWeightsState, params: Any = None, **extra_args: Any) -> Any:
        if params is None:
            raise ValueError("master_weights needs the parameters: call update(grads, state, params).")
        _require_stored(params, state.master)
        grads = to_float32(hide_untrainable(updates, like=params))
        full = hide_untrainable(fill_hidden(state.master, params))
        steps, inner_state = inner.update(grads, state.inner, params=full, **extra_args)
        master = jax.tree.map(_stepped, state.master, steps, is_leaf=_is_masked)
        carried = jax.tree.map(_carrier, master, params, steps, is_leaf=_is_masked)
        return fill_hidden(carried, updates), MasterWeightsState(master, keep_dtypes(inner_state, state.inner))

    return transformation(init, update)


def sync(params: Any, opt_state: Any) -> Any:
    """Returns `params` with every parameter that has a master replaced by the master, cast to its dtype.

    Args:
      params: the parameters, in the dtypes that they are stored in.
      opt_state: optimizer state with one `master_weights` somewhere in it.

    Raises:
      ValueError: the state holds no masters, or several.
    """
    from precision_lab.optim.access import find_state

    state = find_state(opt_state, MasterWeightsState, "master_weights")
    return jax.tree.map(
        lambda m, p: p if _is_masked(m) else m.astype(p.dtype), state.master, params, is_leaf=_is_masked
    )


def _needs_master(p: Any, stored: Any) -> bool:
    """Returns whether a leaf given to `init` is, or will be, stored in low precision."""
    if stored is None:
        return is_low_precision(p)
    castable = p.dtype in (jnp.float32, jnp.float16, jnp.bfloat16)
    return castable and jnp.finfo(stored).bits < 32


def _is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def _stepped(master: Any, step: Any) -> Any:
    """Returns the master after `step`, or what stands in its place."""
    if _is_masked(master) or _is_masked(step) or step is None:
        return master
    return (master + step).astype(jnp.float32)


def _carrier(master: Any, p: Any, step: Any) -> Any:
    """Returns the float32 update that takes `p` to the cast of `master`; `step` where there is no master."""
    if _is_masked(master) or _is_masked(step) or step is None:
        return step
    target = master.astype(p.dtype)
    difference = target.astype(jnp.float32) - p.astype(jnp.float32)
    # Adding -0.0 changes no value, neither zero nor infinity, whose difference to itself would be NaN.
    return jnp.where(target == p, jnp.float32(-0.0), difference)


def _require_stored(params: Any, master: Any) -> None:
    """Raises TypeError for a parameter that has a master but is not stored in low precision."""

    def check(path: Any, m: Any, p: Any) -> None:
        if not _is_masked(m) and not is_low_precision(p):
            raise TypeError(
                f"parameter '{jax.tree_util.keystr(path, simple=True, separator='/')}' is {p.dtype}, but "
                "master_weights(param_dtype=...) made a master for it. Cast the parameters after init: "
                "policy.cast_to_param(params)."
            )

    jax.tree_util.tree_map_with_path(check, master, params, is_leaf=_is_masked)

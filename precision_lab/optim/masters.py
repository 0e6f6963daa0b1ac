"""Float32 master weights as an optax transformation.

    tx = loss_scaling(master_weights(optax.adamw(1e-3)), DynamicLossScale())

The parameters of the model are stored in 16 bits; the state holds a float32 master of each, or what is missing from
the parameter to make one. The inner transformation sees float32 gradients and masters, and after
`optax.apply_updates` the parameters are the masters, rounded.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from precision_lab.optim import remainders
from precision_lab.optim.carrying import carry
from precision_lab.optim.nesting import refuse_low_hyperparameters, refuse_spoilers_around
from precision_lab.optim.transformation import as_transformation, transformation
from precision_lab.optim.trees import (
    fill_hidden,
    hide_untrainable,
    is_low_precision,
    is_masked,
    is_trainable,
    keep_dtypes,
    path_text,
    strong,
    to_float32,
)

STORES = ("full", "split")


class MasterWeightsState(NamedTuple):
    """State of `master_weights`.

    Attributes:
      master: the parameters' tree with an array for each low-precision parameter, MaskedNode for the others. The array
        is the float32 master, or in int16 the remainder that makes the bfloat16 parameter a master.
      inner: state of the inner transformation.
    """

    master: Any
    inner: Any


def master_weights(
    inner: Any, *, param_dtype: Any = None, store: str = "full"
) -> optax.GradientTransformationExtraArgs:
    """Returns `inner`, applied to float32 masters of the low-precision parameters.

    The update of such a parameter `p` is the float32 number `u = cast(master) - p`, so that
    `optax.apply_updates(p, u)`, which adds in float32 and casts, gives `cast(master)`; `carry` names the extreme cases
    in which it cannot. A full master makes up for them at the next step, and `sync` at once. Nothing may come after
    this in a chain, because the update carries a rounding and not a direction; clipping, schedules and
    `inject_hyperparams` go inside. Parameters in float32 or wider have no master and are updated as `inner` says;
    leaves that are not floating are hidden from it.

    Args:
      inner: optax transformation; it sees float32 gradients, masters and moments.
      param_dtype: dtype in which parameters will be stored, if `init` is given the float32 originals. The masters
        then start from the originals instead of from rounded values. Leaves in float64, or float8, stay as they are.
      store: "full" keeps a float32 master, 4 bytes a parameter, and the parameter is its nearest-even cast.
        "split", for bfloat16 parameters only, keeps the 16 bits that the parameter lacks, 2 bytes: masters are the
        same, bit for bit, but ties are rounded away from zero, since no 16 bits can tell all float32 numbers
        apart that round to one even number (see `remainders`); that is 1 parameter in 131072, by 1 ulp. The
        parameter is half of its master, so it must not be changed by anything else; and a master above bfloat16's
        largest number, 3.39e38, makes it infinite, and is lost with the next step.

    Raises:
      TypeError: `inner` is no transformation; a parameter to be split is not bfloat16; or, from `update`, a parameter
        with a master came in float32.
      ValueError: `store` is unknown; from `init`, if this stands inside an optax wrapper that belongs inside it; from
        `update`, if no parameters came.

    Source: Micikevicius et al., "Mixed Precision Training", 2018, arXiv:1710.03740, section 3.1; "split" as
      `store_param_remainders` of NVIDIA TransformerEngine's FusedAdam.
    """
    inner = as_transformation(inner)
    stored = None if param_dtype is None else jnp.dtype(param_dtype)
    if stored is not None and not jnp.issubdtype(stored, jnp.floating):
        raise TypeError(f"param_dtype must be a floating dtype, got {stored}.")
    if store not in STORES:
        raise ValueError(f"store must be one of {', '.join(map(repr, STORES))}, got {store!r}.")

    def kept_at_first(path: Any, p: Any) -> Any:
        if not _needs_master(path, p, stored):
            return optax.MaskedNode()
        if store == "full":
            # A copy, so that donating the parameters does not take the masters along.
            return jnp.array(p, jnp.float32, copy=True)
        _require_bfloat16(path, stored or p.dtype)
        return remainders.remainder(p.astype(jnp.float32), p.astype(jnp.bfloat16))

    def init(params: Any) -> MasterWeightsState:
        refuse_spoilers_around("master_weights")
        kept = jax.tree_util.tree_map_with_path(kept_at_first, params)
        wide = jax.tree.map(lambda k, p: p if is_masked(k) else p.astype(jnp.float32), kept, params, is_leaf=is_masked)
        inner_state = strong(inner.init(hide_untrainable(wide)))
        refuse_low_hyperparameters(inner_state)
        return MasterWeightsState(kept, inner_state)

    def update(updates: Any, state: MasterWeightsState, params: Any = None, **extra_args: Any) -> Any:
        if params is None:
            raise ValueError("master_weights needs the parameters: call update(grads, state, params).")
        _require_stored(params, state.master)
        before = _masters(state.master, params)
        wide = hide_untrainable(fill_hidden(before, params))
        grads = to_float32(hide_untrainable(updates, like=params))
        steps, inner_state = inner.update(grads, state.inner, params=wide, **extra_args)
        after = jax.tree.map(_stepped, before, steps, is_leaf=is_masked)
        carried = jax.tree.map(_carried, state.master, after, params, steps, is_leaf=is_masked)
        kept = jax.tree.map(_kept, state.master, after, is_leaf=is_masked)
        return fill_hidden(carried, updates), MasterWeightsState(kept, keep_dtypes(inner_state, state.inner))

    return transformation(init, update)


def sync(params: Any, opt_state: Any) -> Any:
    """Returns `params` with every parameter that has a master replaced by the master, cast to its dtype.

    A parameter that is half of its master (store="split") stays as it is.

    Args:
      params: the parameters, in the dtypes that they are stored in.
      opt_state: optimizer state with one `master_weights` somewhere in it.

    Raises:
      ValueError: the state holds no masters, or several.
    """
    return jax.tree.map(
        lambda k, p: p if is_masked(k) or _is_remainder(k) else k.astype(p.dtype),
        _found(opt_state).master,
        params,
        is_leaf=is_masked,
    )


def full_precision(params: Any, opt_state: Any) -> Any:
    """Returns `params` with every parameter that has a master replaced by the float32 master itself.

    For evaluation or export in float32; the arguments and errors are those of `sync`.
    """
    return fill_hidden(_masters(_found(opt_state).master, params), params)


def _found(opt_state: Any) -> MasterWeightsState:
    from precision_lab.optim.access import find_state

    return find_state(opt_state, MasterWeightsState, "master_weights")


def _needs_master(path: Any, p: Any, stored: Any) -> bool:
    """Returns whether a leaf given to `init` is, or will be, a trained parameter stored in low precision."""
    if not is_trainable(path, p):
        return False
    if stored is None:
        return is_low_precision(p)
    castable = p.dtype in (jnp.float32, jnp.float16, jnp.bfloat16)
    return castable and jnp.finfo(stored).bits < 32


def _is_remainder(kept: Any) -> bool:
    return kept.dtype == jnp.int16


def _masters(kept: Any, params: Any) -> Any:
    """Returns the float32 masters, MaskedNode where there are none."""
    return jax.tree.map(
        lambda k, p: remainders.join(p, k) if not is_masked(k) and _is_remainder(k) else k,
        kept,
        params,
        is_leaf=is_masked,
    )


def _no_step(master: Any, step: Any) -> bool:
    return is_masked(master) or is_masked(step) or step is None


def _stepped(master: Any, step: Any) -> Any:
    """Returns the master after `step`, or what stands in its place."""
    return master if _no_step(master, step) else (master + step).astype(jnp.float32)


def _carried(kept: Any, master: Any, p: Any, step: Any) -> Any:
    """Returns the update that takes `p` to the cast of `master`; `step` where there is no master."""
    if _no_step(master, step):
        return step
    return carry(remainders.nearest_away(master) if _is_remainder(kept) else master.astype(p.dtype), p)


def _kept(kept: Any, master: Any) -> Any:
    """Returns what the state holds of `master`, in the form of `kept`."""
    if is_masked(kept) or not _is_remainder(kept):
        return master
    return remainders.remainder(master, remainders.nearest_away(master))


def _require_bfloat16(path: Any, dtype: Any) -> None:
    if dtype != jnp.bfloat16:
        raise TypeError(
            f"parameter '{path_text(path)}' is {dtype}, and store='split' adds 16 bits to bfloat16 only. "
            "Use store='full'."
        )


def _require_stored(params: Any, kept: Any) -> None:
    """Raises TypeError for a parameter that has a master but is not stored as it was said to be."""

    def check(path: Any, k: Any, p: Any) -> None:
        if is_masked(k) or (p.dtype == jnp.bfloat16 if _is_remainder(k) else is_low_precision(p)):
            return
        raise TypeError(
            f"parameter '{path_text(path)}' is {p.dtype}, but master_weights(param_dtype=...) made a master for it. "
            "Cast the parameters after init: policy.cast_to_param(params)."
        )

    jax.tree_util.tree_map_with_path(check, kept, params, is_leaf=is_masked)

"""Updating low-precision parameters in place, without a master: rounded to nearest, stochastically, or compensated.

In all three `inner` sees float32 copies of gradients and parameters, so that its moments and its step are float32;
they differ in how the sum of parameter and step becomes a number of the parameter's dtype. Parameters in float32 or
wider are updated as `inner` says.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from precision_lab.formats import random_bits, round_to
from precision_lab.optim.carrying import carry
from precision_lab.optim.nesting import refuse_low_hyperparameters, refuse_spoilers_around
from precision_lab.optim.transformation import as_transformation, transformation
from precision_lab.optim.trees import (
    fill_hidden,
    hide_untrainable,
    is_low_precision,
    is_masked,
    keep_dtypes,
    strong,
    to_float32,
)


class StochasticRoundingState(NamedTuple):
    """State of `stochastic_rounding`.

    Attributes:
      key: randomness of all steps.
      count: int32, applied steps; with the key it gives the randomness of the next one.
      inner: state of the inner transformation.
    """

    key: jax.Array
    count: jax.Array
    inner: Any


class KahanState(NamedTuple):
    """State of `kahan`.

    Attributes:
      compensation: the parameters' tree with what roundings have lost of each low-precision parameter, in its own
        dtype; MaskedNode for the others.
      inner: state of the inner transformation.
    """

    compensation: Any
    inner: Any


def nearest_rounding(inner: Any) -> optax.GradientTransformationExtraArgs:
    """Returns `inner` in float32 on low-precision parameters that are rounded to nearest at every step.

    `inner` sees float32 copies of gradients and parameters, so its moments are float32 and its update is exact to
    float32; `optax.apply_updates` then adds in float32 and rounds to the parameter's dtype. What is lost is what
    this rounding loses, and nothing else: an update below half an ulp of the parameter has no effect. That is the
    baseline against which `master_weights` is measured. Its state is that of `inner`.

    Stock optax on 16-bit parameters also keeps Adam's moments in 16 bits, where `eps` and small squares are zero.

    Args:
      inner: optax transformation.

    Raises:
      TypeError: `inner` is no transformation.
      ValueError: from `init`, if this stands inside an optax wrapper that belongs inside it.

    Source: the update without master copy of Micikevicius et al., 2018, arXiv:1710.03740, section 3.1 and figure 2b;
      "nearest" in Zamirai et al., "Revisiting BFloat16 Training", 2020, arXiv:2010.06192, section 3.
    """
    inner = as_transformation(inner)

    def init(params: Any) -> Any:
        return _inner_state(inner, params, "nearest_rounding")

    def update(updates: Any, state: Any, params: Any = None, **extra_args: Any) -> Any:
        steps, new_state = _wide_update(inner, updates, state, params, extra_args)
        return fill_hidden(steps, updates), new_state

    return transformation(init, update)


def stochastic_rounding(inner: Any, key: jax.Array) -> optax.GradientTransformationExtraArgs:
    """Returns `inner` in float32 on low-precision parameters that are rounded stochastically at every step.

    The sum of parameter and step, in float32, goes to one of its two neighbours in the parameter's dtype, to the
    upper one with a probability equal to the distance from the lower one. So the parameter is right on average, and
    an update far below half an ulp has its effect in the long run. A sum that the dtype holds is not changed; one
    within an ulp of the largest value may become infinite. The update carries the result as in `master_weights`, so
    nothing may come after this in a chain.

    The key is folded with the number of applied steps and split over the leaves: leaves and steps are independent,
    equal keys give equal bits, and replicas that hold the same state round alike. Members of a vmapped ensemble, and
    shards of a parameter inside `shard_map`, share the random bits unless their states are given keys of their own.

    Args:
      inner: optax transformation.
      key: JAX key, typed or not.

    Raises:
      TypeError: `inner` is no transformation, or `key` is no key.
      ValueError: from `init`, if this stands inside an optax wrapper that belongs inside it; from `update`, if no
        parameters came.

    Source: Gupta et al., "Deep Learning with Limited Numerical Precision", 2015, arXiv:1502.02551, section 3;
      "stochastic rounding" in Zamirai et al., 2020, arXiv:2010.06192, section 4.
    """
    inner = as_transformation(inner)
    _require_key(key)

    def init(params: Any) -> StochasticRoundingState:
        # A copy, so that donating the state leaves the caller's key alone.
        inner_state = _inner_state(inner, params, "stochastic_rounding")
        return StochasticRoundingState(jnp.copy(key), jnp.zeros((), jnp.int32), inner_state)

    def update(updates: Any, state: StochasticRoundingState, params: Any = None, **extra_args: Any) -> Any:
        _require_params(params, "stochastic_rounding")
        steps, inner_state = _wide_update(inner, updates, state.inner, params, extra_args)
        keys = _keys(jax.random.fold_in(state.key, state.count), params)
        after = jax.tree.map(_stochastic, params, steps, keys)
        carried = jax.tree.map(_carried, params, after, steps)
        return fill_hidden(carried, updates), StochasticRoundingState(state.key, state.count + 1, inner_state)

    return transformation(init, update)


def kahan(inner: Any) -> optax.GradientTransformationExtraArgs:
    """Returns `inner` in float32 on low-precision parameters that remember what their roundings lost.

    With `c` the compensation and `u` the step of `inner`, every operation rounded to nearest even in the parameter's
    dtype:  c = c + u;  new = p + c;  c = c + (p - new). So two 16-bit numbers stand for about one of 24 bits or so
    (bfloat16: 8 bits each), in the memory of a float32 one. The update carries the result as in `master_weights`, so
    nothing may come after this in a chain, and nothing else may change the parameters.

    Args:
      inner: optax transformation.

    Raises:
      TypeError: `inner` is no transformation.
      ValueError: from `init`, if this stands inside an optax wrapper that belongs inside it; from `update`, if no
        parameters came.

    Source: Zamirai et al., "Revisiting BFloat16 Training", 2020, arXiv:2010.06192, section 4, in
      the form of torchdistx's AnyPrecisionAdamW, which adds what was lost where the paper subtracts its negative.
    """
    inner = as_transformation(inner)

    def init(params: Any) -> KahanState:
        trained = hide_untrainable(params)
        zeros = jax.tree.map(lambda p: jnp.zeros_like(p) if is_low_precision(p) else optax.MaskedNode(), trained)
        return KahanState(zeros, _inner_state(inner, params, "kahan"))

    def update(updates: Any, state: KahanState, params: Any = None, **extra_args: Any) -> Any:
        _require_params(params, "kahan")
        steps, inner_state = _wide_update(inner, updates, state.inner, params, extra_args)
        lost = jax.tree.map(_with_step, state.compensation, steps, is_leaf=is_masked)
        after = jax.tree.map(_sum, params, lost)
        carried = jax.tree.map(_carried, params, after, steps)
        compensation = jax.tree.map(_still_lost, lost, params, after, is_leaf=is_masked)
        return fill_hidden(carried, updates), KahanState(compensation, inner_state)

    return transformation(init, update)


def _inner_state(inner: Any, params: Any, name: str) -> Any:
    """Returns the state of `inner` for float32 parameters."""
    refuse_spoilers_around(name)
    state = strong(inner.init(to_float32(hide_untrainable(params))))
    refuse_low_hyperparameters(state)
    return state


def _wide_update(inner: Any, updates: Any, state: Any, params: Any, extra_args: Any) -> tuple[Any, Any]:
    """Returns the step of `inner` on float32 gradients and parameters, and its state."""
    grads = to_float32(hide_untrainable(updates, like=params))
    wide = None if params is None else to_float32(hide_untrainable(params))
    steps, new_state = inner.update(grads, state, params=wide, **extra_args)
    return steps, keep_dtypes(new_state, state)


def _is_rounded(p: Any, u: Any) -> bool:
    """Returns whether `p` is stored in low precision and `u` is a step for it."""
    return not is_masked(u) and u is not None and is_low_precision(p)


def _round(x: jax.Array, dtype: Any, **how: Any) -> jax.Array:
    """Returns float32 `x` in `dtype`."""
    return round_to(x.astype(jnp.float32), dtype, **how).astype(dtype)


def _carried(p: Any, after: Any, u: Any) -> Any:
    """Returns the update that takes `p` to `after`; `u` where nothing is rounded."""
    return carry(after, p) if _is_rounded(p, u) else u


def _stochastic(p: Any, u: Any, key: jax.Array) -> Any:
    """Returns `p` after the step, `p` where nothing is rounded."""
    if not _is_rounded(p, u):
        return p
    # float32 to bfloat16 discards 16 bits, subnormals included: as many random ones are exact, at half the cost.
    random = {"bits": random_bits(key, p.shape, jnp.uint16)} if p.dtype == jnp.bfloat16 else {"key": key}
    return _round(p.astype(jnp.float32) + u, p.dtype, rounding="stochastic", **random)


def _with_step(c: Any, u: Any) -> Any:
    """Returns what is to be added to the parameter."""
    return c if is_masked(c) or not _is_rounded(c, u) else _round(c.astype(jnp.float32) + u, c.dtype)


def _sum(p: Any, lost: Any) -> Any:
    """Returns the parameter with as much of `lost` as its dtype takes."""
    return p if is_masked(lost) else _round(p.astype(jnp.float32) + lost.astype(jnp.float32), p.dtype)


def _still_lost(lost: Any, p: Any, after: Any) -> Any:
    """Returns `lost` without what the parameter has taken."""
    if is_masked(lost):
        return lost
    taken_back = _round(p.astype(jnp.float32) - after.astype(jnp.float32), p.dtype)
    return _round(lost.astype(jnp.float32) + taken_back.astype(jnp.float32), p.dtype)


def _keys(key: jax.Array, like: Any) -> Any:
    """Returns a tree like `like` of independent keys."""
    structure = jax.tree.structure(like)
    keys = jax.random.split(key, structure.num_leaves)
    return jax.tree.unflatten(structure, [keys[n] for n in range(structure.num_leaves)])


def _require_key(key: Any) -> None:
    dtype = getattr(key, "dtype", None)
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key) and key.shape == ()
    if not typed and not (dtype == jnp.uint32 and key.ndim == 1):
        raise TypeError(f"stochastic_rounding expects one JAX key, such as jax.random.key(0), got {key!r}.")


def _require_params(params: Any, name: str) -> None:
    if params is None:
        raise ValueError(f"{name} needs the parameters: call update(grads, state, params).")

"""The state of `loss_scaling`: how it starts, and what a step makes of it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from precision_lab.optim.scales import DynamicLossScale, LossScale, NoLossScale, StaticLossScale


class LossScaleState(NamedTuple):
    """State of `loss_scaling`; all but `inner` are scalars.

    Attributes:
      loss_scale: float32, the scale of the next loss.
      good_steps: int32, finite steps in a row since the scale last changed.
      last_finite: bool, whether the last gradients were finite.
      skipped: int32, steps skipped so far.
      consecutive_skips: int32, steps skipped since the last applied one.
      floor_skips: int32, how many of the latest of these were taken with the scale at its smallest.
      total: int32, calls of `update`.
      bad_leaf: int32, number of the first leaf that was not finite, in the order of `jax.tree.leaves(params)`, at the
        first step of the latest run of such steps (later ones of a run may owe theirs to that); -1 if there was none.
      inner: state of the inner transformation.
    """

    loss_scale: jax.Array
    good_steps: jax.Array
    last_finite: jax.Array
    skipped: jax.Array
    consecutive_skips: jax.Array
    floor_skips: jax.Array
    total: jax.Array
    bad_leaf: jax.Array
    inner: Any


def start(config: LossScale, inner: Any) -> LossScaleState:
    """Returns the state before the first step."""
    # One buffer each: a buffer that occurs twice in a state cannot be donated.
    good, skipped, consecutive, at_floor, total = (jnp.zeros((), jnp.int32) for _ in range(5))
    return LossScaleState(
        loss_scale=jnp.asarray(_initial(config), jnp.float32),
        good_steps=good,
        last_finite=jnp.ones((), jnp.bool_),
        skipped=skipped,
        consecutive_skips=consecutive,
        floor_skips=at_floor,
        total=total,
        bad_leaf=jnp.full((), -1, jnp.int32),
        inner=inner,
    )


def advance(config: LossScale, state: LossScaleState, first_bad: jax.Array, none: int, inner: Any) -> LossScaleState:
    """Returns the state after a step whose first bad leaf was `first_bad`, which is `none` if all were finite."""
    finite = first_bad == none
    skip = jnp.zeros((), jnp.bool_) if isinstance(config, NoLossScale) else jnp.logical_not(finite)
    loss_scale, good_steps = _adjusted(config, state, finite)
    return LossScaleState(
        loss_scale=loss_scale,
        good_steps=good_steps,
        last_finite=finite,
        skipped=state.skipped + skip.astype(jnp.int32),
        consecutive_skips=_count_while(skip, state.consecutive_skips),
        floor_skips=_count_while(skip & _at_floor(config, state), state.floor_skips),
        total=jnp.asarray(optax.safe_increment(state.total)),
        bad_leaf=jnp.where(state.last_finite & ~finite, first_bad, state.bad_leaf),
        inner=inner,
    )


def _initial(config: LossScale) -> float | jax.Array:
    if isinstance(config, DynamicLossScale):
        return config.init
    return config.scale if isinstance(config, StaticLossScale) else 1.0


def _count_while(flag: jax.Array, count: jax.Array) -> jax.Array:
    """Returns one more while `flag` holds, else zero."""
    return jnp.where(flag, count + 1, jnp.zeros((), jnp.int32))


def _at_floor(config: LossScale, state: LossScaleState) -> jax.Array:
    """Returns whether no smaller scale is left; a static scale has no other."""
    if isinstance(config, DynamicLossScale):
        return state.loss_scale <= jnp.float32(config.min)
    return jnp.ones((), jnp.bool_)


def _adjusted(config: LossScale, state: LossScaleState, finite: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the next scale, and the finite steps counted towards its growth."""
    counted = jnp.where(finite, optax.safe_increment(state.good_steps), jnp.zeros((), jnp.int32))
    if not isinstance(config, DynamicLossScale):
        return state.loss_scale, counted
    grow = counted >= config.interval
    larger = jnp.minimum(state.loss_scale * jnp.float32(config.growth), jnp.float32(config.max))
    smaller = jnp.maximum(state.loss_scale * jnp.float32(config.backoff), jnp.float32(config.min))
    fall = state.consecutive_skips + 1 >= config.hysteresis
    unfinite = jnp.where(fall, smaller, state.loss_scale)
    loss_scale = jnp.where(finite, jnp.where(grow, larger, state.loss_scale), unfinite)
    return loss_scale, jnp.where(grow, jnp.zeros((), jnp.int32), counted)

"""Loss scaling as an optax transformation.

    tx = loss_scaling(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)), DynamicLossScale())

The loss is multiplied by the scale where it is computed (`scale_loss`); everything else happens here, in this order:
gradients to float32, unscaled, checked; the inner transformation, unless a gradient is not finite; the
scale adjusted. So clipping sees true gradients, and a skipped step leaves schedules and moments alone.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from precision_lab.optim.nesting import refuse_optax_around
from precision_lab.optim.scales import (
    DynamicLossScale,
    LossScale,
    NoLossScale,
    StaticLossScale,
    as_loss_scale,
)
from precision_lab.optim.transformation import as_transformation, transformation
from precision_lab.optim.trees import fill_hidden, hide_untrainable, keep_dtypes, select, strong, to_float32

_DYNAMIC = DynamicLossScale()


class LossScaleState(NamedTuple):
    """State of `loss_scaling`; all but `inner` are scalars.

    Attributes:
      loss_scale: float32, the scale of the next loss.
      good_steps: int32, finite steps in a row since the scale last changed.
      last_finite: bool, whether the last gradients were finite.
      skipped: int32, steps skipped so far.
      consecutive_skips: int32, steps skipped since the last applied one.
      total: int32, calls of `update`.
      inner: state of the inner transformation.
    """

    loss_scale: jax.Array
    good_steps: jax.Array
    last_finite: jax.Array
    skipped: jax.Array
    consecutive_skips: jax.Array
    total: jax.Array
    inner: Any


def loss_scaling(
    inner: Any, scale: LossScale | Any = _DYNAMIC, *, axis_name: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Returns `inner`, fed with unscaled float32 gradients, and skipped where one of them is not finite.

    A skipped step returns updates of -0.0, which change no bit of a parameter, and leaves the state of `inner` as it
    was, bit for bit. Leaves that are not floating (integers, float0, keys) are returned as they came, are hidden from
    `inner`, and do not count in the check; float64 and complex gradients keep their dtype. Updates are float32 for
    narrower gradients, so that `optax.apply_updates` adds them in float32. The state keeps its dtypes whatever `inner`
    does.

    Args:
      inner: optax transformation (or `optax.MultiSteps`). It must not stand inside another one, see
        `precision_lab.optim.nesting`. For 16-bit parameters wrap it in `master_weights` or `nearest_rounding`;
        otherwise its moments take the dtype of the parameters.
      scale: `DynamicLossScale`, `StaticLossScale`, `NoLossScale`, or one of jmp's.
      axis_name: mapped axis, or axes, of `vmap` or `shard_map` whose members must agree on skipping. Only needed
        where gradients differ between members when they arrive here; under jit with sharded arrays they do not.

    Raises:
      TypeError: `inner` or `scale` is not what it should be.
      ValueError: from `init`, if this stands inside an optax wrapper or another `loss_scaling`.

    Source: Micikevicius et al., "Mixed Precision Training", 2018, arXiv:1710.03740, section 3.2; the check follows
      the unscaling, in float32, so that a scale below 1 is safe as well.
    """
    inner = as_transformation(inner)
    config = as_loss_scale(scale)
    may_skip = not isinstance(config, NoLossScale)

    def init(params: Any) -> LossScaleState:
        refuse_optax_around("loss_scaling")
        inner_state = strong(inner.init(hide_untrainable(params)))
        _refuse_second_scale(inner_state)
        # Four buffers, not one: a buffer that occurs twice in a state cannot be donated.
        good_steps, skipped, consecutive_skips, total = (jnp.zeros((), jnp.int32) for _ in range(4))
        loss_scale = jnp.asarray(_initial(config), jnp.float32)
        return LossScaleState(
            loss_scale, good_steps, jnp.ones((), jnp.bool_), skipped, consecutive_skips, total, inner_state
        )

    def update(updates: Any, state: LossScaleState, params: Any = None, **extra_args: Any) -> Any:
        grads = _unscaled(hide_untrainable(updates, like=params), state.loss_scale)
        finite = _agree(all_finite(grads), axis_name)
        if may_skip:
            # A NaN must not even enter: transformations that mask by multiplying would keep it.
            grads = jax.tree.map(lambda g: jnp.where(finite, g, jnp.zeros_like(g)), grads)
        hidden_params = None if params is None else hide_untrainable(params)
        steps, inner_state = inner.update(grads, state.inner, params=hidden_params, **extra_args)
        if may_skip:
            # The sum with -0.0 keeps every parameter, -0.0 too, which +0.0 would turn into +0.0.
            steps = jax.tree.map(lambda u: jnp.where(finite, u, -jnp.zeros_like(u)), steps)
            inner_state = select(finite, inner_state, state.inner)
        else:
            inner_state = keep_dtypes(inner_state, state.inner)
        return fill_hidden(steps, updates), _advance(config, state, finite, skip=may_skip, inner=inner_state)

    return transformation(init, update)


def all_finite(tree: Any) -> jax.Array:
    """Returns a scalar bool: whether no element of `tree` is infinite or NaN."""
    checks = [jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(tree)]
    return jnp.all(jnp.stack(checks)) if checks else jnp.ones((), jnp.bool_)


def _initial(config: LossScale) -> float:
    if isinstance(config, DynamicLossScale):
        return config.init
    return config.scale if isinstance(config, StaticLossScale) else 1.0


def _unscaled(grads: Any, loss_scale: jax.Array) -> Any:
    """Returns the gradients over the scale, in float32 or wider.

    The product with the reciprocal is exact for a power of two, and else within 1.5 ulp. A division would be no
    better: XLA makes the same product of it, but at times computes it again in every use.
    """
    reciprocal = 1 / loss_scale

    def unscale(g: jax.Array) -> jax.Array:
        if jnp.issubdtype(g.dtype, jnp.complexfloating):
            return jax.lax.complex(unscale(g.real), unscale(g.imag))
        return g * reciprocal.astype(g.dtype)

    return jax.tree.map(unscale, strong(to_float32(grads)))


def _agree(finite: jax.Array, axis_name: Any) -> jax.Array:
    """Returns whether the gradients of every member of the mapped axes are finite."""
    if axis_name is None:
        return finite
    return jax.lax.pmin(finite.astype(jnp.int32), axis_name) == 1


def _advance(config: LossScale, state: LossScaleState, finite: jax.Array, *, skip: bool, inner: Any) -> LossScaleState:
    """Returns the state after a step."""
    zero = jnp.zeros((), jnp.int32)
    skipped = jnp.logical_not(finite).astype(jnp.int32) if skip else zero
    loss_scale, good_steps = _adjusted(config, state, finite)
    return LossScaleState(
        loss_scale=loss_scale,
        good_steps=good_steps,
        last_finite=finite,
        skipped=state.skipped + skipped,
        consecutive_skips=jnp.where(skipped > 0, state.consecutive_skips + 1, zero),
        total=jnp.asarray(optax.safe_increment(state.total)),
        inner=inner,
    )


def _adjusted(config: LossScale, state: LossScaleState, finite: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the next scale, and the finite steps counted towards its growth."""
    counted = jnp.where(finite, optax.safe_increment(state.good_steps), jnp.zeros((), jnp.int32))
    if not isinstance(config, DynamicLossScale):
        return state.loss_scale, counted
    grow = counted >= config.interval
    larger = jnp.minimum(state.loss_scale * jnp.float32(config.growth), jnp.float32(config.max))
    smaller = jnp.maximum(state.loss_scale * jnp.float32(config.backoff), jnp.float32(config.min))
    loss_scale = jnp.where(finite, jnp.where(grow, larger, state.loss_scale), smaller)
    return loss_scale, jnp.where(grow, jnp.zeros((), jnp.int32), counted)


def _refuse_second_scale(inner_state: Any) -> None:
    """Raises ValueError if the inner state holds a loss scale of its own."""
    leaves = jax.tree.leaves(inner_state, is_leaf=lambda x: isinstance(x, LossScaleState))
    if any(isinstance(x, LossScaleState) for x in leaves):
        raise ValueError("loss_scaling stands inside another loss_scaling; keep the outer one only.")

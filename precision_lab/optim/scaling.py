"""Loss scaling as an optax transformation.

    tx = loss_scaling(optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)), DynamicLossScale())

The loss is multiplied by the scale where it is computed (`scale_loss`); everything else happens here, in this order:
gradients to float32, unscaled, checked; the inner transformation, unless a gradient is not finite; the
scale adjusted. So clipping sees true gradients, and a skipped step leaves schedules and moments alone.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.core import Tracer

from precision_lab.optim.checking import agree, first_bad_leaf
from precision_lab.optim.nesting import refuse_low_hyperparameters, refuse_optax_around
from precision_lab.optim.scales import DynamicLossScale, LossScale, NoLossScale, as_loss_scale
from precision_lab.optim.state import LossScaleState, advance, start
from precision_lab.optim.transformation import as_transformation, transformation
from precision_lab.optim.trees import fill_hidden, hide_untrainable, keep_dtypes, select, strong, to_float32

_DYNAMIC = DynamicLossScale()


def loss_scaling(
    inner: Any, scale: LossScale | Any = _DYNAMIC, *, axis_name: Any = None
) -> optax.GradientTransformationExtraArgs:
    """Returns `inner`, fed with unscaled float32 gradients, and skipped where one of them is not finite.

    A skipped step returns updates of -0.0, which change no bit of a parameter, and leaves the state of `inner` as it
    was, bit for bit. Leaves that are not floating (integers, float0, keys), and those of Flax's collection
    `_overwrite_with_gradient`, are returned as they came, are hidden from `inner`, and do not count in the check;
    float64 and complex gradients keep their dtype. Updates are float32 for narrower gradients, so that
    `optax.apply_updates` adds them in float32. The state keeps its dtypes whatever `inner` does.

    Args:
      inner: optax transformation (or `optax.MultiSteps`). It must not stand inside another one, see
        `precision_lab.optim.nesting`. For 16-bit parameters wrap it in `master_weights`, `stochastic_rounding`,
        `kahan` or `nearest_rounding`; otherwise its moments take the dtype of the parameters.
      scale: `DynamicLossScale`, `StaticLossScale`, `NoLossScale`, or one of jmp's.
      axis_name: mapped axis, or axes, of `vmap` or `shard_map` whose members must agree on skipping. Only needed
        where gradients differ between members when they arrive here; under jit with sharded arrays they do not.

    Raises:
      TypeError: `inner` or `scale` is not what it should be.
      ValueError: from `init`, if this stands inside an optax wrapper or another `loss_scaling`, or if hyperparameters
        of `inner` would be stored in 16 bits.

    Source: Micikevicius et al., "Mixed Precision Training", 2018, arXiv:1710.03740, section 3.2; the check follows
      the unscaling, in float32, so that a scale below 1 is safe as well.
    """
    inner = as_transformation(inner)
    config = as_loss_scale(scale)

    def init(params: Any) -> LossScaleState:
        refuse_optax_around("loss_scaling")
        inner_state = strong(inner.init(hide_untrainable(params)))
        _refuse_second_scale(inner_state)
        refuse_low_hyperparameters(inner_state)
        return start(config, inner_state)

    def update(updates: Any, state: LossScaleState, params: Any = None, **extra_args: Any) -> Any:
        like = updates if params is None else params
        grads = hide_untrainable(updates, like=like)
        first_bad, none = first_bad_leaf(_unscaled(grads, state.loss_scale), like)
        first_bad = agree(first_bad, axis_name)
        hidden_params = None if params is None else hide_untrainable(params)

        def step(use: jax.Array | None) -> tuple[Any, Any]:
            true_grads = _unscaled(grads, state.loss_scale)
            if use is not None:
                # A NaN must not even enter: transformations that mask by multiplying would keep it.
                true_grads = jax.tree.map(lambda g: jnp.where(use, g, jnp.zeros_like(g)), true_grads)
            steps, inner_state = inner.update(true_grads, state.inner, params=hidden_params, **extra_args)
            return steps, keep_dtypes(inner_state, state.inner)

        if isinstance(config, NoLossScale):
            steps, inner_state = step(None)
        else:
            steps, inner_state = _step_if(first_bad == none, step, state.inner)
        return fill_hidden(steps, updates), advance(config, state, first_bad, none, inner_state)

    return transformation(init, update)


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


def _step_if(finite: jax.Array, step: Callable[[jax.Array | None], tuple[Any, Any]], state: Any) -> tuple[Any, Any]:
    """Returns what `step` returns, or -0.0 and the old state if not `finite`.

    A branch costs less than selecting element by element: XLA then reads each moment twice, and copies it if it is
    donated. Under vmap JAX makes a selection of the branch. Inside shard_map we do, since the members need not
    agree, and a collective in a branch that only some of them take would wait for ever.
    """
    if jax.sharding.get_abstract_mesh().manual_axes:
        steps, new_state = step(finite)
        return jax.tree.map(lambda u: jnp.where(finite, u, -jnp.zeros_like(u)), steps), select(finite, new_state, state)
    if not isinstance(finite, Tracer):
        # Outside jit a branch would be compiled again at every call.
        return step(None) if finite else (_nothing(jax.eval_shape(step, None)[0]), state)
    steps, _ = jax.eval_shape(step, None)
    return jax.lax.cond(finite, lambda: step(None), lambda: (_nothing(steps), state))


def _nothing(steps: Any) -> Any:
    """Returns updates that keep every parameter, -0.0 too, which +0.0 would turn into +0.0."""
    return jax.tree.map(lambda u: -jnp.zeros(u.shape, u.dtype), steps)


def _refuse_second_scale(inner_state: Any) -> None:
    """Raises ValueError if the inner state holds a loss scale of its own."""
    leaves = jax.tree.leaves(inner_state, is_leaf=lambda x: isinstance(x, LossScaleState))
    if any(isinstance(x, LossScaleState) for x in leaves):
        raise ValueError("loss_scaling stands inside another loss_scaling; keep the outer one only.")

"""The optimizer of a run, as an optax transformation."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from precision_lab.optim import (
    DynamicLossScale,
    NoLossScale,
    StaticLossScale,
    loss_scaling,
    master_weights,
    nearest_rounding,
)
from precision_lab.optim.scales import LossScale
from precision_lab.policy import Policy
from precision_lab.training.config import (
    AdamConfig,
    AdamWConfig,
    CosineSchedule,
    DynamicLossScaleConfig,
    LossScaleConfig,
    OptimConfig,
    RunConfig,
    SGDConfig,
    StaticLossScaleConfig,
    WarmupCosineSchedule,
)


class Hyper(NamedTuple):
    """Numbers of a run that its compiled step takes as arguments, so that runs that differ in them share it.

    Attributes:
      lr: float32, peak learning rate, `loss_shift` included.
      loss_factor: float32, 2**-loss_shift.
    """

    lr: jax.Array
    loss_factor: jax.Array


def hyper(config: RunConfig) -> Hyper:
    """Returns the numbers that `config` passes to its step."""
    shift = config.train.loss_shift
    # A product with a power of two is exact, so float32 sees the same learning rate with another exponent.
    return Hyper(jnp.float32(config.optim.lr) * jnp.float32(2.0**shift), jnp.float32(2.0**-shift))


def build_optimizer(config: RunConfig, numbers: Hyper) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer that `config` describes; its `init` takes the parameters in float32, not yet cast.

    Parameters that the policy stores in 16 bits have float32 masters, or are updated in place; the optimizer's own
    state is float32 either way.
    """
    inner = _inner(config.optim, _learning_rate(config, numbers), numbers)
    if config.optim.clip_norm is not None:
        inner = optax.chain(optax.clip_by_global_norm(config.optim.clip_norm), inner)
    params = Policy.parse(config.policy).params
    if config.master_weights:
        inner = master_weights(inner, param_dtype=params.dtype)
    elif params.bits < 32:
        inner = nearest_rounding(inner)
    return loss_scaling(inner, _loss_scale(config.loss_scale, skips=config.train.on_nonfinite == "skip"))


def _inner(optim: OptimConfig, lr: Callable, numbers: Hyper) -> optax.GradientTransformation:
    """Returns the optimizer proper."""
    match optim:
        case SGDConfig():
            sgd = optax.sgd(lr, momentum=optim.momentum or None, nesterov=optim.nesterov)
            if optim.weight_decay == 0:
                return sgd
            # The decay joins gradients that carry the factor, so it must carry it too.
            decay = jnp.float32(optim.weight_decay) * numbers.loss_factor
            return optax.chain(optax.add_decayed_weights(decay), sgd)
        case AdamWConfig():
            return optax.adamw(lr, optim.b1, optim.b2, optim.eps, weight_decay=optim.weight_decay)
        case AdamConfig():
            return optax.adam(lr, optim.b1, optim.b2, optim.eps)
    raise TypeError(f"no optimizer for {optim!r}.")


def _learning_rate(config: RunConfig, numbers: Hyper) -> Callable:
    """Returns the learning rate as a function of the number of applied steps."""
    factor = _schedule(config)
    return lambda count: numbers.lr * jnp.asarray(factor(count), jnp.float32)


def _schedule(config: RunConfig) -> Callable:
    """Returns the factor on the peak learning rate."""
    schedule, steps = config.optim.schedule, config.train.steps
    match schedule:
        case CosineSchedule():
            return optax.cosine_decay_schedule(1.0, steps, alpha=schedule.end)
        case WarmupCosineSchedule():
            return optax.warmup_cosine_decay_schedule(0.0, 1.0, schedule.warmup, steps, end_value=schedule.end)
    return lambda count: 1.0


def _loss_scale(config: LossScaleConfig, *, skips: bool) -> LossScale:
    """Returns the loss scale that `config` describes; a scale of 1 where there is none but steps are to be skipped."""
    match config:
        case DynamicLossScaleConfig():
            return DynamicLossScale(config.init, config.growth, config.backoff, config.interval, config.min, config.max)
        case StaticLossScaleConfig():
            return StaticLossScale(config.scale)
    return StaticLossScale(1.0) if skips else NoLossScale()

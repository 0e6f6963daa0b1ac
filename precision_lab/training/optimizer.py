"""The optimizer of a run, as an optax transformation."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from precision_lab.optim import (
    DynamicLossScale,
    NoLossScale,
    StaticLossScale,
    kahan,
    loss_scaling,
    low_bit_state,
    master_weights,
    nearest_rounding,
    stochastic_rounding,
)
from precision_lab.optim.scales import LossScale
from precision_lab.policy import Policy
from precision_lab.training.config import (
    AdamConfig,
    AdamWConfig,
    CosineSchedule,
    DynamicLossScaleConfig,
    OptimConfig,
    RunConfig,
    SGDConfig,
    StaticLossScaleConfig,
    WarmupCosineSchedule,
)
from precision_lab.training.numbers import Hyper

_ROUNDING = 0x524E44  # the stream of random numbers that rounds parameters


def build_optimizer(config: RunConfig, numbers: Hyper, seed: Any = 0) -> optax.GradientTransformationExtraArgs:
    """Returns the optimizer that `config` describes.

    Parameters that the policy stores in 16 bits have float32 masters, or are updated in place; the optimizer's own
    state is float32 either way, unless `optim.state` quantizes it. With masters, `init` takes the parameters in
    float32, not yet cast; else as stored.

    Args:
      config: the run; its own seed does not count.
      numbers: what may be traced.
      seed: of the run. Only `init` needs it: what follows from it is in the state.
    """
    inner = _inner(config.optim, _learning_rate(config, numbers), numbers)
    if config.optim.state is not None:
        inner = low_bit_state(inner, config.optim.state)
    if config.optim.clip_norm is not None:
        inner = optax.chain(optax.clip_by_global_norm(config.optim.clip_norm), inner)
    params = Policy.parse(config.policy).params
    if config.master_weights:
        inner = master_weights(inner, param_dtype=params.dtype)
    elif params.bits < 32:
        inner = _in_place(config.update, inner, seed)
    return loss_scaling(inner, _loss_scale(config, numbers.loss_scale))


def _in_place(update: str, inner: Any, seed: Any) -> optax.GradientTransformationExtraArgs:
    """Returns `inner` on parameters that are rounded as `update` says."""
    if update == "stochastic":
        # As words, which every checkpointer can save.
        return stochastic_rounding(inner, jax.random.key_data(jax.random.fold_in(jax.random.key(seed), _ROUNDING)))
    return kahan(inner) if update == "kahan" else nearest_rounding(inner)


def _inner(optim: OptimConfig, lr: Callable, numbers: Hyper) -> optax.GradientTransformation:
    """Returns the optimizer proper."""

    def number(name: str) -> Any:
        return numbers.optim.get(name, getattr(optim, name))

    match optim:
        case SGDConfig():
            sgd = optax.sgd(lr, momentum=number("momentum") if optim.momentum else None, nesterov=optim.nesterov)
            if optim.weight_decay == 0:
                return sgd
            # The decay joins gradients that carry the factor, so it must carry it too.
            decay = number("weight_decay") * numbers.loss_factor
            return optax.chain(optax.add_decayed_weights(decay), sgd)
        case AdamWConfig():
            betas = number("b1"), number("b2")
            return optax.adamw(lr, *betas, number("eps"), weight_decay=number("weight_decay"))
        case AdamConfig():
            return optax.adam(lr, number("b1"), number("b2"), number("eps"))
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


def _loss_scale(config: RunConfig, numbers: Mapping[str, Any]) -> LossScale:
    """Returns the loss scale of a run; a scale of 1 where there is none but steps are to be skipped."""
    match config.loss_scale:
        case DynamicLossScaleConfig():
            return DynamicLossScale(**numbers)
        case StaticLossScaleConfig():
            return StaticLossScale(**numbers)
    return StaticLossScale(1.0) if config.train.on_nonfinite == "skip" else NoLossScale()

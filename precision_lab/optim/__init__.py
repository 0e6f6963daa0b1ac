"""Optax transformations for low-precision training: loss scaling, master weights, rounding in place."""

from precision_lab.optim.access import (
    current_loss_scale,
    first_nonfinite,
    no_usable_scale,
    require_usable_scale,
    skipped_steps,
    step_was_applied,
)
from precision_lab.optim.carrying import apply_updates
from precision_lab.optim.low_bit_state import (
    LowBitMoment,
    LowBitState,
    low_bit_state,
    second_moments,
    zero_second_moment_fraction,
)
from precision_lab.optim.masters import MasterWeightsState, full_precision, master_weights, sync
from precision_lab.optim.rounding import (
    KahanState,
    StochasticRoundingState,
    kahan,
    nearest_rounding,
    stochastic_rounding,
)
from precision_lab.optim.scales import DynamicLossScale, NoLossScale, StaticLossScale
from precision_lab.optim.scaling import loss_scaling
from precision_lab.optim.state import LossScaleState
from precision_lab.optim.stepping import commit, scale_loss, value_and_scaled_grad
from precision_lab.optim.weight_clipping import glorot_scaling, weight_clipping

__all__ = [
    "DynamicLossScale",
    "KahanState",
    "LossScaleState",
    "LowBitMoment",
    "LowBitState",
    "MasterWeightsState",
    "NoLossScale",
    "StaticLossScale",
    "StochasticRoundingState",
    "apply_updates",
    "commit",
    "current_loss_scale",
    "first_nonfinite",
    "full_precision",
    "glorot_scaling",
    "kahan",
    "loss_scaling",
    "low_bit_state",
    "master_weights",
    "nearest_rounding",
    "no_usable_scale",
    "require_usable_scale",
    "scale_loss",
    "second_moments",
    "skipped_steps",
    "step_was_applied",
    "stochastic_rounding",
    "sync",
    "value_and_scaled_grad",
    "weight_clipping",
    "zero_second_moment_fraction",
]

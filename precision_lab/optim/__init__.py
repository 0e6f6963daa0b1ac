"""Optax transformations for low-precision training: loss scaling, master weights, rounding in place."""

from precision_lab.optim.access import (
    current_loss_scale,
    scale_loss,
    skipped_steps,
    step_was_applied,
)
from precision_lab.optim.masters import MasterWeightsState, master_weights, sync
from precision_lab.optim.rounding import nearest_rounding
from precision_lab.optim.scales import DynamicLossScale, NoLossScale, StaticLossScale
from precision_lab.optim.scaling import LossScaleState, loss_scaling

__all__ = [
    "DynamicLossScale",
    "LossScaleState",
    "MasterWeightsState",
    "NoLossScale",
    "StaticLossScale",
    "current_loss_scale",
    "loss_scaling",
    "master_weights",
    "nearest_rounding",
    "scale_loss",
    "skipped_steps",
    "step_was_applied",
    "sync",
]

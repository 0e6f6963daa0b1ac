"""Flax-facing: models under a policy."""

from precision_lab.nn.apply import apply_policy, explain, sites
from precision_lab.nn.calibration import Calibrated, calibrate
from precision_lab.nn.conversion import convert
from precision_lab.nn.delayed import DelayedScaling

__all__ = ["Calibrated", "DelayedScaling", "apply_policy", "calibrate", "convert", "explain", "sites"]

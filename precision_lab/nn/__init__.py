"""Flax-facing: models under a policy."""

from precision_lab.nn.apply import apply_policy, explain, sites
from precision_lab.nn.delayed import DelayedScaling

__all__ = ["DelayedScaling", "apply_policy", "explain", "sites"]

"""Policies: which number format every tensor of a computation has. Data only, and free of JAX at import."""

from precision_lab.policy.policy import Policy, Rule
from precision_lab.policy.presets import PRESETS, Preset

__all__ = ["PRESETS", "Policy", "Preset", "Rule"]

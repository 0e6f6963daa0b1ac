"""Policies: which number format every tensor of a computation has. Data only, and free of JAX at import."""

from precision_lab.policy.accumulator import Accumulator
from precision_lab.policy.ops import OP_TABLE
from precision_lab.policy.policy import Policy, Rule
from precision_lab.policy.presets import PRESETS, Preset
from precision_lab.policy.treatment import Treatment

__all__ = ["OP_TABLE", "PRESETS", "Accumulator", "Policy", "Preset", "Rule", "Treatment"]

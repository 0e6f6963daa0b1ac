"""Telemetry: statistics of tensors, computed inside jit, collected per site."""

from precision_lab.telemetry.compare import Compared, Comparison, Difference, compare
from precision_lab.telemetry.doctor import Diagnosis, doctor
from precision_lab.telemetry.observation import Observation
from precision_lab.telemetry.observe import ROLES, observe, observed, tree_stats
from precision_lab.telemetry.reading import Reading, Window, window
from precision_lab.telemetry.statistics import TensorStats, empty, merge, tensor_stats

__all__ = [
    "ROLES",
    "Compared",
    "Comparison",
    "Diagnosis",
    "Difference",
    "Observation",
    "Reading",
    "TensorStats",
    "Window",
    "compare",
    "doctor",
    "empty",
    "merge",
    "observe",
    "observed",
    "tensor_stats",
    "tree_stats",
    "window",
]

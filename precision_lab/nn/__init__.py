"""Flax-facing: models under a policy."""

from precision_lab.nn.apply import apply_policy, explain, sites

__all__ = ["apply_policy", "explain", "sites"]

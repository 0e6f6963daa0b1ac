"""Flax-facing: models under a policy."""

from precision_lab.nn.apply import apply_policy, sites

__all__ = ["apply_policy", "sites"]

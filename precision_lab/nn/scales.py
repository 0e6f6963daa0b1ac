"""Static scales as converted models carry them: a dict by site and operand, in a variable or collection of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from precision_lab.quant.core import Given

SCALES = "quantization_scales"  # attribute of a converted NNX model, collection of a Linen model
Scales = dict[
    str, dict[str, dict[str, jax.Array]]
]  # of each site and operand: scale, and zero_point where there is one


def given_scales(scales: Mapping[str, Any]) -> dict[str, dict[str, Given]]:
    """Returns stored scales as the rewrite takes them."""
    return {site: {role: Given(**found) for role, found in roles.items()} for site, roles in scales.items()}

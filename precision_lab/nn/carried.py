"""What models carry beside their parameters: static scales by site and operand, adapters by path of a parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from precision_lab.quant.core import Given
from precision_lab.rewrite import Adapter

SCALES = "quantization_scales"  # attribute of a converted NNX model, collection of a Linen model
LORA, LORA_FACTOR = "lora_adapters", "lora_factor"  # likewise: adapters by path, and the one factor of them all
NUMBERS = "quantizer_numbers"  # attribute of an NNX model: numbers of its quantizers, by setting
# Of each site and operand: its scale, and its zero point where there is one.
Scales = dict[str, dict[str, dict[str, jax.Array]]]


def given_scales(scales: Mapping[str, Any]) -> dict[str, dict[str, Given]]:
    """Returns stored scales as the rewrite takes them."""
    return {site: {role: Given(**found) for role, found in roles.items()} for site, roles in scales.items()}


def adapters_of(matrices: Mapping[str, Any], factor: Any) -> dict[str, Adapter]:
    """Returns stored adapters as the rewrite takes them; no gradient reaches their factor."""
    return {path: Adapter(pair["a"], pair["b"], jax.lax.stop_gradient(factor)) for path, pair in matrices.items()}


def refuse_adapters(target: Any, params: Any, what: str) -> None:
    """Raises ValueError for a model with adapters, which `what` would not see."""
    if hasattr(target, LORA) or (isinstance(params, Mapping) and LORA in params):
        raise ValueError(f"{what} does not see the adapters of this model; merge them first: nn.merge_lora(model, x).")

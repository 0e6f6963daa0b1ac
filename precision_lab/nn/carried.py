"""What models carry beside their parameters: static scales by site and operand, adapters by path of a parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from precision_lab.quant.core import Given
from precision_lab.rewrite import Adapter, is_qtensor, leaf_names

SCALES = "quantization_scales"  # attribute of a converted NNX model, collection of a Linen model
LORA, LORA_FACTOR = "lora_adapters", "lora_factor"  # likewise: adapters by path, and the one factor of them all
NUMBERS = "quantizer_numbers"  # attribute of an NNX model: numbers of its quantizers, by setting
CONVERTED = "precision_converted"  # attribute of a function that convert returned
_BEFORE = "give it the model from before the conversion."
# Of each site and operand: its scale, and its zero point where there is one.
Scales = dict[str, dict[str, dict[str, jax.Array]]]


def given_scales(scales: Mapping[str, Any]) -> dict[str, dict[str, Given]]:
    """Returns stored scales as the rewrite takes them."""
    return {site: {role: Given(**found) for role, found in roles.items()} for site, roles in scales.items()}


def adapters_of(matrices: Mapping[str, Any], factor: Any) -> dict[str, Adapter]:
    """Returns stored adapters as the rewrite takes them; no gradient reaches their factor."""
    return {path: Adapter(pair["a"], pair["b"], jax.lax.stop_gradient(factor)) for path, pair in matrices.items()}


def refuse_carried(target: Any, params: Any, what: str) -> None:
    """Raises ValueError for a model that carries what `what` would not see: it takes models in floating formats."""
    if hasattr(target, LORA) or (isinstance(params, Mapping) and LORA in params):
        raise ValueError(f"{what} does not see the adapters of this model; merge them first: nn.merge_lora(model, x).")
    if getattr(type(target), "precision_qat", None) is not None:
        raise ValueError(
            f"{what} does not see the ranges and scales that a model of prepare_qat has trained. pl.convert(model, "
            "None, x) keeps them; pl.apply_policy(model, 'float32') leaves them out."
        )
    if hasattr(target, CONVERTED) or hasattr(target, SCALES) or (isinstance(params, Mapping) and SCALES in params):
        raise ValueError(f"{what} does not see the static scales of a converted model; {_BEFORE}")
    tree = nnx.to_pure_dict(nnx.state(target, nnx.Param)) if isinstance(target, nnx.Module) else params
    for name, leaf in zip(leaf_names(tree), jax.tree.leaves(tree, is_leaf=is_qtensor), strict=True):
        if is_qtensor(leaf):
            raise ValueError(f"{what} needs floating weights, and '{name}' is stored as {leaf.quantizer}; {_BEFORE}")

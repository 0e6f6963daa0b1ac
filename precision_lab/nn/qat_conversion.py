"""Conversion of models of `prepare_qat`: what they learned and observed as static scales."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from precision_lab.nn.calibration import Calibrated, arguments, shape_of_leaf
from precision_lab.nn.linen_policy import linen_sites
from precision_lab.nn.linen_qat import taken
from precision_lab.nn.nnx_policy import nnx_sites
from precision_lab.nn.qat import QAT, static_scales
from precision_lab.nn.quantizer_states import STATES
from precision_lab.policy import Policy
from precision_lab.policy.deriving import for_inference
from precision_lab.quant.tiles import Tiles
from precision_lab.rewrite import Use


def as_trained(target: Any, policy: Any, params: Any, args: Any, kwargs: Any) -> Calibrated | None:
    """Returns a model of `prepare_qat` with the scales that its quantizers have; None for anything else.

    Args:
      target, policy, params, args, kwargs: as of `convert`.

    Raises:
      TypeError: an example or a Linen model's variables are missing.
      ValueError: another policy than the model's, or a model that is not quantized yet or has no ranges yet.
    """
    qat: QAT | None = getattr(type(target), "precision_qat", None)
    if qat is None:
        return None
    if policy is not None and Policy.parse(policy) != qat.policy:
        raise ValueError(
            f"this model was trained under '{qat.policy}', not '{Policy.parse(policy)}'; leave it as None."
        )
    if not (args or kwargs):
        raise TypeError("convert needs an example of what the model is called with: pl.convert(model, None, x).")
    inference = for_inference(qat.policy)
    given, named = arguments(target, params, args, kwargs)
    if isinstance(target, nnx.Module):
        state = getattr(target, STATES).state
        table = nnx_sites(target, inference, given, named, everything=False)
    else:
        own, rest = params.get("params", {}), {name: tree for name, tree in params.items() if name != "params"}
        state, own, rest = taken(own, rest)
        params = {"params": own, **rest}
        table = linen_sites(target, inference, (params, *args), kwargs, everything=False)
    steps = min(int(np.min(np.asarray(s["steps"]))) for roles in state["running"].values() for s in roles.values())
    if steps < qat.delay:
        raise ValueError(f"after {steps} steps the model is not quantized yet, as delay={qat.delay} says; train it.")
    shapes = jax.tree.map(shape_of_leaf, (tuple(args), kwargs))
    return Calibrated(target, inference, params, {}, static_scales(state, table), shapes)


def as_stored(array: Any, places: np.ndarray, use: Use, shape: tuple[int, ...]) -> jax.Array | None:
    """Returns scales as they are in a product, in the shape that they have where the parameter is stored.

    Args:
      array: scales, with the leading axes of a stacked parameter.
      places: the number of each as it is stored.
      use: how the parameter is used.
      shape: that of the whole parameter.

    Returns:
      An array of the shape of the scales after leading axes, or a scalar; None where the two have no such relation.
    """
    if jnp.ndim(array) == 0:
        return array
    stack = jnp.shape(array)[: use.stack]
    if jnp.shape(array)[use.stack :] != places.shape:
        return None
    in_order = jnp.reshape(array, (*stack, -1))[..., np.argsort(places.reshape(-1))]
    assert use.quantizer is not None
    scales = Tiles.of(shape[use.stack :], use.quantizer.granularity, use.axes).scale_shape
    return in_order.reshape((*stack, *scales))

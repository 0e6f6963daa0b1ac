"""Outlier features: those of the largest activations are multiplied as they are, all others quantized.

One feature of large magnitude sets the scale of every token, and leaves the others a few steps of the grid. There are
few such features, so both operands are taken apart along the axis that the product contracts.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from precision_lab.formats import Format, round_to
from precision_lab.rewrite.bilinear import Matmul
from precision_lab.rewrite.held import quantized_by
from precision_lab.rewrite.parameters import dense, is_stored
from precision_lab.rewrite.quantized import NOTHING_GIVEN


@dataclasses.dataclass(frozen=True)
class Outliers:
    """Which features are not quantized.

    Attributes:
      threshold: those with an activation of this magnitude or more, at any token.
      compute: format in which they are multiplied.
      activation: operand that is no parameter.
    """

    threshold: float
    compute: Format
    activation: int


def decomposed(layouts: Any, operands: Sequence[Any], quantizers: Sequence[Any], given: Any, how: Outliers) -> Any:
    """Returns both operands of a matrix product as they are multiplied, in its layout.

    Features that are outliers keep their values, in the compute format; all others are on the grids of the quantizers,
    whose scales are found without the outliers. The features of the two kinds are different terms of the same sums, so
    one product is the sum of the two that the paper takes.

    Args:
      layouts: operation and layouts of the product.
      operands: arrays, or parameters.
      quantizers: of each operand.
      given: of each operand what its quantizer does not find itself, which must be nothing.
      how: which features.

    Raises:
      ValueError: a convolution, weights that are stored quantized, or scales from outside.

    Source: Dettmers et al., "LLM.int8()", 2022, arXiv:2208.07339, section 3.2, equation 8. Their integer product
      accumulates in int32 and the 16-bit one apart; here both are simulated and accumulate as the policy says.
    """
    if not isinstance(layouts.op, Matmul):
        raise ValueError(f"{_what(how)} is for matrix products; leave a convolution out by a rule: outliers=none.")
    if any(is_stored(x) for x in operands):
        raise ValueError(f"{_what(how)} needs the weights of outliers as they were, and these are stored quantized.")
    if any(getattr(one, "given", one) is not NOTHING_GIVEN for one in given):  # other numbers of a quantizer may be
        raise ValueError(f"{_what(how)} finds scales without the outliers in every call; they cannot be given.")
    arrays = [layout(dense(x)).astype(jnp.float32) for layout, x in zip(layouts.operands, operands, strict=True)]
    contracted = [axes[0] for axes in layouts.op.contracted()]
    x = arrays[how.activation]
    kept = -3 - contracted[how.activation]  # the other of the last two axes
    features = jnp.max(jnp.abs(x), axis=kept, keepdims=True, initial=0) >= how.threshold
    masks = [features, features]
    masks[1 - how.activation] = features.swapaxes(-1, -2)
    parts = zip(arrays, masks, quantizers, contracted, given, strict=True)
    return tuple(_mixed(x, mask, quantizer, axis, one, how.compute) for x, mask, quantizer, axis, one in parts)


def _mixed(x: jax.Array, mask: jax.Array, quantizer: Any, axis: int, given: Any, compute: Format) -> jax.Array:
    """Returns an operand whose outliers are in the compute format and whose other elements are quantized."""
    return jnp.where(mask, round_to(x, compute), quantized_by(jnp.where(mask, 0, x), quantizer, (axis,), given))


def _what(how: Outliers) -> str:
    return f"outliers={how.threshold:g}"

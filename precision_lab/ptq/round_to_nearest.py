"""Round to nearest: every weight by itself, under the scale that its quantizer finds. The baseline of all methods."""

from __future__ import annotations

from typing import Any

import jax

from precision_lab.ptq.info import Info, info_of
from precision_lab.quant import QTensor, quantize
from precision_lab.quant import quantizer as parsed


def round_to_nearest(weight: jax.Array, quantizer: Any, axis: tuple[int, ...]) -> tuple[QTensor, Info]:
    """Returns a weight quantized by `quantize`, and what that has made of it.

    Args:
      weight: floating array of any shape.
      quantizer: a Quantizer or its string.
      axis: axes that its product contracts.

    Raises:
      ValueError: the quantizer draws its rounding.
    """
    if parsed(quantizer).rounding == "stochastic":
        raise ValueError(f"{parsed(quantizer)!r}: weights that are stored once are rounded to nearest; leave it out.")
    stored = quantize(weight, quantizer, axis=axis)
    return stored, info_of(weight, stored)

"""Products with large packed weights: widened block by block, so that the whole never lies there in floats."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from precision_lab.quant import QTensor
from precision_lab.rewrite.parameters import Parameter

SIZE = 2**22  # elements from which on a weight is widened in blocks
_ROWS = 512  # of a block, at most
Product = Callable[[jax.Array, jax.Array], jax.Array]


def block_rows(x: Any) -> int:
    """Returns the rows of a block of a stored weight (in, out), 0 if it is to be widened as a whole.

    Blocks are rows of whole bytes and whole groups, so that each is a slice of what is stored.
    """
    if not isinstance(x, Parameter) or not isinstance(x.value, QTensor) or x.order != (0, 1):
        return 0
    stored = x.value
    if math.prod(stored.shape) < SIZE or len(stored.shape) != 2 or stored.axis != (0,) or not _is_sliceable(stored):
        return 0
    inputs, outputs = stored.shape
    whole = math.lcm(8 // math.gcd(8, outputs * stored.quantizer.code_format.bits), *stored.quantizer.granularity.sizes)
    return max((rows for rows in range(whole, _ROWS + 1, whole) if inputs % rows == 0), default=0)


def _is_sliceable(stored: QTensor) -> bool:
    """Returns whether a run of rows has codes, and scales or none, of its own."""
    fmt, kind = stored.quantizer.code_format, stored.quantizer.granularity.kind
    plain = stored.zero_points is None and stored.offsets is None and stored.tensor_scale is None
    digits = getattr(fmt, "packed", None)  # several to a byte, which do not keep to rows
    return plain and digits is None and fmt.kind != "block" and kind in ("channel", "group", "tensor") and fmt.bits <= 8


def product_in_blocks(x: jax.Array, weight: Parameter, rows: int, product: Product) -> jax.Array:
    """Returns (..., M, in) times a stored (in, out), float32, as the sum of the products with blocks of its rows.

    Args:
      x: left operand.
      weight: stored weight.
      rows: of a block, from `block_rows`.
      product: product of (..., M, rows) and the float32 values of a block; differentiable in its left operand, for
        which blocks are widened again.
    """
    stored = weight.value
    inputs, outputs = stored.shape
    count = inputs // rows
    scale, by_group = stored.scale, stored.quantizer.granularity.kind == "group"
    scales = scale.reshape(count, -1, outputs) if by_group else None
    slices = jnp.moveaxis(x.reshape(*x.shape[:-1], count, rows), -2, 0)

    @jax.checkpoint
    def body(total: jax.Array, block: Any) -> tuple[jax.Array, None]:
        packed, own, part = block
        changed = {"packed": packed, "scales": scale if own is None else own, "shape": (rows, outputs)}
        quantizer = dataclasses.replace(stored.quantizer, scale_format="float32")
        values = dataclasses.replace(stored, **changed, quantizer=quantizer, dtype=np.dtype(np.float32)).dequantize()
        return total + product(part, values), None

    start = jnp.zeros((*x.shape[:-1], outputs), jnp.float32)
    return jax.lax.scan(body, start, (stored.packed.reshape(count, -1), scales, slices))[0]

"""fake_quantize: an array with the values its quantized self would have, and a gradient to train through."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from precision_lab.formats import round_to_blocks
from precision_lab.quant import checks
from precision_lab.quant.arithmetic import narrow
from precision_lab.quant.core import Given, Parts, products, quantize_parts
from precision_lab.quant.estimators import with_gradient
from precision_lab.quant.numbers import QuantizerParams, static_params
from precision_lab.quant.options import is_integer_grid
from precision_lab.quant.parsing import quantizer
from precision_lab.quant.quantizer import Quantizer
from precision_lab.quant.tiles import Tiles


def fake_quantize(
    x: Any,
    qz: Any,
    *,
    axis: int | tuple[int, ...] | None = None,
    key: jax.Array | None = None,
    scale: Any = None,
    zero_point: Any = None,
    offset: Any = None,
    params: QuantizerParams | None = None,
    on_nonfinite: str = "nan",
) -> jax.Array:
    """Returns `x` with every element on the grid of the quantizer: bit for bit `quantize(x, qz, ...).dequantize()`.

    Args:
      x: float16, bfloat16 or float32 array of any shape.
      qz: a quantizer or anything that `quantizer` takes.
      axis: the contracted axis or axes of the product that `x` enters. "channel" and "token" share a scale along them;
        "group" and one-dimensional block formats make runs along the last of them; others ignore it.
      key: randomness, for rounding "stochastic".
      scale: scale to use instead of one found in `x`, positive: a number, or an array that broadcasts to the shape of
        the scales, which is that of `x` with the number of runs along each axis. Learned by the estimators "lsq",
        "lsq+" and "pact"; a constant for the others.
      zero_point: code of zero, for scheme "affine" with a scale.
      offset: what is subtracted before and added after, in the units of `x`, for estimator "lsq+".
      params: numbers to use instead of those of `qz`, as of `quantizer_params`; they may be traced.
      on_nonfinite: "nan", or "raise" for an error that counts the NaNs and infinities in `x`.

    Returns:
      An array like `x`. A group of zeros stays zero, as does one so small that its scale would be subnormal; a group
      with a NaN or an infinity is NaN. A last run that is smaller has its own scale. Results beyond the dtype of `x`
      become its largest value.

    Raises:
      TypeError: `x` is of another dtype.
      ValueError: a quantizer that is not possible, an axis that is missing, arguments the quantizer has no use for,
        negative values for an unsigned format without zero point (unless `x` is traced, when they become zero), or
        under "raise" a NaN, an infinity, or a traced `x`.
    """
    given = Given(scale, zero_point, offset)
    options: dict[str, Any] = {"axis": axis, "key": key, "params": params, "on_nonfinite": on_nonfinite}
    return fake_quantize_parts(x, qz, given, with_parts=False, **options)[0]


def fake_quantize_parts(
    x: Any,
    qz: Any,
    given: Given,
    *,
    axis: int | tuple[int, ...] | None = None,
    key: jax.Array | None = None,
    params: QuantizerParams | None = None,
    on_nonfinite: str = "nan",
    with_parts: bool = True,
) -> tuple[jax.Array, Parts | None]:
    """Returns what `fake_quantize` does, and the parts that it is made of, as constants; None of a block format."""
    qz = quantizer(qz)
    x, given = checks.checked(x, qz, key, given)
    checks.refuse_nonfinite(x, on_nonfinite)
    grids = qz.format.kind == "float" and params is not None and params.format is not None
    if params is not None and not (grids or is_integer_grid(qz.format)):
        raise ValueError(f"params= are for scaled scalar formats, not for {qz!r}; make them with quantizer_params().")
    if qz.format.kind == "block":
        axes = checks.block_axes(x.shape, qz, axis)
        rounded = round_to_blocks(jax.lax.stop_gradient(x), qz.format, axis=axes, rounding=qz.rounding, key=key)
        return with_gradient(rounded, x, None, None, given, qz, None), None
    tiles = Tiles.of(x.shape, qz.granularity, axis)
    checks.check_shapes(given, tiles, qz)
    return _fake(x, given, params, key, qz, tiles, with_parts)


@partial(jax.jit, static_argnums=(4, 5, 6), inline=True)
def _fake(
    x: jax.Array, given: Given, params: Any, key: Any, qz: Quantizer, tiles: Tiles, with_parts: bool
) -> tuple[jax.Array, Parts | None]:
    """Returns `x` quantized, with its gradient, and its parts if they are asked for."""
    fixed, fixed_given = jax.lax.stop_gradient((x, given))
    n = static_params(qz) if params is None else jax.tree.map(jnp.asarray, params)
    value, parts = _quantized(fixed, fixed_given, params, key, qz, tiles)
    return with_gradient(value, x, parts, tiles, given, qz, n), parts if with_parts else None


@partial(jax.jit, static_argnums=(4, 5))
def _quantized(
    x: jax.Array, given: Given, params: Any, key: Any, qz: Quantizer, tiles: Tiles
) -> tuple[jax.Array, Parts]:
    """Returns `x` quantized, and its parts; called rather than inlined, so that it is traced and lowered once."""
    n = static_params(qz) if params is None else jax.tree.map(jnp.asarray, params)
    parts = quantize_parts(x, tiles, given, qz, n, key)
    return narrow(products(parts, tiles), np.dtype(x.dtype)), parts

"""Starts: the values that learned numbers of a quantizer have before the first step of training."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from precision_lab.quant.arithmetic import divide, multiply, ordered_mean, widen
from precision_lab.quant.calibration import extent
from precision_lab.quant.core import Given, quantize_parts
from precision_lab.quant.numbers import static_params
from precision_lab.quant.options import CALIBRATIONS, default_calibration
from precision_lab.quant.quantizer import Quantizer
from precision_lab.quant.scales import usable
from precision_lab.quant.tiles import Tiles

PACT_ALPHA = 10.0


def needs_data(qz: Quantizer, start: str | None) -> bool:
    """Returns whether the start of a learned quantizer depends on an array, not on its shape alone."""
    return qz.estimator != "pact" or _calibration(qz, start) is not None


def start_of(x: Any, qz: Quantizer, tiles: Tiles, start: str | None) -> dict[str, jax.Array]:
    """Returns the learned numbers by name, float32 of the shape of scales.

    Args:
      x: array to start from, of which NaN and infinities are left out; its shape is enough if not `needs_data`.
      qz: a learned quantizer.
      tiles: what shares a scale.
      start: a calibration whose range the grid shall cover at first; None is that of the quantizer if it has another
        than the default one, else what the estimator's paper says.

    Source: LSQ: Esser et al., 2020, arXiv:1902.08153, section 2.1; LSQ+: Bhalgat et al., 2020, arXiv:2004.09576,
      section 3.2, three deviations about the mean for weights (signed formats, offset zero), smallest and largest
      value for activations (unsigned formats); PACT: Choi et al., 2018, arXiv:1805.06085, an alpha larger than the
      values, 10.
    """
    calibration = _calibration(qz, start)
    n = static_params(qz)
    if qz.estimator == "pact" and calibration is None:
        return {"alpha": jnp.full(tiles.scale_shape, np.float32(PACT_ALPHA) * n.clip, jnp.float32)}
    x = widen(jnp.asarray(x))
    x = jax.lax.stop_gradient(jnp.where(jnp.isfinite(x), x, 0))
    if qz.estimator == "lsq+":
        scale, offset = _lsq_plus(x, qz, tiles) if calibration is None else _ranged(x, qz, tiles, calibration)
        return {"scale": scale, "offset": offset}
    scale, _ = _found(x, replace(qz, calibration=calibration or "lsq"), tiles)
    return {"alpha": scale * n.high} if qz.estimator == "pact" else {"scale": scale}


def _calibration(qz: Quantizer, start: str | None) -> str | None:
    """Returns the calibration that is asked for, None for the paper's start."""
    if start is not None and (start not in CALIBRATIONS or start in ("percentile", "ema")):
        raise ValueError(
            f"start={start!r} is no range to start from; expected one of "
            f"{', '.join(name for name in CALIBRATIONS if name not in ('percentile', 'ema'))}, or a percentile in the "
            "quantizer's string, as in 'int8,lsq,percentile99.9'."
        )
    own = None if qz.calibration == default_calibration(qz.format) else qz.calibration
    return start or own


def _found(x: jax.Array, qz: Quantizer, tiles: Tiles) -> tuple[jax.Array, Any]:
    """Returns scale and zero point that a quantizer finds in `x`."""
    found = replace(qz, estimator="ste", rounding="nearest_even", scale_format="float32", strength=None)
    parts = quantize_parts(x, tiles, Given(), found, static_params(found), None)
    return jnp.asarray(parts.scale), parts.zero_point


def _ranged(x: jax.Array, qz: Quantizer, tiles: Tiles, calibration: str) -> tuple[jax.Array, jax.Array]:
    """Returns scale and offset that cover the range of a calibration; the offset is zero for signed formats."""
    if qz.format.signed or calibration in ("absmean", "lsq"):
        scale, _ = _found(x, replace(qz, estimator="ste", calibration=calibration), tiles)
        return scale, jnp.zeros_like(scale)
    scale, zero_point = _found(x, replace(qz, estimator="ste", scheme="affine", calibration=calibration), tiles)
    return scale, multiply(-zero_point, scale)


def _lsq_plus(x: jax.Array, qz: Quantizer, tiles: Tiles) -> tuple[jax.Array, jax.Array]:
    """Returns scale and offset as LSQ+ starts them."""
    n = static_params(qz)
    if qz.format.signed:
        mean = tiles.reduce(x, ordered_mean)
        square = tiles.reduce(multiply(x, x), ordered_mean)
        apart = 3 * jnp.sqrt(jnp.maximum(square - mean * mean, 0))
        reach = jnp.maximum(jnp.abs(mean - apart), jnp.abs(mean + apart)) * n.clip
        scale = usable(divide(reach, np.float32(2 ** (qz.format.bits - 1))), qz)
        return scale, jnp.zeros_like(scale)
    largest = tiles.reduce(x, lambda part, axes: jnp.max(part, axes, keepdims=True, initial=-np.inf))
    smallest = -tiles.reduce(-x, lambda part, axes: jnp.max(part, axes, keepdims=True, initial=-np.inf))
    if not x.size:
        largest, smallest = extent(x, tiles)
    scale = usable(divide((largest - smallest) * n.clip, n.high - n.low), qz)
    return scale, smallest - n.low * scale

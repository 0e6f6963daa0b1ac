"""The one function behind fake and real quantization: an array to grid values, scales and zero points, and back.

real = values * scale + offset, where values are codes less their zero point, or the values that codes stand for. Fake
quantization multiplies at once; a QTensor stores the codes and does the same when it is read.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from precision_lab.formats import Codebook, round_to, round_to_codebook
from precision_lab.formats.elementwise import where
from precision_lab.quant import calibration, double
from precision_lab.quant.arithmetic import ONE, divide, multiply, ordered_mean, widen
from precision_lab.quant.numbers import QuantizerParams
from precision_lab.quant.options import DOUBLE, is_integer_grid
from precision_lab.quant.quantizer import Quantizer
from precision_lab.quant.scales import (
    SIDED,
    WIDE,
    Range,
    power_of_two_above,
    rounded_scale,
    scale_of,
    usable,
    zero_point_of,
)
from precision_lab.quant.thresholds import Thresholds, thresholds
from precision_lab.quant.tiles import Tiles

# The reciprocal of a larger scale is not normal; that of a quarter of it is, and multiplies a quarter of the values.
_LARGEST_WITH_RECIPROCAL = np.float32(2.0**126)


class Given(NamedTuple):
    """What a caller fixes instead of having it found in the array; scalars or of the shape of scales."""

    scale: Any = None
    zero_point: Any = None
    offset: Any = None


class Parts(NamedTuple):
    """An array after rounding, float32.

    Attributes:
      values: on the grid, of the shape of the array split into tiles.
      scale: of the shape of scales; NaN where a value is not finite; None if there is none.
      zero_point: code of zero, of the shape of scales, or None.
      offset: added to the products, of the shape of scales, or None.
      doubled: the scales as they are stored, if they are quantized themselves.
    """

    values: Any
    scale: Any
    zero_point: Any = None
    offset: Any = None
    doubled: double.DoubleScales | None = None


def quantize_parts(x: jax.Array, tiles: Tiles, given: Given, qz: Quantizer, n: QuantizerParams, key: Any) -> Parts:
    """Returns an array quantized; anything but a block format."""
    x = widen(x)
    if not qz.is_scaled and qz.format.kind == "float" and qz.format.has_nan:
        overflow = "saturate" if qz.scheme == "clamped" else None if qz.format.has_inf else "saturate_finite"
        return Parts(round_to(x, qz.format, rounding=qz.rounding, overflow=overflow, key=key), None)
    whole = (calibration.extent if qz.scheme in SIDED else calibration.magnitude)(x, tiles)
    if qz.estimator == "dorefa":
        return _dorefa(x, tiles, whole, qz, n, key)
    own = thresholds(x, tiles, qz)
    found, scale, doubled = _scale(x, tiles, whole, given, own, qz, n)
    zero_point = given.zero_point
    if qz.has_zero_point:
        zero_point = zero_point_of(found, scale, n) if zero_point is None else jnp.float32(zero_point)
        zero_point = jnp.broadcast_to(zero_point, tiles.scale_shape)
    offset = given.offset if given.offset is None else jnp.broadcast_to(jnp.float32(given.offset), tiles.scale_shape)
    divisor, centre = (scale, offset) if own is None else (usable(own.step, qz), own.centre)
    steps = _steps(x, tiles, divisor, centre, qz)
    # Without a scale not even a division by one, which flushes subnormals, and with them signs.
    steps = steps if qz.is_scaled else x
    values = grid_values(steps, _spread(tiles, zero_point), qz, n, key)
    scale = scale if _follows(qz, given) else _poisoned(scale, whole)
    return Parts(values, scale, zero_point, offset, doubled)


def products(parts: Parts, tiles: Tiles) -> jax.Array:
    """Returns what the parts stand for, float32, in the shape of the array."""
    if parts.scale is None:
        return parts.values
    real = multiply(parts.values, tiles.spread(parts.scale))
    return tiles.join(real if parts.offset is None else real + tiles.spread(parts.offset))


def grid_values(v: jax.Array, zero_point: Any, qz: Quantizer, n: QuantizerParams, key: Any) -> jax.Array:
    """Returns `v`, which is in units of the scale, rounded to the grid; codes less their zero point if there is one."""
    if zero_point is not None:
        within = jnp.clip(v, n.low - zero_point, n.high - zero_point)
        return round_to(within, WIDE, rounding=qz.rounding, key=key)
    if qz.format.kind == "codebook":
        return _random_level(v, qz.format, key) if key is not None else round_to_codebook(v, qz.format)
    if n.format is not None:
        return round_to(v, n.format, rounding=qz.rounding, key=key)
    if is_integer_grid(qz.format) and isinstance(n.high, jax.Array):  # The ends of the grid say it all.
        codes = round_to(v, WIDE, rounding=qz.rounding, overflow="saturate", key=key)
        return lax.min(lax.max(codes, n.low), n.high)
    return round_to(v, qz.code_format, rounding=qz.rounding, overflow="saturate", key=key)


def _random_level(v: jax.Array, book: Codebook, key: Any) -> jax.Array:
    """Returns one of the two levels around each element, which are equally spaced: the upper one the more probable,
    the nearer it is; beyond the outer levels these.

    Source: for two levels, Courbariaux et al., "BinaryConnect", 2015, arXiv:1511.00363, equations 2 and 3.
    """
    grid = book.grid()
    low, step = np.float32(grid[0]), np.float32(grid[1] - grid[0])
    places = jnp.clip(divide(v - low, step), 0, np.float32(len(grid) - 1))
    return multiply(round_to(places, WIDE, rounding="stochastic", key=key), step) + low


def _scale(
    x: jax.Array, tiles: Tiles, whole: Range, given: Given, own: Thresholds | None, qz: Quantizer, n: QuantizerParams
) -> tuple[Range, jax.Array, Any]:
    """Returns the range found, the scale to divide by, and how that is stored if it is quantized itself."""
    if given.scale is not None:
        found, scale = whole, jnp.broadcast_to(jnp.float32(given.scale), tiles.scale_shape)
    elif not qz.is_scaled:
        found, scale = whole, jnp.ones(tiles.scale_shape, jnp.float32)
    elif own is not None:
        found, scale = whole, own.scale
    elif qz.calibration in ("absmean", "lsq"):
        found, scale = whole, calibration.mean_scale(x, tiles, qz, n)
        scale = power_of_two_above(scale) if qz.scheme == "pow2" else scale
    else:
        found = calibration.find_range(x, tiles, whole, qz, n, lambda each: _error(x, tiles, each, qz, n))
        scale = scale_of(found, qz, n)
    if qz.scale_format == DOUBLE:
        doubled = double.encode_scales(_poisoned(scale, whole))
        return found, usable(doubled.decode(), qz), doubled
    return found, usable(rounded_scale(scale, qz), qz), None


def nearest(x: jax.Array, tiles: Tiles, found: Range, qz: Quantizer, n: QuantizerParams) -> jax.Array:
    """Returns float32 `x` quantized as if `found` were its range; to the nearest, if rounding is stochastic.

    Scales that are quantized together are taken before that.
    """
    qz = replace(qz, rounding="nearest_even") if qz.rounding == "stochastic" else qz
    scale = scale_of(found, qz, n)
    scale = usable(scale if qz.scale_format == DOUBLE else rounded_scale(scale, qz), qz)
    zero_point = zero_point_of(found, scale, n) if qz.has_zero_point else None
    values = grid_values(_steps(x, tiles, scale, None, qz), _spread(tiles, zero_point), qz, n, None)
    return products(Parts(values, scale), tiles)


def _error(x: jax.Array, tiles: Tiles, found: Range, qz: Quantizer, n: QuantizerParams) -> jax.Array:
    """Returns the mean squared error of each group if its range is `found`."""
    apart = nearest(x, tiles, found, qz, n) - x
    return tiles.reduce(multiply(apart, apart), ordered_mean)


def _steps(x: jax.Array, tiles: Tiles, scale: jax.Array, offset: Any, qz: Quantizer) -> jax.Array:
    """Returns an array in units of its scale, split into tiles."""
    split = tiles.split(x)
    shifted = split if offset is None else split - tiles.spread(offset)
    if not qz.reciprocal:
        return divide(shifted, tiles.spread(scale))
    part = where(lax.gt(scale, _LARGEST_WITH_RECIPROCAL), np.float32(0.25), ONE)
    return multiply(multiply(shifted, tiles.spread(part)), tiles.spread(divide(1, multiply(scale, part))))


def _spread(tiles: Tiles, zero_point: Any) -> Any:
    """Returns zero points with the rank of tiles, None if there are none."""
    return None if zero_point is None else tiles.spread(zero_point)


def _follows(qz: Quantizer, given: Given) -> bool:
    """Returns whether a scale is NaN wherever the largest magnitude is not finite, being a multiple of it.

    A second look at every group would be repeated at every element, because XLA puts both in one loop.
    """
    plain = qz.is_scaled and qz.scheme not in SIDED and qz.calibration in ("absmax", "ema")
    return plain and qz.scale_format == "float32" and given.scale is None


def _poisoned(scale: jax.Array, whole: Range) -> jax.Array:
    """Returns the scale with NaN where the group holds a NaN or an infinity, so that no code hides it."""
    return jnp.where(jnp.isfinite(whole.low) & jnp.isfinite(whole.high), scale, np.float32(np.nan))


def _dorefa(x: jax.Array, tiles: Tiles, whole: Range, qz: Quantizer, n: QuantizerParams, key: Any) -> Parts:
    """Returns weights as DoReFa quantizes them: 2 * code / (2**bits - 1) - 1, of tanh(x) over its largest magnitude.

    Source: Zhou et al., "DoReFa-Net", 2016, arXiv:1606.06160, equation 9.
    """
    squashed = jnp.tanh(x)
    amax = jnp.maximum(-jnp.tanh(whole.low), jnp.tanh(whole.high))
    unit = multiply(divide(squashed, amax), jnp.float32(0.5)) + np.float32(0.5)
    codes = grid_values(multiply(unit, n.high), None, qz, n, key)
    empty = amax == 0
    scale = jnp.where(empty, np.float32(0), divide(2, n.high))
    offset = jnp.where(empty, np.float32(0), np.float32(-1))
    return Parts(codes, _poisoned(scale, whole), None, offset)

"""Calibration: the range of values that a grid shall cover, found in the array itself.

Every calibration but absmax cuts the range of the data at a threshold; which one is a question of statistics alone.
Sums are in a fixed order, so that a scale has the same bits in every program.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from precision_lab.quant.arithmetic import kept_shape, multiply, ordered_mean
from precision_lab.quant.kl import kl_threshold
from precision_lab.quant.numbers import QuantizerParams
from precision_lab.quant.quantizer import Quantizer
from precision_lab.quant.scales import Range
from precision_lab.quant.tiles import Tiles

# Candidates for the clip over the largest magnitude, in octaves: by quarters, then around the best by 32nds and 256ths.
_LEVELS = tuple(2.0 ** (np.arange(*span) / parts) for span, parts in (((0, -41, -1), 4), ((-8, 9), 32), ((-8, 9), 256)))

# Mean squared error of each group if its range is this one; of the shape of scales.
Error = Callable[[Range], jax.Array]


def extent(x: jax.Array, tiles: Tiles) -> Range:
    """Returns smallest and largest value that share a scale, and zero; NaN where a value is."""

    def of(part: jax.Array, axes: tuple[int, ...]) -> Range:
        low, high = (f(part, axes, keepdims=True, initial=0) for f in (jnp.min, jnp.max))
        # Whether NaN wins or loses a comparison is up to the backend.
        return Range(low, high)

    return tiles.reduce(x, of)


def magnitude(x: jax.Array, tiles: Tiles) -> Range:
    """Returns the largest magnitude that shares a scale, and its negative: half the work of `extent`; NaN likewise."""

    def of(part: jax.Array, axes: tuple[int, ...]) -> Range:
        amax = lax.max(lax.reduce_max(lax.abs(part), axes), np.float32(0)).reshape(kept_shape(part, axes))
        return Range(lax.neg(amax), amax)

    return tiles.reduce(x, of)


def find_range(x: jax.Array, tiles: Tiles, whole: Range, qz: Quantizer, n: QuantizerParams, error: Error) -> Range:
    """Returns the range that the quantizer's calibration finds, within `whole`, the extent of the data.

    Args:
      x: float32 array.
      tiles: what shares a scale.
      whole: of `extent`.
      qz: the quantizer; its calibration is one that finds a range.
      n: its numbers.
      error: mean squared error under a range.
    """
    match qz.calibration:
        case "percentile":
            found = tiles.reduce(x, lambda part, axes: _percentile(part, axes, qz))
        case "mse":
            found = least_error(whole, error)
        case "kl":
            threshold = tiles.reduce(x, lambda part, axes: kl_threshold(part, axes, qz.code_format))
            found = Range(-threshold, threshold)
        case "aciq" | "aciq_normal":
            found = tiles.reduce(x, lambda part, axes: _aciq(part, axes, qz, n))
        case _ if isinstance(n.clip, np.generic) and n.clip == 1:
            return whole
        case _:
            found = whole
    return Range(
        multiply(jnp.maximum(whole.low, found.low), n.clip), multiply(jnp.minimum(whole.high, found.high), n.clip)
    )


def mean_scale(x: jax.Array, tiles: Tiles, qz: Quantizer, n: QuantizerParams) -> jax.Array:
    """Returns the scale that is a multiple of the mean magnitude.

    Source: "absmean": Ma et al., "The Era of 1-bit LLMs", 2024, arXiv:2402.17764, equation 3, and Rastegari et al.,
      "XNOR-Net", 2016, arXiv:1603.05279, equation 6; "lsq": Esser et al., "Learned Step Size Quantization", 2020,
      arXiv:1902.08153, section 2.1.
    """
    mean = multiply(tiles.reduce(jnp.abs(x), ordered_mean), n.clip)
    if qz.calibration == "absmean":
        return mean
    return multiply(mean, jnp.float32(2) * jax.lax.rsqrt(jnp.float32(n.high)))


def _percentile(x: jax.Array, axes: tuple[int, ...], qz: Quantizer) -> Range:
    """Returns the range within which the quantizer's percentile of the magnitudes lies.

    With a zero point, half of what is cut off is cut off at each end.
    """
    share = (qz.percentile or 100) / 100
    if qz.scheme != "affine":
        threshold = _ranked(jnp.abs(x), axes, share)
        return Range(-threshold, threshold)
    share = (1 + share) / 2
    return Range(jnp.minimum(-_ranked(-x, axes, share), 0), jnp.maximum(_ranked(x, axes, share), 0))


def _ranked(x: jax.Array, axes: tuple[int, ...], share: float) -> jax.Array:
    """Returns the k-th smallest of n values, k = floor(share * n + 1/2), at least the first."""
    moved = jnp.moveaxis(x, axes, range(len(axes)))
    rows = moved.reshape(-1, *moved.shape[len(axes) :])
    kept = kept_shape(x, axes)
    if not len(rows):
        return jnp.zeros(kept, x.dtype)
    k = min(max(int(share * len(rows) + 0.5), 1), len(rows))
    return jnp.sort(rows, axis=0)[k - 1].reshape(kept)


def _aciq(x: jax.Array, axes: tuple[int, ...], qz: Quantizer, n: QuantizerParams) -> Range:
    """Returns the range around the mean, or around zero without a zero point, that ACIQ clips at."""
    mean = ordered_mean(x, axes) if qz.scheme == "affine" else jnp.float32(0)
    if qz.calibration == "aciq":
        spread = ordered_mean(jnp.abs(x - mean), axes)
    else:
        spread = jnp.sqrt(ordered_mean(multiply(x - mean, x - mean), axes))
    reach = multiply(spread, n.ratio)
    low, high = (jnp.broadcast_to(end, reach.shape) for end in (mean - reach, mean + reach))
    return Range(jnp.minimum(low, 0), jnp.maximum(high, 0))


def least_error(whole: Range, error: Error) -> Range:
    """Returns the part of a range, scaled about zero, with the least error; the whole one where none is better."""
    best = (error(whole), jnp.ones_like(whole.low))
    for factors in _LEVELS:
        least, ratio = best

        def better(best: tuple[Any, Any], factor: Any, about: Any = ratio) -> tuple[tuple[Any, Any], None]:
            least, ratio = best
            candidate = jnp.minimum(multiply(about, factor), 1)
            found = error(Range(multiply(whole.low, candidate), multiply(whole.high, candidate)))
            wins = found < least
            return (jnp.where(wins, found, least), jnp.where(wins, candidate, ratio)), None

        best, _ = jax.lax.scan(better, (least, ratio), jnp.asarray(factors, jnp.float32))
    return Range(multiply(whole.low, best[1]), multiply(whole.high, best[1]))

"""The range that each calibration reads off a histogram; the same rules as for arrays, with bins for values."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from precision_lab.quant.arithmetic import divide
from precision_lab.quant.calibration import least_error
from precision_lab.quant.core import nearest
from precision_lab.quant.histograms import BINS, Histogram
from precision_lab.quant.kl import least_divergence, levels_of
from precision_lab.quant.numbers import QuantizerParams
from precision_lab.quant.quantizer import Quantizer
from precision_lab.quant.scales import Range
from precision_lab.quant.tiles import Tiles


def read(histogram: Histogram, whole: Range, qz: Quantizer, n: QuantizerParams) -> Range:
    """Returns the range that the quantizer's calibration finds, within `whole`, the extent of the data."""
    shape = whole.low.shape
    rows = Range(whole.low.reshape(-1), whole.high.reshape(-1))
    match qz.calibration:
        case "mse":
            found = _least_error(histogram, rows, qz, n)
        case "percentile":
            found = _percentile(histogram, qz)
        case "kl":
            found = _kl(histogram, rows, qz)
        case "aciq" | "aciq_normal":
            found = _aciq(histogram, qz, n)
        case _:
            return _means(histogram, qz, n, shape)
    return Range(
        jnp.maximum(rows.low, found.low).reshape(shape),
        jnp.minimum(rows.high, found.high).reshape(shape),
    )


def _weighted_mean(histogram: Histogram, values: jax.Array) -> jax.Array:
    """Returns the mean of a function of the bins' values over all that was counted; zero of nothing."""
    counts = histogram.counts.astype(jnp.float32)
    return divide(jnp.sum(counts * values, 1), jnp.sum(counts, 1))


def _means(histogram: Histogram, qz: Quantizer, n: QuantizerParams, shape: tuple[int, ...]) -> Range:
    """Returns the range whose scale is the multiple of the mean magnitude that the calibration says."""
    mean = _weighted_mean(histogram, jnp.abs(histogram.centres())).reshape(shape)
    factor = n.high if qz.calibration == "absmean" else 2 * np.sqrt(n.high)
    return Range(-mean * factor, mean * factor)


def _percentile(histogram: Histogram, qz: Quantizer) -> Range:
    """Returns the outer edges of the bins that hold the percentile."""
    share = (qz.percentile or 100) / 100
    if qz.scheme != "affine":
        threshold = _edge(histogram.magnitudes(), share) * histogram.width
        return Range(-threshold, threshold)
    share = (1 + share) / 2
    low = _edge(histogram.counts[:, ::-1], share) - BINS
    high = _edge(histogram.counts, share) - BINS
    return Range(jnp.minimum(-low * histogram.width, 0), jnp.maximum(high * histogram.width, 0))


def _edge(counts: jax.Array, share: float) -> jax.Array:
    """Returns how many bins, from the first, hold the share of all that was counted."""
    so_far = jnp.cumsum(counts, axis=1)
    k = jnp.maximum(jnp.floor(so_far[:, -1:].astype(jnp.float32) * np.float32(share) + np.float32(0.5)), 1)
    return jnp.minimum(jnp.sum(so_far < k, axis=1) + 1, counts.shape[1]).astype(jnp.float32)


def _kl(histogram: Histogram, rows: Range, qz: Quantizer) -> Range:
    """Returns the threshold of least divergence among the bins up to the largest magnitude."""
    used = jnp.clip(jnp.ceil(rows.amax / histogram.width), 1, BINS).astype(jnp.int32)
    levels = levels_of(qz.code_format)
    kept = jax.lax.map(lambda row: least_divergence(row[0], row[1], levels), (histogram.magnitudes(), used))
    return Range(-kept * histogram.width, kept * histogram.width)


def _aciq(histogram: Histogram, qz: Quantizer, n: QuantizerParams) -> Range:
    """Returns the range around the mean, or around zero without a zero point, that ACIQ clips at."""
    values = histogram.centres()
    mean = _weighted_mean(histogram, values) if qz.scheme == "affine" else jnp.zeros(len(values))
    apart = values - mean[:, None]
    if qz.calibration == "aciq":
        spread = _weighted_mean(histogram, jnp.abs(apart))
    else:
        spread = jnp.sqrt(_weighted_mean(histogram, apart * apart))
    return Range(jnp.minimum(mean - n.ratio * spread, 0), jnp.maximum(mean + n.ratio * spread, 0))


def _least_error(histogram: Histogram, rows: Range, qz: Quantizer, n: QuantizerParams) -> Range:
    """Returns the range under which the bins' values, as often as they were counted, err least."""
    values = histogram.centres()
    tiles = Tiles(values.shape, (1, None))
    whole = Range(rows.low[:, None], rows.high[:, None])

    def error(found: Range) -> jax.Array:
        apart = nearest(values, tiles, found, qz, n) - values
        return _weighted_mean(histogram, apart * apart)[:, None]

    found = least_error(whole, error)
    return Range(found.low[:, 0], found.high[:, 0])

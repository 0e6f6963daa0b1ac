"""Histograms that grow: counts of bins around zero, whose width is a power of two and doubles when values outgrow it.

Two bins become one exactly, so that a histogram does not depend on the order or the batches in which values came, and
two of them merge into the one that all values together would have given.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from precision_lab.quant.tiles import Tiles

BINS = 2048
# Powers of two that float32 and its reciprocal hold, with room for the bins.
_LEAST, _MOST = -100, 126


class Histogram(NamedTuple):
    """Counts of values, one row for each scale.

    Attributes:
      counts: int32 (scales, 2 * BINS), from the most negative bin on; together less than 2**31 in a row.
      exponent: int32 (scales,); bins reach from -2**exponent to 2**exponent.
    """

    counts: Any
    exponent: Any

    @classmethod
    def empty(cls, tiles: Tiles) -> Histogram:
        """Returns a histogram of nothing, for arrays with these scales."""
        rows = int(np.prod(tiles.scale_shape, dtype=np.int64))
        return cls(jnp.zeros((rows, 2 * BINS), jnp.int32), jnp.full(rows, _LEAST, jnp.int32))

    @property
    def width(self) -> jax.Array:
        """Returns the width of a bin, float32 (scales,)."""
        return _power_of_two(self.exponent - (BINS.bit_length() - 1))

    def centres(self) -> jax.Array:
        """Returns the values that bins stand for, float32 of the shape of `counts`."""
        places = np.arange(-BINS, BINS, dtype=np.float32) + np.float32(0.5)
        return self.width[:, None] * places

    def magnitudes(self) -> jax.Array:
        """Returns the counts of magnitudes, int32 (scales, BINS)."""
        return self.counts[:, BINS:] + self.counts[:, BINS - 1 :: -1]


def add(histogram: Histogram, x: jax.Array, tiles: Tiles) -> Histogram:
    """Returns the histogram with the finite values of `x`, float32, counted too."""
    finite = jnp.isfinite(x)
    magnitudes = jnp.where(finite, jnp.abs(x), 0)
    amax = tiles.reduce(magnitudes, lambda part, axes: jnp.max(part, axes, keepdims=True, initial=0))
    grown = regrown(histogram, _exponent_above(amax.reshape(-1)))
    rows = jnp.arange(len(grown.exponent), dtype=jnp.int32).reshape(tiles.scale_shape)
    shift = grown.exponent.reshape(tiles.scale_shape)
    scaled = tiles.split(jnp.where(finite, x, 0)) * tiles.spread(_power_of_two(-shift))
    places = jnp.clip(jnp.floor(scaled * BINS), -BINS, BINS - 1).astype(jnp.int32) + BINS
    rows = jnp.broadcast_to(tiles.spread(rows), places.shape)
    return grown._replace(counts=grown.counts.at[rows, places].add(tiles.split(finite.astype(jnp.int32))))


def merge(a: Histogram, b: Histogram) -> Histogram:
    """Returns the histogram of the values of both."""
    a, b = regrown(a, b.exponent), regrown(b, a.exponent)
    return a._replace(counts=a.counts + b.counts)


def regrown(histogram: Histogram, exponent: jax.Array) -> Histogram:
    """Returns the histogram with bins that reach to 2**exponent, if they did not reach so far."""
    wanted = jnp.maximum(histogram.exponent, exponent)
    halvings = jnp.minimum(wanted - histogram.exponent, 31)[:, None]
    places = (np.arange(-BINS, BINS, dtype=np.int32) >> halvings) + BINS
    rows = jnp.broadcast_to(jnp.arange(len(wanted))[:, None], places.shape)
    counts = jnp.zeros_like(histogram.counts).at[rows, places].add(histogram.counts)
    return Histogram(counts, wanted)


def _exponent_above(amax: jax.Array) -> jax.Array:
    """Returns the smallest exponent of a power of two that is at least `amax`, as far as bins can have it."""
    words = jax.lax.bitcast_convert_type(amax, jnp.uint32)
    exponent = ((words + np.uint32((1 << 23) - 1)) >> np.uint32(23)).astype(jnp.int32) - 127
    return jnp.clip(exponent, _LEAST, _MOST)


def _power_of_two(exponent: jax.Array) -> jax.Array:
    """Returns 2**exponent as float32, exactly, for normal numbers."""
    return jax.lax.bitcast_convert_type(((exponent + 127) << 23).astype(jnp.uint32), jnp.float32)

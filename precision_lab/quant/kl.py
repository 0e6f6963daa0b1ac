"""The clip with the least Kullback-Leibler divergence between the histogram of magnitudes and its quantized self.

Source: Migacz, "8-bit Inference with TensorRT", GTC 2017, and NVIDIA TensorRT-Model-Optimizer, calib/histogram.py: the
  bin of zeros, which a ReLU fills, is replaced by its neighbour; the last of equally good thresholds is taken.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from precision_lab.formats import Format
from precision_lab.quant.arithmetic import divide, kept_shape

BINS = 2048
_FIRST = 128


def kl_threshold(x: jax.Array, axes: tuple[int, ...], fmt: Format) -> jax.Array:
    """Returns the threshold of magnitudes, float32; `axes`, which share one, are kept with length 1.

    Args:
      x: float32 array.
      axes: axes that share a threshold.
      fmt: integer format of the codes, which says how many levels magnitudes have.
    """
    kept = kept_shape(x, axes)
    moved = jnp.moveaxis(jnp.abs(x), axes, range(len(axes)))
    rows = moved.reshape(-1, int(np.prod(moved.shape[len(axes) :], dtype=np.int64))).T
    if not rows.size:
        return jnp.zeros(kept, jnp.float32)
    return jax.lax.map(lambda row: _of_row(row, levels_of(fmt)), rows).reshape(kept)


def levels_of(fmt: Format) -> int:
    """Returns how many levels the magnitudes of an integer format have."""
    return 1 << (fmt.bits - int(fmt.signed))


def _of_row(magnitudes: jax.Array, levels: int) -> jax.Array:
    """Returns the threshold of one row."""
    amax = jnp.max(magnitudes)
    place = jnp.clip(divide(magnitudes, divide(amax, BINS)), 0, BINS - 1)
    counts = jnp.zeros(BINS, jnp.int32).at[place.astype(jnp.int32)].add(1)
    return least_divergence(counts, jnp.int32(BINS), levels) * divide(amax, BINS)


def least_divergence(counts: jax.Array, used: Any, levels: int) -> jax.Array:
    """Returns how many bins, counted from zero, are kept: at least 128, at most `used`, as float32.

    Args:
      counts: int32, how many magnitudes are in each bin of equal width.
      used: number of bins up to the largest magnitude.
      levels: levels that the bins kept are merged to.
    """
    counts = counts.at[0].set(counts[1]).astype(jnp.float32)
    candidates = jnp.arange(min(_FIRST, len(counts)), len(counts) + 1)
    divergences = jax.lax.map(lambda kept: _divergence(counts, kept, levels), candidates)
    divergences = jnp.where((candidates <= used) | (candidates == candidates[0]), divergences, jnp.inf)
    best = len(candidates) - 1 - jnp.argmin(divergences[::-1])
    return jnp.where(jnp.sum(counts) > 0, candidates[best], used).astype(jnp.float32)


def _divergence(counts: jax.Array, kept: Any, levels: int) -> jax.Array:
    """Returns D(P || Q): P is the histogram with its tail in the last bin kept, Q the kept bins merged and spread."""
    bins = jnp.arange(len(counts))
    inside = bins < kept
    p = jnp.where(inside, counts, 0)
    tail = jnp.sum(jnp.where(inside, 0, counts))
    q = _merged(p, bins, kept, levels)
    p = p + jnp.where(bins == kept - 1, tail, 0)
    p, q = p / jnp.maximum(jnp.sum(p), 1), q / jnp.maximum(jnp.sum(q), 1)
    # Mass that Q cannot express counts as if it had a very small probability.
    return jnp.sum(jnp.where(p > 0, p * (jnp.log(jnp.maximum(p, 1e-30)) - jnp.log(jnp.maximum(q, 1e-30))), 0))


def _merged(p: jax.Array, bins: jax.Array, kept: Any, levels: int) -> jax.Array:
    """Returns the bins merged to levels of equal width, each level's mass spread over its bins that are not empty."""
    edges = -(-(jnp.arange(levels + 1) * kept) // levels)
    mass, filled = (
        jnp.concatenate([jnp.zeros(1), jnp.cumsum(each)])[edges] for each in (p, (p > 0).astype(jnp.float32))
    )
    mean = jnp.diff(mass) / jnp.maximum(jnp.diff(filled), 1)
    level = jnp.clip(jnp.searchsorted(edges, bins, side="right") - 1, 0, levels - 1)
    return jnp.where(p > 0, mean[level], 0)

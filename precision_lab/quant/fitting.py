"""Fitting: the levels, or the scales of two levels at once, that are nearest to given data.

Everywhere else the levels of a format are given and a scale is found; here the levels are what is found.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from precision_lab import formats
from precision_lab.formats import Codebook, codebook
from precision_lab.quant.arithmetic import kept_shape
from precision_lab.quant.calibration import magnitude
from precision_lab.quant.granularity import granularity
from precision_lab.quant.qtensor import QTensor, quantize
from precision_lab.quant.quantizer import Quantizer
from precision_lab.quant.tiles import Tiles

Axis = int | tuple[int, ...] | None
_MOST_ROUNDS = 10_000


def fit_codebook(
    x: Any,
    levels: Any = "nf4",
    *,
    shared: Any = "group64",
    axis: Axis = None,
    fixed: Iterable[float] = (-1.0, 0.0, 1.0),
    error: str = "squared",
    name: str = "fitted",
) -> Codebook:
    """Returns a codebook whose levels err the least on `x` under absmax scales, no single level could be better.

    Levels and cells take turns: each level becomes the mean of the values nearest to it, or their median for absolute
    errors, weighted with what an error costs in the units of `x`: the square of the scale, or the scale.

    Args:
      x: float16, bfloat16 or float32 array of typical values, of any shape.
      levels: what to start from: a codebook, its name, or the levels themselves, within [-1, 1].
      shared: what shares a scale, a granularity or its name.
      axis: the contracted axis or axes, as for `quantize`.
      fixed: levels that stay as they are; the ends keep the largest magnitude exact.
      error: "squared" or "absolute".
      name: name of the codebook.

    Raises:
      ValueError: another error, a format without levels, levels outside of [-1, 1], fixed ones that `levels` has not,
        or values in `x` that are not finite.
      TypeError: `x` is traced.

    Source: Lloyd, "Least squares quantization in PCM", 1982, his method I, here with weights; absolute errors in
      blocks: Yoshida, "NF4 Isn't Information Theoretically Optimal (and that's Good)", 2023, arXiv:2306.06965.
    """
    if error not in ("squared", "absolute"):
        raise ValueError(f"error={error!r} must be 'squared' or 'absolute'.")
    if isinstance(x, jax.core.Tracer):
        raise TypeError("a codebook is fitted to data, not under a trace; call fit_codebook outside of jit.")
    start = _levels_of(levels)
    free = ~np.isin(start, np.array(list(fixed), np.float64))
    if np.count_nonzero(~free) != len(set(fixed)) or np.abs(start).max() > 1:
        raise ValueError(f"levels must be within [-1, 1] and have those of fixed={tuple(fixed)}, got {start.tolist()}.")
    units, weights = _in_units(x, shared, axis)
    return codebook(_settled(start, free, units, weights ** (2 if error == "squared" else 1), error), name=name)


def _levels_of(levels: Any) -> np.ndarray:
    """Returns levels by rising value, float64."""
    if isinstance(levels, (str, Codebook)):
        book = formats.format(levels)
        if not isinstance(book, Codebook):
            raise ValueError(f"{book.name} has no levels to start from; give a codebook such as 'nf4', or numbers.")
        levels = book.levels
    return np.sort(np.array(list(levels), np.float64))


def _in_units(x: Any, shared: Any, axis: Axis) -> tuple[np.ndarray, np.ndarray]:
    """Returns the values of `x` over their scale by rising value, and the scales; zero for a group of zeros."""
    array = jnp.asarray(x)
    tiles = Tiles.of(array.shape, granularity(shared), axis)
    amax = tiles.spread(magnitude(array.astype(jnp.float32), tiles).high)
    each = tiles.join(jnp.broadcast_to(amax, tiles.split(array).shape))
    scales, values = (np.asarray(part, np.float64).ravel() for part in (each, array))
    if not np.isfinite(values).all():
        raise ValueError("x has NaNs or infinities, to which no level can be fitted; leave them out.")
    units = values / np.where(scales > 0, scales, 1)
    order = np.argsort(units)
    return units[order], scales[order]


def _settled(levels: np.ndarray, free: np.ndarray, units: np.ndarray, weights: np.ndarray, error: str) -> np.ndarray:
    """Returns levels that the next round would not move."""
    mass, moment = (np.concatenate([[0.0], np.cumsum(each)]) for each in (weights, weights * units))
    for _ in range(_MOST_ROUNDS):
        cuts = np.searchsorted(units, (levels[1:] + levels[:-1]) / 2)
        ends = np.concatenate([[0], cuts, [len(units)]])
        held = np.diff(mass[ends])
        if error == "squared":
            centres = np.diff(moment[ends]) / np.where(held > 0, held, 1)
        else:
            middle = np.searchsorted(mass, mass[ends[:-1]] + held / 2, side="left") - 1
            centres = units[np.clip(middle, 0, len(units) - 1)]
        moved = np.where(free & (held > 0), centres, levels)
        if np.array_equal(moved, levels):
            break
        levels = moved
    return levels


def binary_terms(
    x: Any, terms: int = 2, *, shared: Any = "tensor", axis: Axis = None, best: bool = False
) -> list[QTensor]:
    """Returns binary arrays whose sum is near to `x`: a_1 sign(x) + a_2 sign(x - a_1 sign(x)) + ...

    Args:
      x: float16, bfloat16 or float32 array of any shape.
      terms: how many; their sum has 2**terms levels.
      shared: what shares the scales, a granularity or its name.
      axis: the contracted axis or axes, as for `quantize`.
      best: whether the scales of two terms are the best there are, by least squares; otherwise each is the best for
        what the terms before it have left, its mean magnitude.

    Returns:
      One QTensor for each term: a bit for each element, and the scales.

    Raises:
      ValueError: no terms, or `best` for other than two.

    Source: greedy: Guo et al., "Network Sketching", 2017, arXiv:1706.02021, algorithm 1; best for two: Pouransari et
      al., "Least Squares Binary Quantization of Neural Networks", 2020, arXiv:2001.02786, two bits. The optimum is
      found by all cuts of the sorted magnitudes, since it is their best division in two.
    """
    if terms < 1 or (best and terms != 2):
        raise ValueError(f"terms={terms}: at least one, and with best=True two, whose optimum is known.")
    shared, x = granularity(shared), jnp.asarray(x)
    spec = Quantizer("binary", shared)
    tiles = Tiles.of(x.shape, shared, axis)
    scales = tiles.reduce(x.astype(jnp.float32), _two_scales) if best else (None,) * terms
    found, left = [], x.astype(jnp.float32)
    for scale in scales:
        found.append(quantize(left, spec, axis=axis, **({} if scale is None else {"scale": scale})))
        left = left - found[-1].dequantize()
    return found


def _two_scales(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Returns the scales of two binary terms with the least squared error, along axes that are kept with length 1."""
    kept = kept_shape(x, axes)
    moved = jnp.moveaxis(jnp.abs(x), axes, range(len(axes)))
    rows = jnp.sort(moved.reshape(-1, *moved.shape[len(axes) :]), axis=0)
    middle = jnp.mean(rows, 0)
    rows = rows - middle  # or the gain would be a small difference of large numbers
    small = jnp.cumsum(rows, 0)
    large = jnp.flip(jnp.cumsum(jnp.flip(rows, 0), 0), 0)
    count = jnp.arange(1, len(rows) + 1, dtype=jnp.float32).reshape(-1, *[1] * (rows.ndim - 1))
    above = jnp.concatenate([large[1:], jnp.zeros_like(large[:1])])
    means = small / count, above / jnp.maximum(len(rows) - count, 1)
    gain = means[0] * small + means[1] * above  # what two means take away from the sum of squares
    at = jnp.argmax(gain, 0, keepdims=True)
    low, high = (jnp.take_along_axis(each, at, 0)[0] + middle for each in means)
    high = jnp.where(at[0] == len(rows) - 1, low, high)
    return ((high + low) / 2).reshape(kept), ((high - low) / 2).reshape(kept)

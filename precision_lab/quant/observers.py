"""Observers: the range of values over many arrays, as a state that is updated, merged and read by pure functions.

Ranges and histograms do not depend on how data is cut into batches; only running averages do, as they are meant to.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from precision_lab.quant import histograms
from precision_lab.quant.arithmetic import widen
from precision_lab.quant.calibration import extent
from precision_lab.quant.histograms import Histogram
from precision_lab.quant.numbers import static_params
from precision_lab.quant.options import OWN_THRESHOLDS
from precision_lab.quant.parsing import quantizer
from precision_lab.quant.quantizer import Quantizer
from precision_lab.quant.readings import read
from precision_lab.quant.scales import Range, rounded_scale, scale_of, usable, zero_point_of
from precision_lab.quant.tiles import Tiles

_OF_RANGES = ("absmax", "ema")


class ObserverState(NamedTuple):
    """What an observer knows; a pytree.

    Attributes:
      low: smallest value so far, at most zero, float32 of the shape of scales; its running average for "ema".
      high: largest value, at least zero, likewise.
      updates: int32, how many arrays were seen.
      nonfinite: int32, how many NaNs and infinities were seen and left out.
      histogram: counts of values; None where ranges are enough.
    """

    low: Any
    high: Any
    updates: Any
    nonfinite: Any
    histogram: Histogram | None


@dataclass(frozen=True)
class Observer:
    """Observes arrays for one quantizer: hashable, and without state of its own; see `observer`."""

    quantizer: Quantizer
    axis: tuple[int, ...] | int | None = None
    momentum: float = 0.1

    def init(self, shape: tuple[int, ...]) -> ObserverState:
        """Returns the state before anything was seen, for arrays with as many scales as one of this shape."""
        tiles = self._tiles(shape)
        zeros, none = jnp.zeros(tiles.scale_shape, jnp.float32), jnp.zeros((), jnp.int32)
        histogram = None if self.quantizer.calibration in _OF_RANGES else Histogram.empty(tiles)
        return ObserverState(zeros, zeros, none, none, histogram)

    @partial(jax.jit, static_argnums=0)
    def update(self, state: ObserverState, x: jax.Array) -> ObserverState:
        """Returns the state after `x`, of any shape that has as many scales as those before.

        Raises:
          ValueError: `x` has another number of scales.
        """
        tiles = self._tiles(x.shape)
        if tiles.scale_shape != state.low.shape:
            raise ValueError(
                f"an array {x.shape} has scales {tiles.scale_shape} under {self.quantizer!r}, axis={self.axis}, but "
                f"{state.low.shape} were observed so far."
            )
        x = widen(x)
        finite = jnp.isfinite(x)
        seen = extent(jnp.where(finite, x, 0), tiles)
        low, high = self._moved(state, seen, finite, tiles)
        histogram = None if state.histogram is None else histograms.add(state.histogram, x, tiles)
        nonfinite = state.nonfinite + jnp.sum(~finite, dtype=jnp.int32)
        return ObserverState(low, high, state.updates + 1, nonfinite, histogram)

    def _moved(self, state: ObserverState, seen: Range, finite: Any, tiles: Tiles) -> tuple[jax.Array, jax.Array]:
        """Returns ends of the range after one more."""
        if self.quantizer.calibration != "ema":
            return jnp.minimum(state.low, seen.low), jnp.maximum(state.high, seen.high)
        return self._averaged(state, seen, tiles.reduce(finite, lambda part, axes: jnp.any(part, axes, keepdims=True)))

    def _averaged(self, state: ObserverState, seen: Range, some: Any) -> tuple[jax.Array, jax.Array]:
        """Returns ends of the running average after one more; `some` says where there were finite values."""
        # The first values but zeros set the average, which would else start at zero; a group without any leaves it.
        empty = (state.low == 0) & (state.high == 0)
        momentum = jnp.where(empty, np.float32(1), jnp.where(some, np.float32(self.momentum), np.float32(0)))
        return (
            state.low + momentum * (seen.low - state.low),
            state.high + momentum * (seen.high - state.high),
        )

    @partial(jax.jit, static_argnums=0)
    def merge(self, a: ObserverState, b: ObserverState) -> ObserverState:
        """Returns the state of both; running averages are weighted with the arrays that each has seen."""
        if self.quantizer.calibration == "ema":
            share = b.updates / jnp.maximum(a.updates + b.updates, 1)
            low, high = a.low + share * (b.low - a.low), a.high + share * (b.high - a.high)
        else:
            low, high = jnp.minimum(a.low, b.low), jnp.maximum(a.high, b.high)
        histogram = None
        if a.histogram is not None and b.histogram is not None:
            histogram = histograms.merge(a.histogram, b.histogram)
        return ObserverState(low, high, a.updates + b.updates, a.nonfinite + b.nonfinite, histogram)

    @partial(jax.jit, static_argnums=0)
    def followed(self, state: ObserverState, batch: ObserverState) -> ObserverState:
        """Returns the state after a batch that another state has seen alone; a running average moves once."""
        merged = self.merge(state, batch)
        if self.quantizer.calibration != "ema":
            return merged
        some = (batch.low != 0) | (batch.high != 0) | (batch.nonfinite == 0)
        low, high = self._averaged(state, Range(batch.low, batch.high), some)
        return merged._replace(low=low, high=high)

    @partial(jax.jit, static_argnums=0)
    def range(self, state: ObserverState) -> Range:
        """Returns (low, high), float32 of the shape of scales, as the calibration finds it; zeros at first."""
        n, whole = static_params(self.quantizer), Range(state.low, state.high)
        found = whole if state.histogram is None else read(state.histogram, whole, self.quantizer, n)
        return Range(found.low * n.clip, found.high * n.clip)

    @partial(jax.jit, static_argnums=0)
    def scale(self, state: ObserverState) -> tuple[jax.Array, jax.Array | None]:
        """Returns (scale, zero point) for `fake_quantize` and `quantize`; the zero point is None but under "affine"."""
        found, n = self.range(state), static_params(self.quantizer)
        scale = usable(rounded_scale(scale_of(found, self.quantizer, n), self.quantizer), self.quantizer)
        return scale, zero_point_of(found, scale, n) if self.quantizer.has_zero_point else None

    def _tiles(self, shape: tuple[int, ...]) -> Tiles:
        """Returns what shares a scale."""
        return Tiles.of(shape, self.quantizer.granularity, self.axis)


def observer(qz: Any, *, axis: int | tuple[int, ...] | None = None, momentum: float = 0.1) -> Observer:
    """Returns an observer that finds the static scale of a quantizer by its calibration.

    `state = obs.update(state, x)` for every array, then `obs.range(state)` or `fake_quantize(x, qz, scale=...)` with
    what `obs.scale(state)` says. Everything but "absmax" and "ema" keeps a histogram of 2048 bins for each sign and
    scale; its ranges are exact to one bin, a power of two over 2048.

    Args:
      qz: a scaled quantizer, or anything that `quantizer` takes.
      axis: the contracted axis or axes, as for `fake_quantize`.
      momentum: for "ema", how far the average moves towards each array, in (0, 1].

    Raises:
      ValueError: a quantizer without scales of ours, or scales quantized together, which cannot be static, or
        thresholds that are not the scale's.
    """
    qz = quantizer(qz)
    if not qz.is_scaled or qz.estimator == "dorefa" or qz.scale_format == "double":
        raise ValueError(f"{qz!r} has no static scale to observe; say 'symmetric' or another scheme, without 'double'.")
    if qz.calibration in OWN_THRESHOLDS:
        raise ValueError(f"{qz!r} finds its thresholds in each array, and has no static scale; say 'mse' or 'absmean'.")
    if not 0 < momentum <= 1:
        raise ValueError(f"momentum must be in (0, 1], got {momentum}.")
    return Observer(qz, axis, momentum)

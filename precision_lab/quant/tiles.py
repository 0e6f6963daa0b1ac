"""Tiles: an array split so that the elements which share a scale lie along axes of their own.

Scales keep the rank of their array, with the number of runs along each axis. A run that does not divide its axis
leaves a smaller one at the end; statistics are taken of it as it is, and only arithmetic on elements sees padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from precision_lab.quant.granularity import Granularity


@dataclass(frozen=True)
class Tiles:
    """How an array of `shape` splits into runs; `lengths` has None where a whole axis shares a scale."""

    shape: tuple[int, ...]
    lengths: tuple[int | None, ...]

    @classmethod
    def of(cls, shape: tuple[int, ...], shared: Granularity, axis: int | tuple[int, ...] | None) -> Tiles:
        """Returns the tiles of an array quantized with this granularity; errors as for `Granularity.runs`."""
        runs = shared.runs(shape, axis)
        # A run as long as its axis or longer is the whole axis.
        lengths = (
            None if run is None or (run >= size and run > 1) else run for run, size in zip(runs, shape, strict=True)
        )
        return cls(shape, tuple(lengths))

    @property
    def scale_shape(self) -> tuple[int, ...]:
        """Returns the shape of the scales."""
        return tuple(1 if n is None else -(-size // n) for size, n in zip(self.shape, self.lengths, strict=True))

    @property
    def per_scale(self) -> int:
        """Returns the elements that share a scale, in a full run."""
        return math.prod(size if n is None else n for size, n in zip(self.shape, self.lengths, strict=True))

    def _axes(self) -> list[int | None]:
        """Returns the run length of every axis that is split, None for the others."""
        return [n if n is not None and n > 1 else None for n in self.lengths]

    @property
    def within(self) -> tuple[int, ...]:
        """Returns the axes, of the split array, along which elements share a scale."""
        places, place = [], 0
        for n in self.lengths:
            split = n is not None and n > 1
            place += split
            if split or n is None:
                places.append(place)
            place += 1
        return tuple(places)

    def split(self, x: jax.Array) -> jax.Array:
        """Returns `x`, filled up with zeros, with every axis of runs as two: their number, and the place in one."""
        runs = self._axes()
        if not any(runs):
            return x
        padding = [(0, -size % (n or 1)) for size, n in zip(self.shape, runs, strict=True)]
        padded = jnp.pad(x, padding) if any(after for _, after in padding) else x
        shape: list[int] = []
        for size, n in zip(padded.shape, runs, strict=True):
            shape += [size] if n is None else [size // n, n]
        return padded.reshape(shape)

    def join(self, tiles: jax.Array) -> jax.Array:
        """Returns the inverse of `split`."""
        runs = self._axes()
        if not any(runs):
            return tiles
        padded = tiles.reshape([size + -size % (n or 1) for size, n in zip(self.shape, runs, strict=True)])
        return padded if padded.shape == self.shape else padded[tuple(slice(size) for size in self.shape)]

    def spread(self, scales: jax.Array) -> jax.Array:
        """Returns scales, of `scale_shape`, with the rank of the split array."""
        places = [i for i, n in enumerate(self._axes()) if n is not None]
        return jnp.expand_dims(scales, tuple(place + 1 + before for before, place in enumerate(places)))

    def reduce(self, x: jax.Array, statistic: Callable[[jax.Array, tuple[int, ...]], Any]) -> Any:
        """Returns a pytree of what `statistic` says of the elements that share a scale, each of `scale_shape`.

        Args:
          x: the array.
          statistic: function of an array and the axes to reduce, which are kept with length 1.
        """
        for axis, (size, n) in enumerate(zip(self.shape, self.lengths, strict=True)):
            if n is not None and size % n:
                cuts = (slice(0, size - size % n), slice(size - size % n, size))
                parts = [self._part(axis, cut).reduce(x[(slice(None),) * axis + (cut,)], statistic) for cut in cuts]
                return jax.tree.map(lambda *found: jnp.concatenate(found, axis), *parts)  # noqa: B023
        found = statistic(self.split(x), self.within)
        return jax.tree.map(lambda each: each.reshape(self.scale_shape), found)

    def _part(self, axis: int, cut: slice) -> Tiles:
        """Returns the tiles of a slice that begins at a run's beginning and is whole runs, or less than one."""
        size = cut.stop - cut.start
        n = self.lengths[axis]
        lengths = list(self.lengths)
        lengths[axis] = None if n is not None and size < n else n
        return Tiles((*self.shape[:axis], size, *self.shape[axis + 1 :]), tuple(lengths))

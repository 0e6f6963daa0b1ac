"""Tiles: an array split into the blocks that share a scale, filled up with zeros, and joined again."""

from __future__ import annotations

import jax
import jax.numpy as jnp


class Tiles:
    """How an array splits into blocks: every blocked axis becomes two, the number of blocks and the place in one."""

    def __init__(self, shape: tuple[int, ...], axes: tuple[int, ...], block: tuple[int, ...]):
        self.shape = shape
        lengths = dict(zip(axes, block, strict=True))
        self.padding = [(0, -size % lengths.get(axis, 1)) for axis, size in enumerate(shape)]
        self.split_shape: list[int] = []
        places = []
        for axis, size in enumerate(shape):
            length = lengths.get(axis)
            self.split_shape += [size] if length is None else [-(-size // length), length]
            places += [] if length is None else [len(self.split_shape) - 1]
        self.within = tuple(places)

    def split(self, x: jax.Array) -> jax.Array:
        """Returns `x`, filled up with zeros, with each blocked axis split in two."""
        padded = jnp.pad(x, self.padding) if any(after for _, after in self.padding) else x
        return padded.reshape(self.split_shape)

    def join(self, x: jax.Array) -> jax.Array:
        """Returns the inverse of `split`."""
        padded = x.reshape([size + after for size, (_, after) in zip(self.shape, self.padding, strict=True)])
        return padded[tuple(slice(size) for size in self.shape)]

"""Counting what a stored array holds, on the host, whatever its size and dtype.

Arrays go through one compiled program in pieces of a few sizes, so that a checkpoint of a hundred shapes compiles two
programs and not a hundred. Narrow dtypes are widened to float32, which holds every value of theirs; float64 stays.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from precision_lab import formats
from precision_lab.formats import Format
from precision_lab.telemetry.reading import Reading, window
from precision_lab.telemetry.statistics import ZERO, TensorStats, tensor_stats

_PIECES = (1 << 12, 1 << 16, 1 << 20)


@dataclass(frozen=True)
class Fit:
    """How many values of an array a format would not hold, were they rounded to nearest in it.

    Attributes:
      format: its name.
      overflow: finite values beyond its largest, infinite or saturated as the format has it.
      subnormal: non-zero values below its smallest normal number that are not flushed: they keep fewer bits.
      flushed: non-zero values that become zero.
      changed: values that do not stay what they are, those above included; NaNs aside.
    """

    format: str
    overflow: int
    subnormal: int
    flushed: int
    changed: int


def is_floating(dtype: Any) -> bool:
    """Returns whether a dtype, NumPy's own or of ml_dtypes, is of real floating numbers."""
    return jnp.issubdtype(dtype, jnp.floating)


def census(x: np.ndarray, fmts: Sequence[Format]) -> tuple[Reading, tuple[Fit, ...]]:
    """Returns the numbers of an array in its own format, and what other formats would make of it.

    Args:
      x: floating array of any shape. The reading's magnitudes of float64 are clipped to float32's range.
      fmts: formats with a zero and a sign.
    """
    wide = widened(x).ravel()
    own = formats.format(x.dtype)
    with _x64(wide.dtype):
        counted = [_counted(piece, tuple(fmts)) for piece in _pieces(wide)]
        stats = TensorStats(*(np.stack(leaves) for leaves in zip(*(stats for stats, _ in counted), strict=True)))
    spare = int(np.sum(stats.counts[..., 0], dtype=np.int64)) - wide.size
    stats.counts[-1, ZERO, 0] -= np.uint32(spare)  # the zeros that fill the last piece
    reading = Reading(stats, own)
    sums = np.stack([np.reshape(sums, (-1, 3)) for _, sums in counted]).astype(np.int64).sum(axis=0).tolist()
    return reading, tuple(_fit(reading, fmt, *row) for fmt, row in zip(fmts, sums, strict=True))


def rounded(x: np.ndarray, fmt: Format) -> np.ndarray:
    """Returns the values of a floating array on the grid of a format, nearest even; float32, or float64 for float64."""
    wide = widened(x).ravel()
    with _x64(wide.dtype):
        pieces = [np.asarray(_rounded(piece, fmt)) for piece in _pieces(wide)]
    return np.concatenate(pieces)[: wide.size].reshape(x.shape)


def widened(x: np.ndarray) -> np.ndarray:
    """Returns the same values in float32, or in float64 where they need it, in the machine's byte order."""
    return np.asarray(x, np.float64 if x.dtype.itemsize > 4 else np.float32)


def subnormals(reading: Reading, fmt: Format) -> int:
    """Returns how many non-zero values are below the smallest normal number of a format."""
    return sum(n for exponent, n in reading.binades.items() if exponent < window(fmt).normal)


def _fit(reading: Reading, fmt: Format, overflowed: int, flushed: int, changed: int) -> Fit:
    return Fit(fmt.name, overflowed, subnormals(reading, fmt) - flushed, flushed, changed)


def _pieces(flat: np.ndarray) -> Iterator[np.ndarray]:
    """Yields an array in pieces of one size, the last one filled up with zeros."""
    size = next((size for size in _PIECES if flat.size <= size), _PIECES[-1])
    for start in range(0, max(flat.size, 1), size):
        piece = flat[start : start + size]
        yield piece if piece.size == size else np.pad(piece, (0, size - piece.size))


def _counted(piece: np.ndarray, fmts: tuple[Format, ...]) -> tuple[TensorStats, np.ndarray]:
    """Returns the statistics of a piece, and three counts per format."""
    return jax.device_get(_program(piece, fmts))


@functools.partial(jax.jit, static_argnums=1)
def _program(x: jax.Array, fmts: tuple[Format, ...]) -> tuple[TensorStats, jax.Array]:
    found = [tensor_stats(x, fmt) for fmt in fmts]
    counts = [[s.overflowed[0], s.flushed[0], _changed(x, fmt)] for s, fmt in zip(found, fmts, strict=True)]
    return tensor_stats(x), jnp.asarray(counts, jnp.uint32)


_rounded = jax.jit(formats.round_to, static_argnums=1)


def _changed(x: jax.Array, fmt: Format) -> jax.Array:
    """Returns how many values rounding changes; by bits, since XLA on CPU may compare subnormals as zeros."""
    unsigned = jnp.uint64 if x.dtype == jnp.float64 else jnp.uint32
    before, after = (lax.bitcast_convert_type(each, unsigned) for each in (x, formats.round_to(x, fmt)))
    # Of both at once: LLVM takes `bits << 1 == 0` for `x == 0`, and then a subnormal for a zero.
    both_zero = (before | after) << 1 == 0
    return jnp.sum((before != after) & ~both_zero & ~jnp.isnan(x), dtype=jnp.uint32)


def _x64(dtype: Any) -> contextlib.AbstractContextManager[Any]:
    """Lets JAX have float64 arrays where there are some."""
    return jax.enable_x64(True) if dtype == np.float64 else contextlib.nullcontext()

"""Random bits for stochastic rounding: drawn from a key or given, checked, and made words of the container."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from precision_lab.formats.kernel import Draw
from precision_lab.formats.params import Layout, layout_of

# 2**32 over the golden ratio, odd: its multiples are as far apart as they can be.
GOLDEN = np.uint32(0x9E3779B1)


class How(NamedTuple):
    """How to round, as far as it is known at compile time.

    Attributes:
      rounding: name of the rounding; None if its index is an operand.
      random: whether random bits are given.
      n_bits: how many random bits to use; None means all of a word.
      centred: whether half of the last random bit is added.
      gradient: a name of `GRADIENTS`, or the format of the cotangent.
    """

    rounding: str | None
    random: bool
    n_bits: int | None
    centred: bool
    gradient: Any


def random_words(x: jax.Array, key: Any, bits: Any, how: How) -> jax.Array | None:
    """Returns unsigned random integers shaped like `x`, None if rounding uses none.

    Raises:
      TypeError: `bits` are no unsigned integers.
      ValueError: both a key and bits, bits of another shape, or options that contradict them.
    """
    if key is None and bits is None:
        if how.n_bits is not None or how.centred:
            raise ValueError("n_bits= and centred= say how to use random bits; give key= or bits=, or leave them out.")
        return None
    if key is not None and bits is not None:
        raise ValueError("give key= or bits=, not both.")
    words = _drawn(x, key, how.n_bits) if bits is None else jnp.asarray(bits)
    if not jnp.issubdtype(words.dtype, jnp.unsignedinteger):
        raise TypeError(f"bits must be unsigned integers, got {words.dtype} {words.shape}.")
    if words.shape != x.shape:
        raise ValueError(f"bits must have the shape of x, {x.shape}, got {words.shape}.")
    width = min(words.dtype.itemsize, np.dtype(layout_of(x.dtype).word).itemsize) * 8
    if how.n_bits is not None and not 1 <= how.n_bits <= width:
        raise ValueError(f"n_bits must be from 1 to {width}, the width of the random bits, got {how.n_bits}.")
    if how.centred and how.n_bits is None:
        raise ValueError("centred=True goes with n_bits=; with all random bits there is no bias to take away.")
    return words


def random_bits(key: Any, shape: tuple[int, ...], dtype: Any = np.uint32) -> jax.Array:
    """Returns uniform random unsigned integers for stochastic rounding, at about the price of a copy.

    `jax.random.bits` costs ten copies or more on a CPU, far more than the rounding its bits are for. Here the key gives
    two words, and every element hashes its index with them: one fused loop, the same bits on any sharding. Meant for
    rounding, not for sampling or secrets. Beyond 2**32 elements the bits repeat.

    Args:
      key: JAX key of any generator, typed or not.
      shape: shape of the result.
      dtype: uint8, uint16, uint32, or uint64 under jax_enable_x64.

    Raises:
      TypeError: `dtype` is another one, or uint64 without jax_enable_x64.

    Source: the finalizer of MurmurHash3 (Appleby, 2011) with the constants of Wellons, "Prospecting for hash
      functions", 2018, over the counter of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
    """
    dtype = np.dtype(dtype)
    if dtype.kind != "u" or jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise TypeError(f"random bits are uint8, uint16, uint32, or uint64 under jax_enable_x64; got dtype={dtype}.")
    if dtype == np.uint64:
        halves = (random_bits(half, shape).astype(np.uint64) for half in jax.random.split(key))
        return next(halves) << np.uint64(32) | next(halves)
    seed = jax.random.bits(key, (2,), np.uint32)
    return hashed(_index(shape) * GOLDEN + seed[0], seed[1]).astype(dtype)


def hashed(words: jax.Array, salt: Any = 0) -> jax.Array:
    """Returns uint32 words in which every bit depends on all bits of the word given and, half way, of the salt."""
    words = (words ^ words >> np.uint32(16)) * np.uint32(0x7FEB352D)
    words = (words ^ words >> np.uint32(15) ^ jnp.uint32(salt)) * np.uint32(0x846CA68B)
    return words ^ words >> np.uint32(16)


def _index(shape: tuple[int, ...]) -> jax.Array:
    """Returns the number of every element in C order, modulo 2**32."""
    index, stride = jnp.zeros(shape, np.uint32), 1
    for axis in reversed(range(len(shape))):
        index = index + jax.lax.broadcasted_iota(np.uint32, shape, axis) * np.uint32(stride % 2**32)
        stride *= shape[axis]
    return index


def _drawn(x: jax.Array, key: Any, n_bits: int | None) -> jax.Array:
    """Returns random bits in the narrowest dtype that holds `n_bits`; the fewer the faster."""
    word = layout_of(x.dtype).word
    if n_bits is not None:
        word = next((narrow for narrow, width in ((np.uint8, 8), (np.uint16, 16)) if n_bits <= width), word)
    return random_bits(key, x.shape, word)


def make_draw(layout: Layout, words: jax.Array | None, how: How) -> Draw | None:
    """Returns what the kernel needs of random words."""
    if words is None:
        return None
    width = min(words.dtype.itemsize, layout.word(0).itemsize) * 8
    return Draw(words.astype(layout.word), how.n_bits or width, how.centred)

"""Random bits for stochastic rounding: drawn from a key or given, checked, and made words of the container."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from precision_lab.formats.kernel import Draw
from precision_lab.formats.params import Layout, layout_of


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


def _drawn(x: jax.Array, key: Any, n_bits: int | None) -> jax.Array:
    """Returns random bits in the narrowest dtype that holds `n_bits`; the fewer the faster."""
    word = layout_of(x.dtype).word
    if n_bits is not None:
        word = next((narrow for narrow, width in ((np.uint8, 8), (np.uint16, 16)) if n_bits <= width), word)
    return jax.random.bits(key, x.shape, word)


def make_draw(layout: Layout, words: jax.Array | None, how: How) -> Draw | None:
    """Returns what the kernel needs of random words."""
    if words is None:
        return None
    width = min(words.dtype.itemsize, layout.word(0).itemsize) * 8
    return Draw(words.astype(layout.word), how.n_bits or width, how.centred)

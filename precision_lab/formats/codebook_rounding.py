"""Codebooks inside JAX: rounding to the nearest level, codes, and back; exact, traceable, gradient straight through."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from precision_lab.formats.codebooks import CODEBOOKS, Codebook, ordered_words
from precision_lab.formats.containers import to_bits
from precision_lab.formats.params import layout_of

# Up to so many levels, comparing with each is faster than a search.
_FEW_LEVELS = 32


def round_to_codebook(x: Any, book: str | Codebook) -> jax.Array:
    """Returns `x` with every element replaced by the nearest level, in the dtype of `x`.

    Comparisons are of integers, so that no subnormal is flushed: 1e-45 is positive for "binary" too. The gradient is
    straight through.

    Args:
      x: float16, bfloat16, float32 or (under x64) float64 array, already divided by its scale.
      book: a codebook or its name.

    Returns:
      An array like `x`; levels rounded to its dtype to nearest even where it does not have them. NaN stays NaN.

    Raises:
      TypeError: `x` is not floating.
      ValueError: an unknown name.
    """
    return _round(_floating(x), _book(book))


def encode_codebook(x: Any, book: str | Codebook) -> jax.Array:
    """Returns the codes of the levels nearest to `x`, as uint8; NaN gets the code of the smallest level.

    A program cannot refuse a value it does not know yet: where NaN is to be an error, use `Codebook.encode`.
    """
    x, book = _floating(x), _book(book)
    nan = jnp.isnan(x)
    return jnp.where(nan, book.order()[0], jnp.asarray(book.order())[_place(x, book)])


def decode_codebook(codes: Any, book: str | Codebook, dtype: Any = jnp.float32) -> jax.Array:
    """Returns the levels that `codes` stand for, rounded to `dtype`."""
    return jnp.asarray(_levels(np.array(_book(book).levels), dtype))[codes]


def _book(book: str | Codebook) -> Codebook:
    """Returns the codebook of this name."""
    if isinstance(book, Codebook):
        return book
    if book not in CODEBOOKS:
        raise ValueError(f"unknown codebook {book!r}. Known: {', '.join(CODEBOOKS)}; or give a Codebook.")
    return CODEBOOKS[book]


def _floating(x: Any) -> jax.Array:
    """Returns `x` as a JAX array; raises TypeError if it is not floating."""
    array = jnp.asarray(x)
    if array.dtype not in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64):
        raise TypeError(f"codebooks expect float16, bfloat16, float32 or float64, got {array.dtype} {array.shape}.")
    return array


def _levels(levels: np.ndarray, dtype: Any) -> np.ndarray:
    """Returns levels rounded to `dtype`."""
    return levels.astype(np.float32).astype(dtype) if np.dtype(dtype).itemsize < 4 else levels.astype(dtype)


def _place(x: jax.Array, book: Codebook) -> jax.Array:
    """Returns the place of each element's level among the sorted levels."""
    words = ordered_words(jnp, layout_of(x.dtype), to_bits(x))
    thresholds = book.thresholds(x.dtype)
    if len(thresholds) >= _FEW_LEVELS:
        return jnp.searchsorted(thresholds, words, side="left", method="scan_unrolled")
    place = jnp.zeros(x.shape, jnp.int32)
    for threshold in thresholds:
        place = place + (words > threshold)
    return place


@partial(jax.custom_jvp, nondiff_argnums=(1,))
@partial(jax.jit, static_argnums=(1,), inline=True)
def _round(x: jax.Array, book: Codebook) -> jax.Array:
    """Returns `x` rounded."""
    levels = _levels(book.grid(), x.dtype)
    if len(levels) > _FEW_LEVELS:
        return jnp.where(jnp.isnan(x), x, jnp.asarray(levels)[_place(x, book)])
    words = ordered_words(jnp, layout_of(x.dtype), to_bits(x))
    rounded = jnp.full(x.shape, levels[0])
    for threshold, level in zip(book.thresholds(x.dtype), levels[1:], strict=True):
        rounded = jnp.where(words > threshold, level, rounded)
    return jnp.where(jnp.isnan(x), x, rounded)


@_round.defjvp
def _round_jvp(book: Codebook, primals: Any, tangents: Any) -> Any:
    return _round(primals[0], book), tangents[0]

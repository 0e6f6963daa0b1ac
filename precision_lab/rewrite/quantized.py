"""Operands of products on a quantizer's grid: as values, or as codes and scales that the hardware multiplies itself."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from precision_lab.formats.randomness import GOLDEN, hashed
from precision_lab.quant import QTensor, Quantizer, QuantizerParams, fake_quantize
from precision_lab.quant.core import Given, quantize_parts
from precision_lab.quant.fake import fake_quantize_parts
from precision_lab.quant.numbers import static_params
from precision_lab.quant.tiles import Tiles

_LARGEST_INT8 = 127
SHARED = ("tensor", "channel", "token")  # granularities with one scale along what a product contracts
_WITH_OFFSET = ("lsq+", "dorefa")
NOTHING_GIVEN = Given()


class Codes(NamedTuple):
    """An operand as codes of a hardware type, and float32 scales of length 1 along the contracted axes."""

    values: jax.Array
    scale: jax.Array


def fake_quantized(
    x: jax.Array,
    quantizer: Quantizer,
    axes: tuple[int, ...],
    given: Given = NOTHING_GIVEN,
    params: QuantizerParams | None = None,
) -> jax.Array:
    """Returns an operand on the grid of its quantizer, in float32.

    Args:
      x: the operand.
      quantizer: its quantizer.
      axes: those that the product contracts.
      given: scale, zero point and offset that are not to be found in `x`.
      params: numbers in place of the quantizer's own.
    """
    x = x.astype(jnp.float32)
    return fake_quantize(x, quantizer, axis=axes, key=key_for(x, quantizer), params=params, **given._asdict())


def fake_quantized_and_codes(
    x: jax.Array,
    quantizer: Quantizer,
    axes: tuple[int, ...],
    given: Given = NOTHING_GIVEN,
    params: QuantizerParams | None = None,
) -> tuple[jax.Array, Codes]:
    """Returns what `fake_quantized` and `codes_of` do, quantizing once; of the two the first has gradients."""
    x = x.astype(jnp.float32)
    value, parts = fake_quantize_parts(x, quantizer, given, axis=axes, key=key_for(x, quantizer), params=params)
    assert parts is not None  # block formats have no codes to multiply
    return value, Codes(parts.values.astype(code_dtype(quantizer)), parts.scale)


def codes_of(
    x: jax.Array,
    quantizer: Quantizer,
    axes: tuple[int, ...],
    given: Given = NOTHING_GIVEN,
    params: QuantizerParams | None = None,
) -> Codes:
    """Returns the codes and scales whose products are those of `fake_quantized`; arguments as there."""
    x = x.astype(jnp.float32)
    key = key_for(x, quantizer)
    axes = tuple(axis % x.ndim for axis in axes)
    tiles = Tiles.of(x.shape, quantizer.granularity, axes)
    n = static_params(quantizer) if params is None else jax.tree.map(jnp.asarray, params)
    parts = quantize_parts(x, tiles, given, quantizer, n, key)
    return Codes(parts.values.astype(code_dtype(quantizer)), parts.scale)


def codes_in(stored: QTensor) -> Codes:
    """Returns the codes and scales of an array that is stored quantized."""
    dtype, scale = code_dtype(stored.quantizer), stored.scale
    assert scale is not None  # `have_codes` asks for one
    if dtype == np.int8:
        return Codes(stored.integers.astype(jnp.int8), scale)
    return Codes(jax.lax.bitcast_convert_type(stored.codes, dtype), scale)


def have_codes(left: Quantizer | None, right: Quantizer | None) -> bool:
    """Returns whether the hardware can multiply the codes of two operands."""
    return not why_no_codes(left, right)


def why_no_codes(left: Quantizer | None, right: Quantizer | None) -> str:
    """Returns why two operands cannot be multiplied as codes, or an empty string."""
    for quantizer in (left, right):
        if quantizer is None:
            return "only one operand is quantized"
        if quantizer.has_zero_point:
            return f"{quantizer} has a zero point, which a product of codes does not"
        if quantizer.estimator in _WITH_OFFSET:
            return f"{quantizer} has an offset, which a product of codes does not"
        if code_dtype(quantizer) is None:
            return f"{quantizer} has no array type of up to 8 bits whose products are its values' products"
        if quantizer.granularity.kind not in SHARED:
            return f"{quantizer} has several scales along the contracted axis"
    if left is not None and right is not None and (code_dtype(left) == np.int8) != (code_dtype(right) == np.int8):
        return f"{left} and {right} are an integer and a float"
    return ""


def code_dtype(quantizer: Quantizer) -> Any:
    """Returns the array type that codes are multiplied in, None if there is none."""
    fmt = quantizer.format
    if not quantizer.is_scaled or fmt.kind not in ("int", "float"):
        return None
    if fmt.kind == "int" and fmt.step == 1 and fmt.max <= _LARGEST_INT8:
        return np.dtype(np.int8)
    return fmt.dtype if fmt.kind == "float" and fmt.bits == 8 else None


def key_for(x: jax.Array, quantizer: Quantizer) -> jax.Array | None:
    """Returns a key made of a float32 array's own bits, for a quantizer that rounds at random; None for others.

    A policy has no place for a key that changes with every step, but arrays do change: the same array is rounded the
    same way each time, and another one independently of it.
    """
    return key_of(x) if quantizer.rounding == "stochastic" else None


def key_of(x: jax.Array) -> jax.Array:
    """Returns a key made of the bits of a float32 array."""
    return jax.random.key(sum_of_bits(x), impl="threefry2x32")


def sum_of_bits(x: jax.Array) -> jax.Array:
    """Returns a uint32 scalar that depends on every bit of a float32 array, and on where it stands."""
    words = jax.lax.bitcast_convert_type(x, jnp.uint32).reshape(-1)
    words = hashed(words ^ jnp.arange(words.size, dtype=jnp.uint32) * GOLDEN)
    return jnp.sum(words, dtype=jnp.uint32)

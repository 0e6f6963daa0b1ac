"""Simulated accumulation: products that sum up as an `Accumulator` says, on any device.

What is simulated is the rounding of the sums; operands are what the caller rounded them to. Nothing of the size of all
partial sums is kept: a loop over the runs carries the accumulator alone. A convolution is brought to a matrix product
of its patches, which are as large as the product's left operand.

Products of operands with up to 12 significant bits (float16, bfloat16, TF32, every float8) are exact in float32. With
wider ones the device may round a product before adding it or fuse the two, as it does in a native product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from precision_lab.formats import FormatParams, round_to
from precision_lab.policy.accumulator import Accumulator
from precision_lab.rewrite.quantized import key_of, sum_of_bits


def accumulated_matmul(
    lhs: jax.Array, rhs: jax.Array, accum: Accumulator, *, traced: FormatParams | None = None
) -> jax.Array:
    """Returns the product of (..., M, K) and (..., K, N), with the same leading axes, summed up as `accum` says.

    Args:
      lhs, rhs: floating arrays of at most 32 bits, with at least two axes.
      accum: the accumulator. Its runs start at the first element of K; the last run and the last promotion may be
        shorter. A run that sums to zero leaves the accumulator as it is, so that zeros after the last element change
        nothing, not even the sign of a zero (where it rounds at random, they change what is drawn).
      traced: numbers of the accumulator's format in place of `accum.format`; they may be traced.

    Returns:
      float32 of shape (..., M, N), on the grid of the accumulator's format; with `promote`, sums of such numbers.
      The order in which a run of several products is summed is the device's.

    Raises:
      TypeError: operands that are not floating or have 64 bits.
      ValueError: shapes that do not fit, or a float64 accumulator, which is native only.

    Source: see `Accumulator`.
    """
    _require_operands(lhs, rhs, accum)
    lhs, rhs = lhs.astype(jnp.float32), rhs.astype(jnp.float32)
    fmt = accum.format if traced is None else traced
    key = jax.random.fold_in(key_of(lhs), sum_of_bits(rhs)) if accum.rounding == "stochastic" else None
    # The empty product: zeros that vary over the axes of a mesh as the result will.
    zeros = _run(lhs[..., :0], rhs[..., :0, :])

    def add_run(total: jax.Array, first: Any, left: jax.Array, right: jax.Array) -> jax.Array:
        drawn = None if key is None else jax.random.fold_in(key, first)
        return round_to(_plus(total, _run(left, right)), fmt, rounding=accum.rounding, key=drawn)

    def add_accumulator(total: jax.Array, first: Any, left: jax.Array, right: jax.Array) -> jax.Array:
        return _plus(total, _fold(add_run, zeros, left, right, accum.step, first))

    if accum.promote is None:
        return _fold(add_run, zeros, lhs, rhs, accum.step)
    return _fold(add_accumulator, zeros, lhs, rhs, accum.promote)


def accumulated_convolution(
    lhs: jax.Array,
    rhs: jax.Array,
    params: Mapping[str, Any],
    accum: Accumulator,
    *,
    traced: FormatParams | None = None,
) -> jax.Array:
    """Returns a convolution summed up as `accum` says.

    The elements of a sum are ordered by position in the window, row by row, and at each position by input feature of
    the group, as in an implicit matrix product over NHWC arrays. The zeros of padding and dilation are elements too.

    Args:
      lhs, rhs: operands of a conv_general_dilated, floating arrays of at most 32 bits.
      params: its parameters, of which those that say what is computed are used, `precision` and
        `preferred_element_type` are not.
      accum: the accumulator.
      traced: as for `accumulated_matmul`.

    Returns:
      float32 of the convolution's shape; see `accumulated_matmul`.

    Raises:
      TypeError, ValueError: see `accumulated_matmul`.
    """
    lhs_spec, rhs_spec, out_spec = params["dimension_numbers"]
    batches, features = params["batch_group_count"], params["feature_group_count"]
    images, kernel = lhs.transpose(lhs_spec), rhs.transpose(rhs_spec)
    window, groups = kernel.shape[2:], batches * features  # one of the two is 1
    patches = _patches(images, window, params)
    out = patches.shape[2 : 2 + len(window)]
    n, c, o = images.shape[0] // batches, kernel.shape[1], kernel.shape[0] // groups
    positions, inner = math.prod(out), math.prod(window) * c

    left = patches.reshape((batches, n, features, c, positions, math.prod(window))).transpose((0, 2, 1, 4, 5, 3))
    right = kernel.reshape((groups, o, c, math.prod(window))).transpose((0, 3, 2, 1))
    left, right = left.reshape((groups, n * positions, inner)), right.reshape((groups, inner, o))
    product = accumulated_matmul(left, right, accum, traced=traced)

    product = product.reshape((groups, n, positions, o)).transpose((1, 0, 3, 2)).reshape((n, groups * o, *out))
    return product.transpose(np.argsort(out_spec))


def _run(left: jax.Array, right: jax.Array) -> jax.Array:
    """Returns the float32 product of one run; GPUs and TPUs would otherwise round its operands."""
    leading = tuple(range(left.ndim - 2))
    numbers = (((left.ndim - 1,), (right.ndim - 2,)), (leading, leading))
    return lax.dot_general(left, right, numbers, precision=lax.Precision.HIGHEST)


def _plus(total: jax.Array, x: jax.Array) -> jax.Array:
    """Returns `total + x`, and `total` itself for any zero.

    The sign of a zero depends on how XLA takes a product, and it makes 0 + x into x, which is not so for -0.
    """
    return jnp.where(x == 0, total, total + x)


def _fold(
    combine: Callable[[jax.Array, Any, jax.Array, jax.Array], jax.Array],
    start: jax.Array,
    lhs: jax.Array,
    rhs: jax.Array,
    size: int,
    offset: Any = 0,
) -> jax.Array:
    """Folds `combine` over pieces of `size` elements of the contracted axis; what is left over is the last piece.

    `combine` is told where a piece begins, counted from `offset`. Pieces are sliced where they are, because copying
    the operands into pieces was no faster at any step.
    """
    whole, rest = divmod(lhs.shape[-1], size)

    def with_piece(total: jax.Array, first: Any, size: int) -> jax.Array:
        left = lax.dynamic_slice_in_dim(lhs, first, size, lhs.ndim - 1)
        return combine(total, offset + first, left, lax.dynamic_slice_in_dim(rhs, first, size, rhs.ndim - 2))

    if whole:
        start, _ = lax.scan(lambda total, i: (with_piece(total, i * size, size), None), start, jnp.arange(whole))
    return with_piece(start, whole * size, rest) if rest else start


def _patches(images: jax.Array, window: tuple[int, ...], params: Mapping[str, Any]) -> jax.Array:
    """Returns what the window sees of (n, c, *in), as (n, c, *out, *window); copies only, so NaN stays where it is."""
    edges = [(low, high, d - 1) for (low, high), d in zip(params["padding"], params["lhs_dilation"], strict=True)]
    seen = lax.pad(images, np.zeros((), images.dtype), [(0, 0, 0), (0, 0, 0), *edges])
    for i, size in enumerate(window):
        stride, dilation = params["window_strides"][i], params["rhs_dilation"][i]
        reach = (size - 1) * dilation + 1
        count = max((seen.shape[2 + i] - reach) // stride + 1, 0)
        index = np.arange(count)[:, None] * stride + np.arange(size) * dilation
        # The window's axis goes last, behind those of the axes before, so that axis 2 + i becomes the output's.
        seen = jnp.moveaxis(jnp.take(seen, index, axis=2 + i, mode="clip"), 3 + i, -1)
    return seen


def _require_operands(lhs: jax.Array, rhs: jax.Array, accum: Accumulator) -> None:
    """Raises unless `lhs` and `rhs` are operands of a product that `accum` can sum up in float32."""
    for name, x in (("lhs", lhs), ("rhs", rhs)):
        if not jnp.issubdtype(x.dtype, jnp.floating) or x.dtype == jnp.float64:
            raise TypeError(f"accumulated products take floating {name} of up to 32 bits, got {x.dtype} {x.shape}.")
    if lhs.ndim < 2 or lhs.shape[:-2] != rhs.shape[:-2] or lhs.shape[-1] != rhs.shape[-2]:
        raise ValueError(f"accumulated_matmul takes (..., M, K) and (..., K, N), got {lhs.shape} and {rhs.shape}.")
    if accum.dtype != np.float32:
        raise ValueError(f"accumulator {accum} is native only: take the product itself with that dtype.")

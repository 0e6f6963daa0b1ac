"""Changes of weights that leave the function as it is, and what storing weights in a narrow format does to them.

A small network rarely has the ranges that trouble large ones. Multiplying here and dividing there gives it any range
one likes, while in float32 it computes what it did: what a narrow format then loses is due to range alone. Kernels are
(in, out), as in Flax.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from precision_lab import formats


class Pair(NamedTuple):
    """Two kernels with nothing but a ReLU between them: relu(x first + bias) second.

    Attributes:
      first: (in, hidden).
      second: (hidden, out).
      bias: (hidden,), or None.
    """

    first: jax.Array
    second: jax.Array
    bias: jax.Array | None = None

    def scaled(self, factor: jax.Array) -> Pair:
        """Returns the pair with unit i multiplied by `factor[i]`, positive, and divided by it after the ReLU."""
        self.require(factor.shape)
        bias = None if self.bias is None else _scaled(self.bias, factor, jnp.multiply)
        return Pair(_scaled(self.first, factor, jnp.multiply), _scaled(self.second, factor[:, None], jnp.divide), bias)

    def require(self, factor: tuple[int, ...] | None = None) -> None:
        """Raises ValueError unless the shapes, and that of factors, fit together."""
        units = self.first.shape[-1:]
        bias, factor = (units if self.bias is None else self.bias.shape), (units if factor is None else factor)
        if self.first.ndim != 2 or self.second.ndim != 2 or not self.second.shape[:1] == bias == factor == units:
            raise ValueError(
                f"expected kernels (in, hidden) and (hidden, out), a bias and factors (hidden,); got "
                f"{self.first.shape}, {self.second.shape}, {bias}, {factor}."
            )


def _scaled(x: Any, factor: jax.Array, by: Callable[..., jax.Array]) -> jax.Array:
    """Returns an array times or over factors, in its dtype, of which only the result has to have the range."""
    x = jnp.asarray(x)
    wide = jnp.float64 if x.dtype == jnp.float64 else jnp.float32
    return by(x.astype(wide), factor.astype(wide)).astype(x.dtype)


def rescale_pair(pair: Pair, exponents: jax.Array) -> Pair:
    """Returns the pair with unit i multiplied by 2**exponents[i] before its ReLU, and divided by it afterwards.

    Exact in binary floating point, bit for bit, unless a weight or an activation leaves the range of its dtype.

    Args:
      pair: kernels around a ReLU.
      exponents: integers (hidden,), from -126 to 126: of these, float32 has powers of two and reciprocals as normal
        numbers.

    Raises:
      TypeError: exponents that are no integers.
      ValueError: shapes do not fit, or exponents, where they are known, are out of range.
    """
    if not jnp.issubdtype(jnp.result_type(exponents), jnp.integer):
        raise TypeError(f"rescale_pair takes integers as exponents, got {jnp.result_type(exponents)}.")
    if not isinstance(exponents, Tracer) and np.size(exponents):
        low, high = int(np.min(exponents)), int(np.max(exponents))
        if low < -126 or high > 126:
            raise ValueError(f"exponents from {low} to {high}: those of rescale_pair are from -126 to 126.")
    fields = (jnp.asarray(exponents, jnp.int32) + 127) << 23
    return pair.scaled(jax.lax.bitcast_convert_type(fields, jnp.float32))


class Norm(NamedTuple):
    """A normalisation with a gain for each channel, and the kernels that alone read its result.

    Attributes:
      gain: (channels,).
      bias: (channels,), or None.
      kernels: each (channels, out).
    """

    gain: jax.Array
    bias: jax.Array | None
    kernels: tuple[jax.Array, ...]


def inject_norm_outliers(norm: Norm, channels: Sequence[int] | jax.Array, factor: float) -> Norm:
    """Returns the norm with some of its channels `factor` times as large, which the kernels after it undo.

    Activations get outlier features like those of large language models, in the channels given and at every token.
    Exact for a power of two; otherwise each changed number is off by half an ulp at most.

    Args:
      norm: gain, bias and the kernels that read them.
      channels: which, by number, from the last one if negative; or a mask of them.
      factor: above 0, finite.

    Raises:
      ValueError: a factor of 0 or less or infinite, no kernel, kernels that do not have a row for each channel, or a
        channel that there is not.

    Source: for such features, Dettmers et al., "LLM.int8()", 2022, arXiv:2208.07339, section 4.
    """
    if not 0 < factor < math.inf:
        raise ValueError(f"factor={factor}: expected a positive number, not infinite.")
    rows = [kernel.shape[0] for kernel in norm.kernels]
    if not rows or any(row != norm.gain.shape[0] for row in rows):
        raise ValueError(f"a norm of {norm.gain.shape[0]} channels needs kernels with as many rows, got {rows}.")
    size, which = norm.gain.shape[0], jnp.asarray(channels)
    if not isinstance(which, Tracer) and jnp.issubdtype(which.dtype, jnp.integer):
        outside = [channel for channel in np.ravel(which).tolist() if not -size <= channel < size]
        if outside:  # which a scatter drops
            raise ValueError(f"channel {outside[0]} of a norm of {size} channels, whose numbers end at {size - 1}.")
    by = jnp.ones_like(norm.gain).at[which].set(factor)
    bias = None if norm.bias is None else norm.bias * by
    return Norm(norm.gain * by, bias, tuple(kernel / by[:, None] for kernel in norm.kernels))


class Audit(NamedTuple):
    """What became of the elements of an array that was stored in a narrow format; integer counts.

    Attributes:
      overflow: finite ones beyond the format's largest number, clamped or not, and farther than half an ulp if the
        format has something else than that number for them.
      underflow: those other than zero that became zero.
      subnormal: those that became subnormal, with fewer digits than the format's others.
      size: all of them.
    """

    overflow: int
    underflow: int
    subnormal: int
    size: int

    def __add__(self, other: object) -> Audit:
        """Returns the counts of two arrays together."""
        if not isinstance(other, Audit):
            return NotImplemented
        return Audit(*(a + b for a, b in zip(self, other, strict=True)))


def store_as(x: Any, fmt: Any, *, clamp: bool = False) -> tuple[jax.Array, Audit]:
    """Returns an array as it reads back from storage in a format, and what was lost.

    What a loader does that casts a checkpoint: a bfloat16 one in float16, say, both of 16 bits.

    Args:
      x: floating array.
      fmt: a scalar floating format or its name.
      clamp: store what is too large as the largest finite number, instead of what the format makes of it (infinity in
        float16, NaN in float8_e4m3fn). Infinite numbers become what the format makes of them, in any case.

    Returns:
      Values on the format's grid, in the dtype of `x`, and their Audit.

    Raises:
      ValueError: a format that has no such range: an integer, a codebook, a block format.
    """
    fmt = formats.format(fmt)
    if fmt.kind != "float":
        raise ValueError(f"'{fmt.name}' is of kind {fmt.kind}, which needs a scale; quantize instead of casting.")
    x = jnp.asarray(x)
    cast, saturated = (formats.round_to(x, fmt, overflow=how) for how in ("native", "saturate"))
    # Counted in NumPy: XLA may take subnormal numbers, which is what is looked for, for zeros.
    given, kept, finite = np.asarray(x), np.asarray(saturated), np.isfinite(np.asarray(x))
    saturates = fmt.native_overflow == "saturate"
    beyond = finite & (np.abs(given) > fmt.max if saturates else ~np.isfinite(np.asarray(cast)))
    small = finite & (kept != 0) & (np.abs(kept.astype(np.float32)) < fmt.min_normal)
    zero = finite & (given != 0) & (kept == 0)
    audit = Audit(int(np.sum(beyond)), int(np.sum(zero)), int(np.sum(small)), x.size)
    return jnp.where(jnp.isfinite(x), saturated, cast) if clamp else cast, audit

"""DoReFa's gradients. Its weights are the estimator "dorefa", its activations "uintN,clipped" with a scale."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from precision_lab import formats
from precision_lab.formats import round_to
from precision_lab.quant.arithmetic import divide, multiply, narrow, widen


def dorefa_gradient(g: jax.Array, bits: int, *, key: jax.Array, axis: int | tuple[int, ...] | None = None) -> jax.Array:
    """Returns a gradient as DoReFa quantizes it: 2 m (q(g / (2 m) + 1/2 + noise) - 1/2), m the largest magnitude.

    The noise is uniform in half a step to each side, which makes the result unbiased unless it would leave the range.

    Args:
      g: float16, bfloat16 or float32 array.
      bits: bits of a code, 2 to 16.
      key: randomness of the noise.
      axis: axes that share m; None means all but the first, so that each example has its own.

    Returns:
      An array like `g`; zero where m is zero, NaN where m is not finite.

    Source: Zhou et al., "DoReFa-Net", 2016, arXiv:1606.06160, equation 12; the maximum is taken over all axes
      but that of the mini-batch, as there.
    """
    wide, steps = widen(g), np.float32(2**bits - 1)
    axes = tuple(range(1, g.ndim)) if axis is None else axis
    largest = jnp.max(jnp.abs(wide), axis=axes, keepdims=True, initial=0)
    noise = divide(jax.random.uniform(key, g.shape, minval=-0.5, maxval=0.5), steps)
    unit = divide(wide, multiply(jnp.float32(2), largest)) + np.float32(0.5) + noise
    codes = round_to(multiply(unit, steps), formats.format(f"uint{bits}"), overflow="saturate")
    quantized = multiply(divide(codes, steps) - np.float32(0.5), multiply(jnp.float32(2), largest))
    return narrow(jnp.where(jnp.isfinite(largest), quantized, np.float32(np.nan)), np.dtype(g.dtype))

"""Info: what a method of post-training quantization says of one weight."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from precision_lab.quant import QTensor


class Info(NamedTuple):
    """What became of a weight; float32 scalars, or one for each slice of a stacked weight.

    Attributes:
      sqnr_db: signal to quantization noise ratio of the weight, 10 log10(sum w^2 / sum (w - w_q)^2), in dB; infinite
        where nothing was lost.
      largest_error: largest magnitude of w - w_q, in the units of the weight.
    """

    sqnr_db: jax.Array
    largest_error: jax.Array


def info_of(weight: jax.Array, stored: QTensor) -> Info:
    """Returns what quantization has made of a weight."""
    exact = weight.astype(jnp.float32)
    error = exact - stored.dequantize().astype(jnp.float32)
    ratio = jnp.sum(exact**2) / jnp.sum(error**2)
    return Info(10 * jnp.log10(ratio), jnp.max(jnp.abs(error), initial=0))

"""How wrong a dot product is that sums up in a narrow accumulator, against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from precision_lab import formats
from precision_lab.policy.accumulator import Accumulator
from precision_lab.rewrite.accumulate import accumulated_matmul
from precision_lab.training.probes.config import DotProductConfig


def measure(config: DotProductConfig, seed: int) -> dict[str, float]:
    """Returns the errors of `config.count` dot products of `config.length` elements.

    Runs of one seed, length and distribution measure the same operands, whatever the accumulator.

    Returns:
      "error", the mean magnitude of the error, "max_error", the largest one, and "bias", the mean of the error with its
      sign; all over the root mean square of the exact results, so that sums that cancel do not count more than others.
      NaN where an accumulator overflows.

    Source: Wang et al., "Training Deep Neural Networks with 8-bit Floating Point Numbers", 2018, arXiv:1812.08011,
      section 2.3; DeepSeek-AI, "DeepSeek-V3 Technical Report", 2024, arXiv:2412.19437, section 3.3.2.
    """
    left, right = operands(config, seed)
    exact = np.einsum("nk,nk->n", np.asarray(left, np.float64), np.asarray(right, np.float64))
    summed = np.asarray(_summed(left, right, Accumulator.parse(config.accum)), np.float64)
    with np.errstate(invalid="ignore"):
        error = (summed - exact) / np.sqrt(np.mean(exact**2))
    return {
        "error": float(np.mean(np.abs(error))),
        "max_error": float(np.max(np.abs(error))),
        "bias": float(np.mean(error)),
    }


def operands(config: DotProductConfig, seed: int) -> tuple[jax.Array, jax.Array]:
    """Returns the operands (count, length), float32 on the grid of `config.inputs`."""
    shape = (2, config.count, config.length)
    drawn = jax.random.normal(jax.random.key(seed, impl="threefry2x32"), shape, jnp.float32)
    drawn = jnp.abs(drawn) if config.distribution == "positive" else drawn
    left, right = formats.round_to(drawn, config.inputs)
    return left, right


@functools.partial(jax.jit, static_argnums=2)
def _summed(left: jax.Array, right: jax.Array, accum: Accumulator) -> jax.Array:
    """Returns the dot product of each pair of rows, summed up as `accum` says."""
    if accum.is_native:
        return jnp.einsum("nk,nk->n", left, right, precision=jax.lax.Precision.HIGHEST)
    return accumulated_matmul(left[:, None], right[..., None], accum)[:, 0, 0]

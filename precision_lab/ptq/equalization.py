"""Cross-layer equalization: both layers around a ReLU get the same range in each of the units between them.

A scale for the whole of a kernel is set by its largest unit, and leaves the smaller ones a few steps of the grid. Since
a positive factor goes through a ReLU, it can be moved from one layer to the next until neither has such units.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from precision_lab.nn.transforms import Pair


def equalize(pair: Pair) -> Pair:
    """Returns the pair with unit i divided by s[i] = sqrt(r1[i] / r2[i]) and multiplied by it after the ReLU.

    r1[i] is the range of what makes unit i (a column of the first kernel), r2[i] that of what reads it (a row of the
    second); both become sqrt(r1[i] r2[i]). In float32 the function changes by rounding alone. A unit that is not made
    or not read stays as it is.

    Args:
      pair: kernels (in, hidden) and (hidden, out) around a ReLU, and the bias between.

    Raises:
      ValueError: shapes do not fit.

    Source: Nagel et al., "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019,
      arXiv:1906.04721, section 4.1, equations 9 to 11. Their kernels are (out, in), and s[i] is
      (1 / r2[i]) sqrt(r1[i] r2[i]), which is the same.
    """
    pair.require()
    first, second = _range(pair.first, axis=0), _range(pair.second, axis=1)
    both = (first > 0) & (second > 0)
    return pair.scaled(jnp.where(both, jnp.sqrt(second) / jnp.sqrt(jnp.where(both, first, 1)), 1))


def _range(kernel: jax.Array, *, axis: int) -> jax.Array:
    """Returns the largest magnitude along an axis, which is half of the range of a symmetric grid."""
    return jnp.max(jnp.abs(kernel).astype(jnp.float32), axis=axis, initial=0)

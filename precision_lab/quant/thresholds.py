"""Codes with thresholds of their own: those of TWN and of BitNet are not the levels nearest to the scaled values.

Elsewhere one number, the scale, says both what a code is worth and where it begins. Here these are two: values are
divided by a step, after a centre was subtracted, to find the code, and the code is multiplied by the scale.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from precision_lab.quant.arithmetic import divide, multiply, ordered_mean, ordered_sum
from precision_lab.quant.quantizer import Quantizer
from precision_lab.quant.tiles import Tiles

_TWN_FACTOR = np.float32(0.7)


class Thresholds(NamedTuple):
    """Where codes begin and what they are worth, float32 of the shape of scales.

    Attributes:
      scale: what values on the grid are multiplied by.
      step: what values are divided by before they are rounded.
      centre: what is subtracted before that; None for zero.
    """

    scale: jax.Array
    step: jax.Array
    centre: jax.Array | None = None


def thresholds(x: jax.Array, tiles: Tiles, qz: Quantizer) -> Thresholds | None:
    """Returns the thresholds that the quantizer's calibration finds in float32 `x`; None where the scale has them."""
    if qz.calibration == "twn":
        return Thresholds(*tiles.reduce(x, _twn))
    if qz.calibration == "centred":
        return Thresholds(*tiles.reduce(x, _centred))
    return None


def _twn(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Returns the mean of the magnitudes above 0.7 times their mean, and the step with which just these are not zero.

    Source: Li and Liu, "Ternary Weight Networks", 2016, arXiv:1605.04711, equations 5 and 6; their sums are those of
      the group here. Magnitudes at the threshold become zero, as there.
    """
    magnitudes = jnp.abs(x)
    threshold = multiply(ordered_mean(magnitudes, axes), _TWN_FACTOR)
    kept = magnitudes > threshold
    total, count = (ordered_sum(part, axes) for part in (jnp.where(kept, magnitudes, 0), kept.astype(jnp.float32)))
    return divide(total, jnp.maximum(count, 1)), 2 * threshold


def _centred(x: jax.Array, axes: tuple[int, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the mean magnitude as the scale, and the mean, about which the signs are taken.

    Source: Wang et al., "BitNet: Scaling 1-bit Transformers", 2023, arXiv:2310.11453, equations 1 to 3, and their beta.
      A value at the mean becomes +scale here, as zero does in "binary", where their sign has -1.
    """
    magnitude = ordered_mean(jnp.abs(x), axes)
    return magnitude, magnitude, ordered_mean(x, axes)

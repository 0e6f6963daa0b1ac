"""Scales and zero points: what maps the range of a group onto the grid of a format.

Everything here is a function of ranges; scales have the shape of the ranges, are float32, and are never zero but where
a format has no zero, so that a group of zeros must be made of its scale.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from precision_lab import formats
from precision_lab.formats import Format, round_to
from precision_lab.formats.elementwise import where
from precision_lab.quant.arithmetic import NAN, ONE, TINY, ZERO, divide
from precision_lab.quant.numbers import QuantizerParams
from precision_lab.quant.quantizer import Quantizer

# Holds the sum of any two codes of at most 16 bits.
WIDE = Format("int18:narrow", "int", 0, 17, -16, "narrow")
# Schemes whose scale depends on the smallest and the largest value, not on the largest magnitude alone.
SIDED = ("full", "affine", "signed_max")
_FLOAT32_MAX = np.float32(np.finfo(np.float32).max)


class Range(NamedTuple):
    """The values a grid shall cover, float32: low <= 0 <= high, or NaN where a value was."""

    low: Any
    high: Any

    @property
    def amax(self) -> Any:
        """Returns the largest magnitude."""
        return lax.max(lax.neg(self.low), self.high)


def scale_of(found: Range, qz: Quantizer, n: QuantizerParams) -> jax.Array:
    """Returns the scale that maps a range onto the grid, as the quantizer's scheme has it; zero for an empty range."""
    amax = found.amax
    match qz.scheme:
        case "full":
            return jnp.maximum(divide(-found.low, -n.low), divide(found.high, n.high))
        case "full_clipped":
            return divide(amax, (n.high - n.low) * np.float32(0.5))
        case "affine":
            return _span(found, n.high - n.low)
        case "signed_max":
            return divide(jnp.where(-found.low > found.high, found.low, found.high), n.low)
        case "pow2":
            return power_of_two_above(divide(amax, n.high))
        case "unscaled":
            return jnp.ones_like(amax)
    return divide(amax, n.high)


def _span(found: Range, steps: Any) -> jax.Array:
    """Returns (high - low) / steps, also where the difference is beyond float32."""
    span = found.high - found.low
    in_parts = divide(found.high, steps) - divide(found.low, steps)
    return jnp.where(span > _FLOAT32_MAX, in_parts, divide(span, steps))


def power_of_two_above(x: jax.Array) -> jax.Array:
    """Returns the smallest power of two that is at least `x` >= 0, at most 2**127; by the bits, exactly."""
    words = jax.lax.bitcast_convert_type(x, jnp.uint32)
    mantissa = np.uint32((1 << 23) - 1)
    up = jnp.minimum((words + mantissa) & ~mantissa, np.uint32(254 << 23))
    power = jax.lax.bitcast_convert_type(up, jnp.float32)
    return jnp.where(jnp.isfinite(x), power, x)


def usable(scale: jax.Array, qz: Quantizer) -> jax.Array:
    """Returns a scale that can be divided by: one for a group of zeros, or of what underflows; else as it was.

    A codebook without zero has the scale zero there, and so every value is zero.
    """
    no_zero = qz.format.kind == "codebook" and 0.0 not in qz.format.levels
    return where(lax.lt(lax.abs(scale), TINY), ZERO if no_zero else ONE, scale)


def rounded_scale(scale: jax.Array, qz: Quantizer) -> jax.Array:
    """Returns a scale as its own format has it; NaN where it is not finite."""
    scale = where(lax.is_finite(scale), scale, NAN)
    if qz.scale_format == "float32":
        return scale
    return round_to(scale, formats.format(qz.scale_format), overflow="saturate_finite")


def zero_point_of(found: Range, scale: jax.Array, n: QuantizerParams) -> jax.Array:
    """Returns the code of zero under an affine scheme, an integer as float32.

    Source: Jacob et al., "Quantization and Training of Neural Networks", 2018, arXiv:1712.05877, section 3.
    """
    below = round_to(jnp.clip(divide(found.low, scale), n.low - n.high, 0), WIDE)
    return jnp.clip(n.low - below, n.low, n.high)

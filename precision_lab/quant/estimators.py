"""Gradients through quantization: each estimator is a surrogate, a function with a derivative worth having.

A quantized value is what it is, bit for bit; only its derivative is that of the surrogate, which is an ordinary
expression. So one can read it, differentiate it either way, and compare it with finite differences. Surrogates are in
the units of the array, x; v is x in units of its scale, and q the value on the grid.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from precision_lab.quant.arithmetic import divide, widen
from precision_lab.quant.core import Given, Parts
from precision_lab.quant.numbers import QuantizerParams
from precision_lab.quant.quantizer import Quantizer
from precision_lab.quant.tiles import Tiles


class Point(NamedTuple):
    """What surrogates are made of: float32 arrays split into tiles; only x, scale and offset have gradients.

    `count` is the number of values that share a scale.
    """

    x: Any
    v: Any
    q: Any
    low: Any
    high: Any
    fixed_scale: Any
    scale: Any
    offset: Any
    strength: Any
    count: int = 1

    @property
    def inside(self) -> Any:
        """Returns whether a value is in the range of the grid, ends included."""
        return (self.v >= self.low) & (self.v <= self.high)


def with_gradient(
    value: jax.Array,
    x: jax.Array,
    parts: Parts | None,
    tiles: Tiles | None,
    given: Given,
    qz: Quantizer,
    n: QuantizerParams | None,
) -> jax.Array:
    """Returns `value`, the quantized `x`, with the gradient of the quantizer's estimator."""
    if qz.estimator == "zero":
        return value
    if qz.estimator == "ste":
        return replace_gradient(value, x)
    assert parts is not None
    assert tiles is not None
    assert n is not None
    if qz.estimator == "dorefa":
        return replace_gradient(value, _dorefa(widen(x)).astype(x.dtype))
    surrogate = tiles.join(SURROGATES[qz.estimator](_point(x, parts, tiles, given, n, qz)))
    return replace_gradient(value, surrogate.astype(x.dtype))


@jax.custom_jvp
def replace_gradient(value: jax.Array, surrogate: jax.Array) -> jax.Array:
    """Returns `value`; its derivative is that of `surrogate`, an array of the same shape and dtype."""
    return value


@replace_gradient.defjvp
def _replace_gradient_jvp(primals: Any, tangents: Any) -> Any:
    # Through the function itself, so that a second derivative finds the surrogate too.
    return replace_gradient(*primals), tangents[1]


def _point(x: jax.Array, parts: Parts, tiles: Tiles, given: Given, n: QuantizerParams, qz: Quantizer) -> Point:
    """Returns the ingredients of a surrogate."""
    fixed = jax.lax.stop_gradient(parts)
    scale, offset = tiles.spread(fixed.scale), None if fixed.offset is None else tiles.spread(fixed.offset)
    split = tiles.split(widen(x))
    v = divide(jax.lax.stop_gradient(split) - (0 if offset is None else offset), scale)
    shift = 0 if fixed.zero_point is None else tiles.spread(fixed.zero_point)
    learned, learned_offset = _learned(x, tiles, given, n, qz)
    return Point(
        x=split,
        v=v,
        q=fixed.values,
        low=n.low - shift,
        high=n.high - shift,
        fixed_scale=scale,
        scale=scale if learned is None else learned,
        offset=0 if learned_offset is None else learned_offset,
        strength=n.strength,
        count=tiles.per_scale,
    )


def _learned(x: jax.Array, tiles: Tiles, given: Given, n: QuantizerParams, qz: Quantizer) -> tuple[Any, Any]:
    """Returns scale and offset that are given, spread over the tiles, with the gradient scale of the LSQ papers.

    Source: Esser et al., "Learned Step Size Quantization", 2020, arXiv:1902.08153, section 2.2: 1 / sqrt(N * Q_P).
    """
    if qz.estimator not in ("lsq", "lsq+", "pact"):
        return None, None

    def spread(value: Any) -> Any:
        if value is None:
            return None
        array = jnp.asarray(value, jnp.float32)
        if qz.estimator != "pact":
            shared = x.size / max(array.size, 1)
            array = scale_gradient(array, 1 / jnp.sqrt(jnp.float32(max(shared, 1)) * n.high))
        return tiles.spread(jnp.broadcast_to(array, tiles.scale_shape))

    return spread(given.scale), spread(given.offset)


def scale_gradient(x: jax.Array, factor: Any) -> jax.Array:
    """Returns `x`, with its gradient multiplied by `factor`."""
    return replace_gradient(x, x * factor)


def _clipped(p: Point) -> jax.Array:
    """Returns x within the range of the grid, a constant outside.

    Source: Bengio et al., "Estimating or Propagating Gradients Through Stochastic Neurons", 2013, arXiv:1308.3432, for
      the identity; Courbariaux et al., "Binarized Neural Networks", 2016, arXiv:1602.02830, equation 4, for the clip.
    """
    return jnp.where(p.inside, p.x, jax.lax.stop_gradient(p.x))


def _tanh(p: Point) -> jax.Array:
    """Returns the soft staircase: between neighbouring integers a tanh whose steepness follows from alpha.

    Source: Gong et al., "Differentiable Soft Quantization", 2019, arXiv:1908.05033, equations 3 to 6 and 9, with
      intervals of length 1: k = log(2 / alpha - 1), s = 1 / (1 - alpha), which is 1 / tanh(k / 2).
    """
    floor = jnp.floor(p.v)
    v = divide(p.x, p.fixed_scale)
    k, s = jnp.log(2 / jnp.float32(p.strength) - 1), 1 / (1 - jnp.float32(p.strength))
    soft = (floor + np.float32(0.5) + jnp.tanh(k * (v - floor - np.float32(0.5))) * (s / 2)) * p.fixed_scale
    return jnp.where(p.inside, soft, jax.lax.stop_gradient(p.x))


def _ewgs(p: Point) -> jax.Array:
    """Returns x within the range of the grid, with the cotangent scaled element by element; no forward derivative.

    Source: Lee et al., "Network Quantization with Element-wise Gradient Scaling", 2021, arXiv:2104.00903, equation 5,
      with values normalized to [0, 1] over the range of the grid as there.
    """
    error = (jnp.clip(p.v, p.low, p.high) - p.q) / (p.high - p.low)
    return jnp.where(p.inside, _scaled_by_sign(p.x, p.strength * error), jax.lax.stop_gradient(p.x))


@jax.custom_vjp
def _scaled_by_sign(x: jax.Array, by: jax.Array) -> jax.Array:
    """Returns `x`; its cotangent g becomes g * (1 + sign(g) * by)."""
    return x


def _forward(x: jax.Array, by: jax.Array) -> tuple[jax.Array, jax.Array]:
    return x, by


def _backward(by: jax.Array, g: jax.Array) -> tuple[jax.Array, jax.Array]:
    return g * (1 + jnp.sign(g) * by), jnp.zeros_like(by)


_scaled_by_sign.defvjp(_forward, _backward)


def _lsq(p: Point) -> jax.Array:
    """Returns x + s (q - v) inside the range, and s times its end outside: d/ds is q - v, and the end.

    Source: Esser et al., "Learned Step Size Quantization", 2020, arXiv:1902.08153, equations 3 and 5.
    """
    strictly = (p.v > p.low) & (p.v < p.high)
    return jnp.where(strictly, p.x + p.scale * (p.q - p.v), p.scale * jnp.clip(p.v, p.low, p.high))


def _lsq_plus(p: Point) -> jax.Array:
    """Returns the surrogate of `_lsq` with an offset: outside the range the quantized value moves with it.

    Source: Bhalgat et al., "LSQ+: Improving low-bit quantization through learnable offsets and better initialization",
      2020, arXiv:2004.09576, equations 3 to 5.
    """
    strictly = (p.v > p.low) & (p.v < p.high)
    return jnp.where(strictly, p.x + p.scale * (p.q - p.v), p.scale * jnp.clip(p.v, p.low, p.high) + p.offset)


def _pact(p: Point) -> jax.Array:
    """Returns x inside the range, its end outside: the clip learns from the values it clips alone.

    Source: Choi et al., "PACT: Parameterized Clipping Activation", 2018, arXiv:1805.06085, equations 1 to 3; alpha is
      the scale times the largest code, and values at alpha count as clipped.
    """
    return jnp.where((p.v >= p.low) & (p.v < p.high), p.x, p.scale * jnp.clip(p.v, p.low, p.high))


def _hard_tanh(p: Point) -> jax.Array:
    """Returns the scale times x, clipped to [-1, 1], ends included.

    Source: Courbariaux et al., "Binarized Neural Networks", 2016, arXiv:1602.02830, equation 4: the derivative of the
      sign is 1 where |x| <= 1, whatever the sign is multiplied by.
    """
    return p.fixed_scale * jnp.where(jnp.abs(p.x) <= 1, p.x, jax.lax.stop_gradient(p.x))


def _xnor(p: Point) -> jax.Array:
    """Returns the surrogate of `_hard_tanh` plus x / n: the mean magnitude of n values moves with each of them.

    Source: Rastegari et al., "XNOR-Net", 2016, arXiv:1603.05279, section 3.1:
      1/n + alpha * 1[|w| <= 1].
    """
    return _hard_tanh(p) + p.x / np.float32(max(p.count, 1))


def _dorefa(x: jax.Array) -> jax.Array:
    """Returns tanh(x) over its largest magnitude, which is what DoReFa rounds; the largest has a gradient too.

    Source: Zhou et al., "DoReFa-Net", 2016, arXiv:1606.06160, equation 9.
    """
    squashed = jnp.tanh(x)
    largest = jnp.max(jnp.abs(squashed), initial=0)
    return squashed / jnp.where(largest == 0, np.float32(1), largest)


SURROGATES: dict[str, Callable[[Point], jax.Array]] = {
    "clipped": _clipped,
    "tanh": _tanh,
    "ewgs": _ewgs,
    "lsq": _lsq,
    "lsq+": _lsq_plus,
    "pact": _pact,
    "hard_tanh": _hard_tanh,
    "xnor": _xnor,
}

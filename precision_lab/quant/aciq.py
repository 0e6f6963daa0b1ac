"""ACIQ: where to clip values of a known distribution so that clipping and rounding together err least."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache


@lru_cache(maxsize=64)
def clip_ratio(bits: int, *, normal: bool = False) -> float:
    """Returns the best clip over the spread of the distribution: E|x| for Laplace's, the deviation for the normal one.

    Rounding to 2**bits steps over [-a, a] adds a**2 / (3 * 4**bits) to the error of clipping.

    Args:
      bits: bits of a code.
      normal: whether the distribution is normal instead of Laplace's.

    Source: Banner et al., "Post Training 4-bit Quantization of Convolutional Networks for Rapid-Deployment", 2019,
      arXiv:1810.05723, equations 8 and 9 (Laplace), 12 (normal).
    """
    slope = _normal_slope if normal else _laplace_slope
    return _root(lambda a: slope(a) + 2 * a / (3 * 4.0**bits))


def _laplace_slope(a: float) -> float:
    """Returns the derivative of the clipping error 2 exp(-a), in units of E|x| = 1."""
    return -2 * math.exp(-a)


def _normal_slope(a: float) -> float:
    """Returns the derivative of 2 * integral from a of (x - a)**2 over the normal density, at a."""
    density = math.exp(-a * a / 2) / math.sqrt(2 * math.pi)
    tail = math.erfc(a / math.sqrt(2)) / 2
    return -4 * (density - a * tail)


def _root(f: Callable[[float], float]) -> float:
    """Returns where the increasing function `f` is zero, by bisection."""
    low, high = 0.0, 64.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if f(middle) < 0 else (low, middle)
    return (low + high) / 2

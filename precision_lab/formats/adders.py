"""Rounding to nearest by an addition: the fewest operations, for the formats that leave room for it.

Adding a power of two whose last place is the spacing of a format at a value makes the adder round to that spacing,
ties to even; subtracting the power again leaves the rounded value, subnormal or not. What XLA may flush is less than
half of the smallest step. The power depends on the value's exponent, except for integers, and the sum is limited
before it is subtracted: that is what saturates, and what keeps a compiler from simplifying (x + c) - c to x.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import jax.numpy as jnp

from precision_lab.formats.containers import as_float, as_word
from precision_lab.formats.kernel import below, is_negative, signs_of, with_sign
from precision_lab.formats.oracle import floor_exponent
from precision_lab.formats.params import FormatParams, Layout
from precision_lab.formats.scalar import Format, power_of_two


def has_adder(fmt: Format, layout: Layout) -> bool:
    """Returns whether the container has the powers of two to add, and flushes nothing that matters."""
    room = layout.mantissa_bits - fmt.mantissa_bits
    # Without mantissa bits a tie is decided by the exponent, which a sum does not see.
    if not fmt.has_zero or fmt.mantissa_bits == 0 or room <= 0:
        return False
    top = max(floor_exponent(Fraction(fmt.max)), fmt.min_exponent)
    return top + room < layout.bias and fmt.step >= power_of_two(2 - layout.bias)


def adder(layout: Layout, a: Any, fmt: Format, *, shift: Any = 0) -> Any:
    """Returns the power of two whose last place is the spacing of `fmt` at the magnitudes `a`.

    Args:
      layout: the container's layout.
      a: words of magnitudes with at most the exponent of the largest sum that matters.
      fmt: a format that has an adder.
      shift: exponents of scales that are on the values, in the place of the exponent field.
    """
    lowest = layout.word((fmt.min_exponent + layout.bias) << layout.mantissa_bits) + shift
    to_power = layout.word((layout.mantissa_bits - fmt.mantissa_bits) << layout.mantissa_bits)
    return as_float(jnp.maximum(a & layout.word(layout.inf), lowest) + to_power)


def round_by_adder(layout: Layout, bits: Any, fmt: Format, p: FormatParams) -> Any:
    """Returns the same bits as `kernel.round_bits` with "nearest_even", for subnormals "keep" and "flush".

    Args:
      layout: the container's layout.
      bits: words of the container.
      fmt: a format that has an adder.
      p: its parameters, as NumPy scalars.
    """
    word, zero = layout.word, layout.word(0)
    a, sign = signs_of(layout, bits)
    largest = p.max if p.max == p.min else jnp.where(is_negative(layout, sign), p.min, p.max)
    # Beyond the largest value every sum is the least one that is too large.
    bound = as_word(as_float(largest) + adder(layout, largest, fmt)) + word(p.overflow != zero)
    anchor = _power(layout, a, fmt, p)
    total = as_float(a) + anchor
    r = as_word(jnp.where(total < as_float(bound), total, as_float(bound)) - anchor)
    if p.flush != zero:
        r = jnp.where(below(layout, r, p.flush), zero, r)
    return with_sign(layout, _limited(layout, a, r, largest, p), sign, p)


def _power(layout: Layout, a: Any, fmt: Format, p: FormatParams) -> Any:
    """Returns what to add to the magnitudes `a`, of which those beyond the largest value need no power of their own."""
    if fmt.kind == "int":
        return adder(layout, layout.word(0), fmt)
    return adder(layout, jnp.minimum(a, p.max | layout.word((1 << layout.mantissa_bits) - 1)), fmt)


def _limited(layout: Layout, a: Any, r: Any, largest: Any, p: FormatParams) -> Any:
    """Returns the sums `r` with infinities and NaNs as the format has them."""
    inf = layout.word(layout.inf)
    special = a | p.quiet if p.quiet else a
    if p.overflow == 0:
        return jnp.where(below(layout, p.finite, a), special, r)
    if p.finite < inf and p.overflow == inf | p.quiet:
        # What overflows becomes what an infinity does.
        special = jnp.maximum(a, inf) | p.quiet if p.quiet else jnp.maximum(a, inf)
    else:
        special = jnp.where(below(layout, p.finite, a), special, p.overflow)
    return jnp.where(below(layout, largest, r), special, r)

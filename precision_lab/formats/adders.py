"""Rounding to nearest by an addition: the fewest operations, for the formats that leave room for it.

Adding a power of two whose last place is the spacing of a format at a value makes the adder round to that spacing,
ties to even; subtracting the power again leaves the rounded value, subnormal or not. What XLA may flush is less than
half of the smallest step. The power depends on the value's exponent, except for integers, and the sum is limited
before it is subtracted: that is what saturates, and what keeps a compiler from simplifying (x + c) - c to x.

Only JAX comes here, with formats known at compile time, so operations are lax's; those of the kernel serve NumPy too.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

from jax import lax

from precision_lab.formats.containers import as_float, as_word
from precision_lab.formats.elementwise import spread, where
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
      shift: exponents of scales that are on the values, in the place of the exponent field; an array that
        broadcasts to the shape of `a`.
    """
    lowest = layout.word((fmt.min_exponent + layout.bias) << layout.mantissa_bits) + shift
    to_power = layout.word((layout.mantissa_bits - fmt.mantissa_bits) << layout.mantissa_bits)
    exponents = lax.bitwise_and(a, layout.word(layout.inf))
    lowest = lowest if lowest.ndim == 0 else spread(lowest, exponents.shape)
    return as_float(lax.add(lax.max(exponents, lowest), to_power))


def _adder_of_integers(layout: Layout, fmt: Format) -> Any:
    """Returns the one power of two that `adder` gives for all magnitudes of an integer format, as a NumPy scalar."""
    exponent = fmt.min_exponent + layout.mantissa_bits - fmt.mantissa_bits
    return layout.word((exponent + layout.bias) << layout.mantissa_bits).view(f"f{layout.bits // 8}")


def round_by_adder(layout: Layout, bits: Any, fmt: Format, p: FormatParams) -> Any:
    """Returns the same bits as `kernel.round_bits` with "nearest_even", for subnormals "keep" and "flush".

    Args:
      layout: the container's layout.
      bits: words of the container.
      fmt: a format that has an adder.
      p: its parameters, as NumPy scalars.
    """
    inf, zero = layout.word(layout.inf), layout.word(0)
    a = lax.bitwise_and(bits, layout.word(layout.sign - 1))
    sign = lax.bitwise_xor(bits, a)
    if p.overflow == zero:
        fits, m = _up_to(layout, a, p.finite), lax.min(a, _of_sign(layout, sign, p.max, p.min))
        special = lax.bitwise_or(a, p.quiet)
    else:
        last = (_last_that_fits(layout, fmt, magnitude) for magnitude in (fmt.magnitude(fmt.max_code), -fmt.lowest))
        fits, m = _up_to(layout, a, _of_sign(layout, sign, *last)), a
        if p.finite < inf and p.overflow == inf | p.quiet:
            # What overflows becomes what an infinity does.
            special = lax.bitwise_or(lax.max(a, inf), p.quiet)
        else:
            special = where(_up_to(layout, a, p.finite), p.overflow, lax.bitwise_or(a, p.quiet))
    power = adder(layout, m, fmt) if fmt.kind != "int" else _adder_of_integers(layout, fmt)
    # XLA would make (m + c) - c into m, but for the choice in between, which costs nothing: it is made again below.
    near = as_float(m)
    r = as_word(lax.sub(lax.select(fits, lax.add(near, power), near), power))
    if p.flush != zero:
        r = where(lax.lt(_signed(layout, r), _signed(layout, p.flush)), zero, r)
    return _with_sign(layout, lax.select(fits, r, special), sign, p)


def _up_to(layout: Layout, a: Any, last: Any) -> Any:
    """Returns where magnitudes are not above `last`."""
    return lax.le(_signed(layout, a), _signed(layout, last))


def _signed(layout: Layout, magnitude: Any) -> Any:
    """Returns a magnitude as a signed integer, which every CPU compares in one instruction."""
    return magnitude.astype(layout.signed)


def _of_sign(layout: Layout, sign: Any, positive: Any, negative: Any) -> Any:
    """Returns the word that is for numbers of this sign."""
    if positive == negative:
        return positive
    return where(lax.lt(_signed(layout, sign), layout.signed(0)), negative, positive)


def _with_sign(layout: Layout, r: Any, sign: Any, p: FormatParams) -> Any:
    """Returns magnitudes `r` with their signs, which a zero keeps if the format has a negative one."""
    if p.zero_sign != layout.sign:
        # The sign bit of 0 - r is set unless r is zero.
        sign = lax.bitwise_and(sign, lax.neg(r))
    return lax.bitwise_or(r, sign)


def _last_that_fits(layout: Layout, fmt: Format, largest: Fraction | float) -> Any:
    """Returns the greatest magnitude that rounds to `largest` if what lies half a step above it goes to even."""
    largest = Fraction(largest)
    step = power_of_two(floor_exponent(largest) - fmt.mantissa_bits)
    tie = layout.floor_bits(largest + step / 2)
    return layout.word(tie - (largest / step) % 2)

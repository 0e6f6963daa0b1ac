"""The rounding kernel: integer arithmetic on the bits of a float, for NumPy and JAX alike.

No float operation touches a value here except in `round_nearest_even`, where flushing cannot matter. XLA flushes
subnormals on CPU, fuses a product and a sum into one rounding, and drops pairs of casts; none of that can change
what integers compute. `exp2` and `log2` are inexact on XLA and are not used for anything.

Every function takes the array module `xp` (numpy or jax.numpy), the container's `Layout`, and `FormatParams` whose
leaves are NumPy scalars (a static format) or traced arrays; the code is the same.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from precision_lab.formats.params import FormatParams, Layout
from precision_lab.formats.scalar import Format, power_of_two


def round_bits(xp: ModuleType, layout: Layout, bits: Any, p: FormatParams, rounding: str) -> Any:
    """Returns the bits of the values in `bits` rounded to the format `p`; NaNs are returned as they came."""
    word = layout.word
    inf, mask = word(layout.inf), word(layout.sign - 1)
    a = bits & mask
    sign = bits ^ a
    r = round_magnitude(xp, layout, a, sign, p, rounding)
    r = xp.where(r > p.max, _beyond(xp, sign, p, rounding), r)
    r = xp.where(a == inf, p.infinity, r)
    return _finish(xp, layout, a, sign, r, p)


def round_magnitude(xp: ModuleType, layout: Layout, a: Any, sign: Any, p: FormatParams, rounding: str) -> Any:
    """Returns the bits of the magnitudes `a` rounded as if the format had no largest value.

    The significand m of `a`, counted in units of the container's last place, loses its s lowest bits: those the
    format never has, and one more for every binade below the format's normal range.
    """
    word = layout.word
    width, one = word(layout.mantissa_bits), word(1)
    e = xp.maximum(a >> width, one)
    m = a - ((e - one) << width)
    # Beyond width + 1 dropped bits the result is zero or the smallest value, however many they are.
    s = xp.minimum(p.drop + (xp.maximum(p.min_field, e) - e), word(layout.mantissa_bits + 3))
    dropped = (one << s) - one
    q = (m + _increment(xp, layout, m, e, s, dropped, sign, p, rounding)) & ~dropped
    r = xp.where(s > width + one, p.smallest, ((e - one) << width) + q)
    return xp.where(q == word(0), word(0), r)


def _increment(
    xp: ModuleType, layout: Layout, m: Any, e: Any, s: Any, dropped: Any, sign: Any, p: Any, how: str
) -> Any:
    """Returns what to add to the significands `m` before truncating them."""
    zero, one = layout.word(0), layout.word(1)
    match how:
        case "nearest_even":
            return (dropped + _is_odd(xp, layout, m, e, s, p)) >> one
        case "nearest_away":
            return (dropped + one) >> one
        case "toward_zero":
            return zero
        case "up":
            return xp.where(sign == zero, dropped, zero)
        case "down":
            return xp.where(sign == zero, zero, dropped)
        case "to_odd":
            return dropped * (one - _is_odd(xp, layout, m, e, s, p))
    raise AssertionError(f"rounding {how!r} was not checked")


def _is_odd(xp: ModuleType, layout: Layout, m: Any, e: Any, s: Any, p: FormatParams) -> Any:
    """Returns 1 where the code just below is odd: the last bit of the mantissa, or of the exponent if there is none."""
    width, one = layout.word(layout.mantissa_bits), layout.word(1)
    # Shifted to start at the smallest normal number, a normal value reads as its code and its dropped bits.
    code = m + ((e - p.min_field) << width)
    return (xp.where(e >= p.min_field, code, m) >> s) & one


def _beyond(xp: ModuleType, sign: Any, p: FormatParams, rounding: str) -> Any:
    """Returns what a finite value beyond the largest becomes; a rounding directed inwards stops at the largest."""
    if rounding in ("toward_zero", "to_odd"):
        return p.max
    if rounding == "up":
        return xp.where(sign == 0, p.overflow, p.max)
    if rounding == "down":
        return xp.where(sign == 0, p.max, p.overflow)
    return p.overflow


def _finish(xp: ModuleType, layout: Layout, a: Any, sign: Any, r: Any, p: FormatParams) -> Any:
    """Returns magnitudes `r` with their signs, and every NaN of `a` untouched."""
    r = xp.where(a > layout.word(layout.inf), a, r)
    return r | xp.where(r == layout.word(0), sign & p.zero_sign, sign)


def has_fast_path(layout: Layout, fmt: Format) -> bool:
    """Returns whether `round_nearest_even` is exact for `fmt`.

    Below the format's normal numbers it adds in floating point, so whatever the container may flush must round to
    zero anyway, and the constant it adds must be finite. Formats with the container's own exponents add nothing.
    """
    if fmt.mantissa_bits == 0 or fmt.mantissa_bits > layout.mantissa_bits:
        return False
    smallest_flushed = power_of_two(2 - layout.bias)
    largest_constant = power_of_two(layout.bias - layout.mantissa_bits)
    shares_exponents = fmt.min_exponent + layout.bias <= 1
    return shares_exponents or smallest_flushed <= fmt.step < largest_constant


def round_nearest_even(xp: ModuleType, layout: Layout, bits: Any, p: FormatParams, as_float: Any, as_bits: Any) -> Any:
    """Returns the same bits as `round_bits` with "nearest_even", in fewer operations, where `has_fast_path`.

    Above the smallest normal number the number of dropped bits is the same for all elements. Below it, adding a
    number whose last place is the format's step makes the adder round to that step, and the bits of the sum count
    the steps. (Subtracting the number again would be simplified away: XLA of JAX 0.10 makes (x + c) - c into x.)

    Args:
      xp: numpy or jax.numpy.
      layout: the container's layout.
      bits: words of the container.
      p: parameters with NumPy scalar leaves.
      as_float: function from words to floats of the same bits.
      as_bits: its inverse.
    """
    word = layout.word
    one, width = word(1), word(layout.mantissa_bits)
    a = bits & word(layout.sign - 1)
    sign = bits ^ a
    r = a
    if p.drop:
        dropped = (one << p.drop) - one
        r = (a + (dropped >> one) + ((a >> p.drop) & one)) & ~dropped
    if p.min_field > 1:
        base = p.smallest + (width << width)
        steps = as_bits(as_float(a) + as_float(base)) - base
        small = as_bits(steps.astype(layout.name) * as_float(p.smallest))
        r = xp.where(a < (p.min_field << width), small, r)
    r = xp.where(r > p.max, p.overflow, r)
    if p.infinity != p.overflow:
        r = xp.where(a == word(layout.inf), p.infinity, r)
    if p.zero_sign:
        return xp.where(a > word(layout.inf), a, r) | sign
    return _finish(xp, layout, a, sign, r, p)

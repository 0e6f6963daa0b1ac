"""The rounding kernel: integer arithmetic on the bits of a float, for NumPy and JAX alike.

No float operation touches a value here except in `round_nearest_even`, where flushing cannot matter. XLA flushes
subnormals on CPU, fuses a product and a sum into one rounding, and drops pairs of casts; none of that can change
what integers compute. `exp2` and `log2` are inexact on XLA and are not used for anything.

Every function takes the array module `xp` (numpy or jax.numpy), the container's `Layout`, and `FormatParams` whose
leaves are NumPy scalars (a static format) or traced arrays; the code is the same, but a static format costs nothing
for what it does not need.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from precision_lab.formats.params import FormatParams, Layout

# What each rounding does to the magnitude of positive and of negative values. "odd" and "even" speak of codes.
_RULES: dict[str, tuple[str, str]] = {
    "nearest_even": ("even", "even"),
    "nearest_away": ("away", "away"),
    "toward_zero": ("inward", "inward"),
    "up": ("outward", "inward"),
    "down": ("inward", "outward"),
    "to_odd": ("odd", "odd"),
    "stochastic": ("drawn", "drawn"),
}


class Draw(NamedTuple):
    """Random bits for stochastic rounding.

    Attributes:
      words: words of the container, shaped like the values, uniform in their lowest `n_bits` bits.
      n_bits: how many random bits are compared with the discarded ones.
      centred: add half of what `n_bits` cannot resolve, so that truncating the discarded bits has no bias on average.
    """

    words: Any
    n_bits: int
    centred: bool = False


def round_bits(
    xp: ModuleType, layout: Layout, bits: Any, p: FormatParams, rounding: str, draw: Draw | None = None
) -> Any:
    """Returns the bits of the values in `bits` rounded to the format `p`; a NaN stays one.

    Args:
      xp: numpy or jax.numpy.
      layout: the container's layout.
      bits: words of the container.
      p: the format; leaves are scalars, or arrays that broadcast against `bits`.
      rounding: a name of `ROUNDINGS`.
      draw: random bits for "stochastic".
    """
    a, sign = signs_of(layout, bits)
    return _finish(xp, layout, a, sign, round_magnitude(xp, layout, a, sign, p, rounding, draw), p, rounding)


def signs_of(layout: Layout, bits: Any) -> tuple[Any, Any]:
    """Returns the magnitudes in `bits`, and the sign bits."""
    a = bits & layout.word(layout.sign - 1)
    return a, bits ^ a


def below(layout: Layout, one: Any, other: Any) -> Any:
    """Returns where one magnitude is below another; as signed integers, which is one instruction on every CPU."""
    return one.astype(layout.signed) < other.astype(layout.signed)


def is_negative(layout: Layout, sign: Any) -> Any:
    """Returns where a sign bit is set."""
    return sign.astype(layout.signed) < layout.signed(0)


def round_magnitude(
    xp: ModuleType, layout: Layout, a: Any, sign: Any, p: FormatParams, rounding: str, draw: Draw | None = None
) -> Any:
    """Returns the bits of the magnitudes `a` rounded as if the format had no largest value.

    A float loses its s lowest bits: those the format never has, and one more for every binade below the format's
    normal range. Adding to the bits of a float carries into its exponent as it should. That works while at least
    the leading one is kept; below the smallest value the choice is between that and zero.
    """
    word = layout.word
    width = word(layout.mantissa_bits)
    # Magnitudes so small that s has no meaning are below the smallest value, and shifts beyond the word have none.
    s = (p.drop + xp.maximum(p.min_field, a >> width) - (a >> width)) & word(layout.bits - 1)
    kept = ~word(0) << s
    increment = by_rule(xp, layout, rounding, sign, lambda rule: rule_increment(xp, layout, rule, a, s, ~kept, p, draw))
    return xp.where(below(layout, a, p.step), _tiny(xp, layout, a, sign, p, rounding, draw), (a + increment) & kept)


def by_rule(xp: ModuleType, layout: Layout, rounding: str, sign: Any, value: Callable[[str], Any]) -> Any:
    """Returns `value` of the rule that `rounding` applies to magnitudes of this sign."""
    positive, negative = _RULES[rounding]
    if positive == negative:
        return value(positive)
    return xp.where(is_negative(layout, sign), value(negative), value(positive))


def rule_increment(
    xp: ModuleType, layout: Layout, rule: str, a: Any, s: Any, dropped: Any, p: Any, draw: Draw | None
) -> Any:
    """Returns what to add to the bits `a` before the `dropped` ones, the lowest s, are cut off."""
    zero, one = layout.word(0), layout.word(1)
    match rule:
        case "even":
            return (dropped + _is_odd(layout, a, s, p)) >> one
        case "away":
            return (dropped + one) >> one
        case "inward":
            return zero
        case "outward":
            return dropped
        case "odd":
            return dropped & (_is_odd(layout, a, s, p) - one)
        case "drawn" if draw is not None:
            return random_offset(xp, layout, s, draw)
    raise AssertionError(f"rounding rule {rule!r} was not checked")


def _is_odd(layout: Layout, a: Any, s: Any, p: FormatParams) -> Any:
    """Returns 1 where the code just below is odd: the last bit of the mantissa, or of the exponent if there is none."""
    with_leading_one = a if _is(p.leading, 0) else a | p.leading
    return ((with_leading_one if _is(p.parity, 0) else with_leading_one ^ p.parity) >> s) & layout.word(1)


def random_offset(xp: ModuleType, layout: Layout, s: Any, draw: Draw) -> Any:
    """Returns random numbers below 2**s, made of the lowest `n_bits` bits of the words drawn."""
    word = layout.word
    if draw.n_bits == layout.bits:
        return xp.where(s == word(0), word(0), draw.words >> (word(layout.bits) - xp.maximum(s, word(1))))
    n = word(draw.n_bits)
    unresolved = xp.maximum(s, n) - n
    offset = ((draw.words & word((1 << draw.n_bits) - 1)) << unresolved) >> (n - xp.minimum(s, n))
    return offset + ((word(1) << unresolved) >> word(1)) if draw.centred else offset


def _tiny(xp: ModuleType, layout: Layout, a: Any, sign: Any, p: FormatParams, rounding: str, draw: Draw | None) -> Any:
    """Returns zero or the smallest value for magnitudes `a` below `p.step`."""
    if rounding == "stochastic":
        return _tiny_drawn(xp, layout, a, p, draw)
    least = by_rule(xp, layout, rounding, sign, lambda rule: _least(xp, layout, p, rule))
    return xp.where(below(layout, a, least), layout.word(0), p.smallest)


def _least(xp: ModuleType, layout: Layout, p: FormatParams, rule: str) -> Any:
    """Returns the least magnitude below `p.step` that does not become zero; `p.step` itself if there is none."""
    one, step = layout.word(1), p.step
    # Half of a number is its exponent less one; where it is subnormal in the container it is half of its bits.
    halved = step < layout.word(2 << layout.mantissa_bits)
    binade = layout.word(1 << layout.mantissa_bits)
    half = xp.where(halved, step >> one, xp.maximum(step, binade) - binade)
    half_up = xp.where(halved, (step + one) >> one, half)
    # Zero is even, and the smallest value odd.
    return {"even": half + one, "away": half_up, "inward": step, "outward": one, "odd": one}[rule]


def _tiny_drawn(xp: ModuleType, layout: Layout, a: Any, p: FormatParams, draw: Draw | None) -> Any:
    """Returns magnitudes `a` below `p.step` rounded at random: is significand plus random bits a whole step?"""
    assert draw is not None
    word = layout.word
    one, width = word(1), word(layout.mantissa_bits)
    field = xp.maximum(a >> width, one)
    m = a - ((field - one) << width)
    top = xp.where(p.step >> width == word(0), p.drop + one, (p.step >> width) + width)
    s = xp.maximum(top, field) - field
    # A word holds so many random bits; what is cut off here is below 2**-31 (2**-63) of a step.
    fits = xp.minimum(s, word(layout.bits - 1))
    gone = xp.minimum(s - fits, width + one)
    return xp.where(((m >> gone) + random_offset(xp, layout, fits, draw)) >> fits == word(0), word(0), p.smallest)


def round_nearest_even(xp: ModuleType, layout: Layout, bits: Any, p: FormatParams, as_float: Any, as_bits: Any) -> Any:
    """Returns the same bits as `round_bits` with "nearest_even", in fewer operations.

    Above the smallest normal number the number of dropped bits is the same for all elements. Below it, adding a
    number whose last place is the format's step makes the adder round to that step. The sum is limited before the
    number is subtracted again, or XLA of JAX 0.10 would make (x + c) - c into x; limited to c itself where all that
    is subnormal becomes zero. What the container may flush is less than half a step, see `params.check_steps`.

    Args:
      xp: numpy or jax.numpy.
      layout: the container's layout.
      bits: words of the container.
      p: the format's parameters.
      as_float: function from words to floats of the same bits.
      as_bits: its inverse.
    """
    word = layout.word
    one, width = word(1), word(layout.mantissa_bits)
    a, sign = signs_of(layout, bits)
    r = a
    if not _is(p.drop, 0):
        drop = p.drop & word(layout.bits - 1)
        dropped = (one << drop) - one
        odd = ((a if _is(p.parity, 0) else a ^ p.parity) >> drop) & xp.minimum(drop, one)
        r = (a + (dropped >> one) + odd) & ~dropped
    if not _is(p.min_field, 0):
        base = p.step + (width << width)
        most = as_float(base + (xp.minimum(p.smallest, one) << width))
        total = as_float(a) + as_float(base)
        small = as_bits(xp.where(total < most, total, most) - as_float(base))
        r = xp.where(below(layout, a, p.min_field << width), small, r)
    return _finish(xp, layout, a, sign, r, p, "nearest_even")


def _finish(xp: ModuleType, layout: Layout, a: Any, sign: Any, r: Any, p: FormatParams, rounding: str) -> Any:
    """Returns magnitudes `r` flushed and limited, with infinities and NaNs as the format has them, and signs."""
    zero = layout.word(0)
    if not _is(p.flush, 0):
        r = xp.where(below(layout, r, p.flush), zero, r)
    largest = p.max if _same(p.max, p.min) else xp.where(is_negative(layout, sign), p.min, p.max)
    r = xp.where(below(layout, largest, r), _beyond(xp, layout, sign, largest, p, rounding), r)
    r = xp.where(below(layout, p.finite, a), a if _is(p.quiet, 0) else a | p.quiet, r)
    return with_sign(layout, r, sign, p)


def with_sign(layout: Layout, r: Any, sign: Any, p: FormatParams) -> Any:
    """Returns magnitudes `r` with their signs, which a zero keeps if the format has a negative one."""
    if _is(p.zero_sign, layout.sign):
        return r | sign
    # The sign bit of 0 - r is set unless r is zero.
    return r | (sign & ((layout.word(0) - r) | p.zero_sign))


def _beyond(xp: ModuleType, layout: Layout, sign: Any, largest: Any, p: FormatParams, rounding: str) -> Any:
    """Returns what is beyond the largest value becomes; a rounding directed inwards stops there."""
    if _is(p.overflow, 0):
        return largest
    rules = _RULES[rounding]
    stops = [rule in ("inward", "odd") for rule in rules]
    beyond = xp.maximum(largest, p.overflow)
    if stops[0] == stops[1]:
        return largest if stops[0] else beyond
    return xp.where(is_negative(layout, sign) == stops[1], largest, beyond)


def _is(leaf: Any, value: int) -> bool:
    """Returns whether a leaf is known to have this value."""
    return isinstance(leaf, np.generic) and int(leaf) == value


def _same(one: Any, other: Any) -> bool:
    """Returns whether two leaves are known to be equal."""
    return isinstance(one, np.generic) and isinstance(other, np.generic) and one == other

"""Rounding to bare powers of two without sign and zero (E8M0), by the kernel's rules.

What such a format does not have becomes NaN: zero, negative numbers, infinities, what rounds beyond the largest
value. Under overflow="saturate" it becomes the nearest value that there is. Positive values below the smallest
become the smallest. ml_dtypes and XLA break ties upwards, which is "nearest_away"; "nearest_even" takes the even code.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from precision_lab.formats.kernel import Draw, by_rule, rule_increment
from precision_lab.formats.params import FormatParams, Layout
from precision_lab.formats.scalar import Format, power_of_two


def round_powers(
    xp: ModuleType, layout: Layout, bits: Any, fmt: Format, action: str, rounding: str, draw: Draw | None = None
) -> Any:
    """Returns the bits of the values in `bits` rounded to `fmt`.

    Args:
      xp: numpy or jax.numpy.
      layout: the container's layout.
      bits: words of the container.
      fmt: a format without zero.
      action: what becomes of values that `fmt` does not have: "saturate"; "saturate_finite", which is that for
        finite values beyond the largest only; or anything else for NaN.
      rounding: a name of `ROUNDINGS`.
      draw: random bits for "stochastic".
    """
    word = layout.word
    width = word(layout.mantissa_bits)
    least, most = (word(layout.floor_bits(power_of_two(e))) for e in (fmt.min_exponent, fmt.max_code - fmt.bias))
    a = bits & word(layout.sign - 1)
    sign = bits ^ a
    u = _with_even_least(xp, layout, xp.maximum(a, least), least)
    dropped = word((1 << layout.mantissa_bits) - 1)
    by_code = FormatParams(*[word(0)] * len(FormatParams._fields))._replace(parity=_parity(fmt, layout))

    def increment(rule: str) -> Any:
        return rule_increment(xp, layout, rule, u, width, dropped, by_code, draw)

    r = xp.maximum((u + by_rule(xp, layout, rounding, sign, increment)) & ~dropped, least)
    outside = (sign != word(0)) | (a == word(0)) | (a == word(layout.inf))
    if action == "saturate":
        r = xp.minimum(xp.where((sign != word(0)) | (a == word(0)), least, r), most)
    else:
        # Rounded downwards a finite value never gets beyond the largest; towards odd codes it stops there.
        stops = action == "saturate_finite" or rounding in ("toward_zero", "down", "to_odd")
        r = xp.minimum(r, most) if stops else r
        r = xp.where(outside | (r > most), word(layout.nan), r)
    return xp.where(a > word(layout.inf), bits, r)


def _with_even_least(xp: ModuleType, layout: Layout, a: Any, least: np.unsignedinteger) -> Any:
    """Returns `a` >= `least` with a leading one also where the container has none, just below its normal numbers."""
    binade = layout.word(1 << layout.mantissa_bits)
    if least >= binade:
        return a
    return xp.where(a < binade, (a - least) << layout.word(1), a)


def _parity(fmt: Format, layout: Layout) -> np.unsignedinteger:
    """Returns the bit that must be flipped for a container's exponent to be odd where the code of `fmt` is."""
    field = fmt.min_exponent + layout.bias
    return layout.word((field % 2) << layout.mantissa_bits)

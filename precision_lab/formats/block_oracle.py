"""The oracle of blocks with power-of-two scales: one block at a time, in exact fractions.

It follows the specification's words: find the exponent of the scale, divide, round each element, multiply. It shares
nothing with `block_rounding` but the description of the format.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from precision_lab.formats import oracle
from precision_lab.formats.blocks import MAX_SCALE_EXPONENT, MIN_SCALE_EXPONENT, BlockFormat
from precision_lab.formats.scalar import Format, power_of_two


def scale_exponent(amax: Fraction, fmt: BlockFormat) -> int:
    """Returns the exponent of the scale of a block whose largest magnitude is `amax`.

    Source: OCP MX specification 1.0, section 6.3, for "floor", and the scale for zeros; cuBLAS documentation, "1D
      block scaling", for "rceil".
    """
    if amax == 0:
        return MIN_SCALE_EXPONENT
    largest = Fraction(fmt.element.max)
    top = oracle.floor_exponent(largest)
    exponent = {
        "floor": oracle.floor_exponent(amax) - top,
        "ceil": _ceil_exponent(amax) - top,
        "even": oracle.floor_exponent(amax + _half_last_place(amax, fmt.element)) - top,
        "rceil": _ceil_exponent(amax / largest),
    }[fmt.rule]
    return min(max(exponent, MIN_SCALE_EXPONENT), MAX_SCALE_EXPONENT)


def round_block(
    values: Sequence[Fraction],
    fmt: BlockFormat,
    *,
    rounding: str = "nearest_even",
    chances: Sequence[Fraction] | None = None,
) -> list[Fraction]:
    """Returns the values of one block (finite ones) after rounding, as exact fractions.

    `chances` decide stochastic rounding, one for each value as for `oracle.round_number`.
    """
    scale = power_of_two(scale_exponent(max(abs(value) for value in values), fmt))
    return [
        scale
        * Fraction(
            oracle.round_number(value / scale, fmt.element, rounding=rounding, overflow="saturate", chance=chance)
        )
        for value, chance in zip(values, chances or [None] * len(values), strict=True)
    ]


def _ceil_exponent(value: Fraction) -> int:
    """Returns the smallest integer e with 2**e >= value, for value > 0."""
    floor = oracle.floor_exponent(value)
    return floor if power_of_two(floor) == value else floor + 1


def _half_last_place(amax: Fraction, element: Format) -> Fraction:
    """Returns half a unit in the last place of `amax`, written with the mantissa bits of the largest element."""
    largest = Fraction(element.max)
    last_place = oracle.spacing(largest, element) if element.kind == "float" else element.step
    mantissa_bits = oracle.floor_exponent(largest) - oracle.floor_exponent(last_place)
    return power_of_two(oracle.floor_exponent(amax) - mantissa_bits - 1)

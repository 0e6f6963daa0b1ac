"""Scales of blocks, and multiplication by a power of two, on bit patterns.

A power-of-two scale is an exponent, and scaling a normal number is integer addition to its exponent field. Where a
value or a result is subnormal in float32, which XLA flushes, the bits are read as the integer they are: floats only
ever hold exact intermediate results far from the edges. No logarithm is asked for.

Words are uint32 in float32's layout, magnitudes have a clear sign bit, `codes` are those of E8M0 scales, exponent
plus 127. Everything is `jax.numpy`.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import jax.numpy as jnp
import numpy as np

from precision_lab.formats.adders import adder
from precision_lab.formats.blocks import MAX_SCALE_EXPONENT, MIN_SCALE_EXPONENT, NAN_SCALE, BlockFormat
from precision_lab.formats.containers import as_float, as_word
from precision_lab.formats.oracle import floor_exponent
from precision_lab.formats.params import FLOAT32
from precision_lab.formats.scalar import Format

_U32, _I32 = np.uint32, np.int32
_WIDTH = _U32(FLOAT32.mantissa_bits)
_MIN_NORMAL = _U32(1 << FLOAT32.mantissa_bits)
_LOW = (1 << FLOAT32.mantissa_bits) - 1
# A subnormal is an integer times 2**-149, so its exponent is that of the integer less this.
_LIFT = FLOAT32.bias - 1 + FLOAT32.mantissa_bits
# Adding this to an integer below 2**23 puts the integer into the mantissa field.
_COUNTER = np.float32(1 << FLOAT32.mantissa_bits)
_COUNTER_WORD = _U32((FLOAT32.bias + FLOAT32.mantissa_bits) << FLOAT32.mantissa_bits)


def scale_codes(amax: Any, fmt: BlockFormat) -> Any:
    """Returns the E8M0 codes of the scales of blocks whose largest magnitudes are `amax`.

    Each rule is a number added to the bits of amax before its exponent is read: what the rule rounds up carries
    into the exponent field. Subnormals are lifted by 2**149 for that, into exponent fields float32 does not have.

    Args:
      amax: words of finite magnitudes; 0 gives the smallest scale, code 0.
      fmt: block format with a power-of-two rule.

    Returns:
      uint32 like `amax`, from 0 to 254.
    """
    subnormal = as_word(amax.astype(np.float32))
    lifted = jnp.where(amax < _MIN_NORMAL, subnormal, amax + _U32(_LIFT << FLOAT32.mantissa_bits))
    field = ((lifted + _U32(_addend(fmt))) >> _WIDTH).astype(np.int32)
    codes = field - _I32(_LIFT + FLOAT32.bias + fmt.max_exponent + MIN_SCALE_EXPONENT)
    return jnp.clip(codes, _I32(0), _I32(MAX_SCALE_EXPONENT - MIN_SCALE_EXPONENT)).astype(np.uint32)


def _addend(fmt: BlockFormat) -> int:
    """Returns what the scale rule of `fmt` adds to the bits of amax."""
    if fmt.rule == "floor":
        return 0
    if fmt.rule == "ceil":
        return _LOW
    if fmt.rule == "even":
        return (1 << FLOAT32.mantissa_bits) >> (top_mantissa_bits(fmt.element) + 1)
    assert fmt.rule == "rceil", fmt.rule
    return _LOW - (FLOAT32.floor_bits(Fraction(fmt.element.max)) & _LOW)


def top_mantissa_bits(fmt: Format) -> int:
    """Returns the mantissa bits of the largest values of `fmt`; for integers those after the leading one."""
    return fmt.mantissa_bits if fmt.kind == "float" else floor_exponent(Fraction(fmt.max) / fmt.step)


def divide(a: Any, codes: Any, *, sticky: bool) -> Any:
    """Returns the magnitudes `a` divided by the scales.

    Args:
      a: words of finite magnitudes.
      codes: scales, broadcast against `a`.
      sticky: what becomes of quotients below float32's normal numbers, where every element format has only zero.
        False makes them any number below 2**-125, which rounds to nearest as zero does; True makes them positive
        unless `a` is zero, as directed roundings need.

    Returns:
      Words; the quotients are exact otherwise.
    """
    signed = codes.astype(np.int32)
    bound = jnp.maximum(signed + _I32(MIN_SCALE_EXPONENT + 1), _I32(1)) << _I32(_WIDTH)
    # 2**-149 over the scale; 0 for scales under which no subnormal is worth anything.
    field = jnp.maximum(_I32(FLOAT32.bias - _LIFT - MIN_SCALE_EXPONENT) - signed, _I32(0))
    unit = as_float(field.astype(np.uint32) << _WIDTH)
    integer = a.astype(np.int32)
    small = as_word(integer.astype(np.float32) * unit)
    quotient = jnp.where(integer < bound, small, a - ((codes + _U32(1 << 9) - _U32(-MIN_SCALE_EXPONENT)) << _WIDTH))
    return jnp.maximum(quotient, jnp.minimum(a, _U32(1))) if sticky else quotient


def multiply(words: Any, codes: Any) -> Any:
    """Returns finite elements times the scales; NaN under a NaN scale. Exact where float32 has the product.

    Magnitudes are 0 or at least 2**-22, as those of every element are.
    """
    a = words & _U32(FLOAT32.sign - 1)
    signed = codes.astype(np.int32)
    bound = jnp.maximum((_I32(1 - MIN_SCALE_EXPONENT) - signed) << _I32(_WIDTH), _I32(1))
    # 2**149 times the scale makes integers of subnormal products; for larger scales only zero is asked for.
    unit = as_float(jnp.minimum(codes + _U32(_LIFT), _U32(254)) << _WIDTH)
    small = as_word(as_float(a) * unit + _COUNTER) - _COUNTER_WORD
    product = a + ((codes + _U32(1 << 9) - _U32(-MIN_SCALE_EXPONENT)) << _WIDTH)
    product = jnp.where(a.astype(np.int32) < bound, small, product)
    nan = jnp.where(codes == _U32(NAN_SCALE), _U32(FLOAT32.nan), _U32(0))
    return product | (words ^ a) | nan


def has_fast_path(fmt: Format) -> bool:
    """Returns whether `round_scaled` is exact for `fmt`."""
    largest = floor_exponent(Fraction(fmt.max)) + 2 + FLOAT32.mantissa_bits
    return 0 < fmt.mantissa_bits < FLOAT32.mantissa_bits and largest < FLOAT32.bias and fmt.min_exponent > -100


def direct_exponents(fmt: Format) -> tuple[int, int]:
    """Returns the least and greatest exponents of scales under which `round_scaled` may leave the scale applied.

    Between them no value that rounds to more than zero is subnormal in float32, and no power that is added overflows.
    """
    lowest = 2 - FLOAT32.bias - fmt.min_exponent + fmt.mantissa_bits
    return lowest, FLOAT32.bias - 3 - FLOAT32.mantissa_bits - floor_exponent(Fraction(fmt.max))


def round_scaled(words: Any, fmt: Format, largest: Any | None = None, *, shift: Any = 0) -> Any:
    """Returns float32 words rounded to the nearest value of `fmt`, ties to even, saturating, where `has_fast_path`.

    By an addition, as `adders` says. Faster than the kernel, whose values reach so far that the power would overflow;
    values divided by their scale do not.

    Args:
      words: values with at most the exponent of the largest result, as a scale leaves them; NaN gives any number.
      fmt: format of the elements.
      largest: words of the largest magnitudes wanted, which are values of `fmt`; None means those of `fmt`.
      shift: exponents of scales that are still on the values and stay, in the place of the exponent field; within
        `direct_exponents`.
    """
    a, shift = words & _U32(FLOAT32.sign - 1), jnp.asarray(shift, np.uint32)
    sign = words ^ a
    limit: Any = _U32(FLOAT32.floor_bits(Fraction(fmt.max)))
    if fmt.specials == "full":
        limit = jnp.where(sign == _U32(0), limit, _U32(FLOAT32.floor_bits(-fmt.lowest)))
    limit = (limit if largest is None else jnp.minimum(limit, largest)) + shift
    m = jnp.minimum(a, limit)
    power = adder(FLOAT32, m, fmt, shift=shift)
    total = as_float(m) + power
    if fmt.kind == "int" and shift.ndim == 0:
        # The power is a constant c, and XLA makes (m + c) - c into m unless something stands in between.
        total = jnp.minimum(total, as_float(limit) + power)
    rounded = as_word(total - power)
    return rounded | sign if fmt.has_negative_zero else jnp.where(rounded == _U32(0), rounded, rounded | sign)

"""Codes of elements on bit patterns, traceable: the same codes as `codes.encode`, for words already on the grid."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from precision_lab.formats.params import FLOAT32
from precision_lab.formats.scalar import Format

_U32 = np.uint32
_WIDTH = _U32(FLOAT32.mantissa_bits)


def codes_of(xp: ModuleType, words: Any, fmt: Format) -> Any:
    """Returns the codes of float32 words, as uint8 or uint16.

    Args:
      xp: numpy or jax.numpy.
      words: finite values of `fmt`, or NaN where `fmt` has one.
      fmt: format of at most 16 bits whose normal numbers are normal in float32.
    """
    a = words & _U32(FLOAT32.sign - 1)
    negative = words >> _U32(31)
    e = xp.maximum(a >> _WIDTH, _U32(1))
    m = a - ((e - _U32(1)) << _WIDTH)
    field = xp.maximum(e, _min_field(fmt))
    dropped = xp.minimum(_drop(fmt) + (field - e), _U32(31))
    # A normal number's leading one adds one to the exponent field.
    codes = (m >> dropped) + ((field - _min_field(fmt)) << _U32(fmt.mantissa_bits))
    if fmt.kind == "int":
        codes = xp.where(negative == _U32(1), _U32(0) - codes, codes) & _U32((1 << fmt.bits) - 1)
    else:
        codes = codes | (negative << _U32(fmt.bits - 1))
    if fmt.nan_code is not None:
        codes = xp.where(a > _U32(FLOAT32.inf), _U32(fmt.nan_code), codes)
    return codes.astype(np.uint8 if fmt.bits <= 8 else np.uint16)


def words_of(xp: ModuleType, codes: Any, fmt: Format, as_word: Any) -> Any:
    """Returns the float32 words of codes, specials included; the inverse of `codes_of`.

    Args:
      xp: numpy or jax.numpy.
      codes: unsigned integers.
      fmt: as for `codes_of`.
      as_word: function from floats to words of the same bits.
    """
    codes = codes.astype(np.uint32)
    top = _U32(1 << (fmt.bits - 1))
    negative = codes & top
    if fmt.kind == "int":
        magnitude = xp.where(negative == top, _U32(0) - codes, codes) & _U32((top << 1) - 1)
    else:
        magnitude = codes ^ negative
    mantissa = _U32(fmt.mantissa_bits)
    normal = (magnitude << _drop(fmt)) + ((_min_field(fmt) - _U32(1)) << _WIDTH)
    # An integer's bits less the exponent of the step are those of the integer times the step.
    step_exponent = fmt.min_exponent - fmt.mantissa_bits
    steps = as_word(magnitude.astype(np.float32)) - _U32(-step_exponent % (1 << 9) << FLOAT32.mantissa_bits)
    words = xp.where(magnitude >> mantissa == _U32(0), xp.where(magnitude == _U32(0), magnitude, steps), normal)
    if fmt.has_nan or fmt.has_inf:
        words = xp.where(magnitude > _U32(fmt.max_code), _U32(FLOAT32.nan), words)
    if fmt.inf_code is not None:
        words = xp.where(magnitude == _U32(fmt.inf_code), _U32(FLOAT32.inf), words)
    words = words | (negative << _U32(32 - fmt.bits))
    if fmt.has_nan and not fmt.has_negative_zero:
        words = xp.where(codes == top, _U32(FLOAT32.nan), words)
    return words


def _drop(fmt: Format) -> np.uint32:
    """Returns the mantissa bits of float32 that `fmt` does not have."""
    return _U32(FLOAT32.mantissa_bits - fmt.mantissa_bits)


def _min_field(fmt: Format) -> np.uint32:
    """Returns float32's exponent field of the smallest normal number of `fmt`."""
    return _U32(fmt.min_exponent + FLOAT32.bias)

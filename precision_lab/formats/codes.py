"""Codes: the integers that stand for a format's values, and back. NumPy only, every code of every format.

The code of a float is its sign, exponent and mantissa fields from high to low; that of an integer its two's
complement. Both are what ml_dtypes stores, where it has the format.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import ml_dtypes
import numpy as np

from precision_lab.formats.kernel import round_bits
from precision_lab.formats.options import check_rounding
from precision_lab.formats.params import FLOAT64
from precision_lab.formats.scalar import Format

_MAX_BITS = 16


def encode(x: Any, fmt: Format, *, rounding: str = "nearest_even", overflow: str | None = None) -> np.ndarray:
    """Returns the codes of `x` in `fmt`, after rounding.

    Args:
      x: real array of any dtype float64 holds exactly; infinities and NaNs included.
      fmt: format of at most 16 bits.
      rounding: as for `round_to`.
      overflow: as for `round_to`.

    Returns:
      uint8 array shaped like `x`, or uint16 for formats of more than 8 bits, with unused high bits zero. NaNs become
      the format's quiet NaN and lose sign and payload.

    Raises:
      TypeError: `x` is not real.
      ValueError: a NaN in a format that has none, or a format of more than 16 bits.
    """
    _check_size(fmt)
    check_rounding(rounding)
    values = _as_float64(x)
    if np.isnan(values).any() and not fmt.has_nan:
        count = int(np.isnan(values).sum())
        raise ValueError(f"{fmt.name} has no NaN, but {count} of {values.size} values are NaN; replace them first.")
    params = fmt.params(overflow=overflow, container=np.float64)
    bits = round_bits(np, FLOAT64, np.atleast_1d(values).view(np.uint64), params, rounding).reshape(values.shape)
    codes = _int_codes(bits, fmt) if fmt.kind == "int" else _float_codes(bits, fmt)
    return codes.astype(_code_dtype(fmt))


def decode(codes: Any, fmt: Format) -> np.ndarray:
    """Returns the values that `codes` stand for, as float64, which is exact for every format.

    Args:
      codes: integers from 0 to 2**bits - 1, any shape; or an array stored in `fmt.dtype`, whose values are returned.
      fmt: format of at most 16 bits.

    Raises:
      TypeError: `codes` are not integers.
      ValueError: an integer that is no code of `fmt`, or a format of more than 16 bits.
    """
    _check_size(fmt)
    array = np.asarray(codes)
    if fmt.dtype is not None and array.dtype == fmt.dtype:
        if fmt.kind == "float":
            return _widened(array)
        array = array.astype(np.int64) & ((1 << fmt.bits) - 1)
    if not np.issubdtype(array.dtype, np.integer):
        raise TypeError(f"codes of {fmt.name} are integers, got {array.dtype} {array.shape}.")
    if array.size and not (int(array.min()) >= 0 and int(array.max()) < 1 << fmt.bits):
        low, high = int(array.min()), int(array.max())
        raise ValueError(f"codes of {fmt.name} lie in [0, {(1 << fmt.bits) - 1}], got values from {low} to {high}.")
    unused = 1 << fmt.mantissa_bits
    if fmt.kind == "int" and (array == unused).any():
        raise ValueError(f"code {unused:#x} is not used by {fmt.name}, whose range is symmetric.")
    return _table(fmt)[array]


def grid(fmt: Format) -> np.ndarray:
    """Returns every finite value in ascending order as float64, zero once; for formats of at most 16 bits."""
    _check_size(fmt)
    positive = _table(fmt)[: fmt.max_code + 1]
    return np.concatenate([-positive[:0:-1], positive])


def _check_size(fmt: Format) -> None:
    """Refuses formats too wide for a table of their codes."""
    if fmt.bits > _MAX_BITS:
        stored = f"; use NumPy's view of dtype {fmt.dtype.name}" if fmt.dtype is not None else ""
        raise ValueError(f"codes are for formats of at most {_MAX_BITS} bits, {fmt.name} has {fmt.bits}{stored}.")


def _as_float64(x: Any) -> np.ndarray:
    """Returns `x` as a float64 array; raises TypeError if that could change a value."""
    array = np.asarray(x)
    holds = array.dtype.itemsize <= 8 and (array.dtype.kind in "fiu" or _is_ml_dtype(array.dtype))
    if not holds:
        raise TypeError(f"encode expects real values that float64 holds, got {array.dtype} {array.shape}.")
    return _widened(array)


def _is_ml_dtype(dtype: np.dtype) -> bool:
    """Returns whether `dtype` is one of the real dtypes of ml_dtypes, whose kind is that of raw bytes."""
    return dtype.kind == "V" and dtype.fields is None and getattr(ml_dtypes, dtype.name, None) is not None


def _widened(array: np.ndarray) -> np.ndarray:
    """Returns `array` as float64; NumPy warns of signalling NaNs, which are as good as others here."""
    with np.errstate(invalid="ignore"):
        return array.astype(np.float64)


def _code_dtype(fmt: Format) -> type[np.unsignedinteger]:
    """Returns the smallest unsigned integer that holds a code."""
    return np.uint8 if fmt.bits <= 8 else np.uint16


def _int_codes(bits: np.ndarray, fmt: Format) -> np.ndarray:
    """Returns the two's complement of the float64 integers in `bits`."""
    steps = bits.view(np.float64) / fmt.min_subnormal
    return steps.astype(np.int64) & ((1 << fmt.bits) - 1)


def _float_codes(bits: np.ndarray, fmt: Format) -> np.ndarray:
    """Returns the fields of the float64 values in `bits`, which are on the grid of `fmt`."""
    width = FLOAT64.mantissa_bits
    a = (bits & np.uint64(FLOAT64.sign - 1)).astype(np.int64)
    rebias = (fmt.min_exponent + FLOAT64.bias - 1) << width
    normal = (a - rebias) >> (width - fmt.mantissa_bits)
    finite = np.where(a <= FLOAT64.inf - 1, a, 0).view(np.float64)
    subnormal = np.where(finite < fmt.min_normal, finite, 0) / fmt.min_subnormal
    codes = np.where(finite < fmt.min_normal, subnormal.astype(np.int64), normal)
    if fmt.inf_code is not None:
        codes = np.where(a == FLOAT64.inf, fmt.inf_code, codes)
    codes |= (bits >> np.uint64(63)).astype(np.int64) << (fmt.bits - 1)
    return codes if fmt.nan_code is None else np.where(a > FLOAT64.inf, fmt.nan_code, codes)


@lru_cache(maxsize=64)
def _table(fmt: Format) -> np.ndarray:
    """Returns the value of every code, as a read-only float64 array."""
    half = 1 << (fmt.bits - 1)
    if fmt.kind == "int":
        steps = np.arange(2 * half, dtype=np.int64)
        table = np.where(steps < half, steps, steps - 2 * half) * fmt.min_subnormal
    else:
        positive = _positive_values(fmt, half)
        negative = -positive
        if not fmt.has_negative_zero:
            negative[0] = np.nan
        table = np.concatenate([positive, negative])
    table.flags.writeable = False
    return table


def _positive_values(fmt: Format, count: int) -> np.ndarray:
    """Returns the values of the codes 0 to count - 1 of a float format, specials included."""
    codes = np.arange(count, dtype=np.uint64)
    rebias = np.uint64(fmt.min_exponent + FLOAT64.bias - 1) << np.uint64(FLOAT64.mantissa_bits)
    normal = ((codes << np.uint64(FLOAT64.mantissa_bits - fmt.mantissa_bits)) + rebias).view(np.float64)
    values = np.where(codes >> np.uint64(fmt.mantissa_bits), normal, codes * np.float64(fmt.min_subnormal))
    values[fmt.max_code + 1 :] = np.nan
    if fmt.has_inf:
        values[fmt.max_code + 1] = np.inf
    return values

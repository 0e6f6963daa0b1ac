"""Codes: the integers that stand for a format's values, and back, for NumPy arrays and inside JAX.

The code of a float is its sign, exponent and mantissa fields from high to low; that of an integer its two's
complement. Both are what ml_dtypes stores, where it has the format. JAX arrays, traced or not, give JAX arrays.
"""

from __future__ import annotations

import sys
from functools import lru_cache
from types import ModuleType
from typing import Any

import ml_dtypes
import numpy as np

from precision_lab.formats.kernel import round_bits
from precision_lab.formats.options import check_rounding, overflow_action
from precision_lab.formats.params import FLOAT64, Layout, make_params
from precision_lab.formats.powers import round_powers
from precision_lab.formats.scalar import Format

_MAX_BITS = 16


def is_jax(x: Any) -> bool:
    """Returns whether `x` is a JAX array or tracer, without importing JAX."""
    jax = sys.modules.get("jax")
    return jax is not None and isinstance(x, jax.Array)


def encode(x: Any, fmt: Format, *, rounding: str = "nearest_even", overflow: str | None = None, **options: Any) -> Any:
    """Returns the codes of `x` in `fmt`, after rounding.

    Args:
      x: real array of any dtype float64 holds exactly; infinities and NaNs included. A JAX array is floating, as for
        `round_to`.
      fmt: format of at most 16 bits.
      rounding: as for `round_to`.
      overflow: as for `round_to`.
      **options: others of `round_to`, for JAX arrays only.

    Returns:
      uint8 array shaped like `x`, or uint16 for formats of more than 8 bits, with unused high bits zero. NaNs become
      the format's quiet NaN and lose sign and payload; in JAX, where nothing can be raised, they become zero in a
      format that has none.

    Raises:
      TypeError: `x` is not real.
      ValueError: a NaN in a format that has none, or a format of more than 16 bits.
    """
    _check_size(fmt)
    if is_jax(x):
        from precision_lab.formats.traced_codes import encode_array

        return encode_array(x, fmt, rounding=rounding, overflow=overflow, **options)
    if options:
        raise ValueError(f"encode takes {', '.join(options)} for JAX arrays only, got {type(x).__name__}.")
    check_rounding(rounding)
    values = _as_float64(x)
    if np.isnan(values).any() and not fmt.has_nan:
        count = int(np.isnan(values).sum())
        raise ValueError(f"{fmt.name} has no NaN, but {count} of {values.size} values are NaN; replace them first.")
    bits = _rounded(np.atleast_1d(values).view(np.uint64), fmt, rounding, overflow)
    return codes_of_bits(np, FLOAT64, bits, fmt).astype(code_dtype(fmt)).reshape(values.shape)


def _rounded(bits: np.ndarray, fmt: Format, rounding: str, overflow: str | None) -> np.ndarray:
    """Returns the bits of float64 values rounded to `fmt`."""
    if not fmt.has_zero:
        return round_powers(np, FLOAT64, bits, fmt, overflow_action(fmt, overflow), rounding)
    params = make_params(fmt, overflow=overflow, subnormals="keep", container=np.float64)
    return round_bits(np, FLOAT64, bits, params, rounding)


def decode(codes: Any, fmt: Format) -> Any:
    """Returns the values that `codes` stand for.

    Args:
      codes: integers from 0 to 2**bits - 1, any shape; or an array stored in `fmt.dtype`, whose values are returned.
      fmt: format of at most 16 bits.

    Returns:
      float64, which is exact for every format; for JAX arrays of codes the narrowest of float32 and float64 that
      is. There, what is no code gives NaN.

    Raises:
      TypeError: `codes` are not integers.
      ValueError: an integer that is no code of `fmt`, or a format of more than 16 bits.
    """
    _check_size(fmt)
    if is_jax(codes):
        from precision_lab.formats.traced_codes import decode_array

        return decode_array(codes, fmt)
    array = np.asarray(codes)
    if fmt.dtype is not None and array.dtype == fmt.dtype:
        if fmt.kind == "float":
            return _widened(array)
        array = array.astype(np.int64) & ((1 << fmt.bits) - 1)
    if not _is_integer(array.dtype):
        raise TypeError(f"codes of {fmt.name} are integers, got {array.dtype} {array.shape}.")
    array = array.astype(np.int64)
    if array.size and not (int(array.min()) >= 0 and int(array.max()) < 1 << fmt.bits):
        low, high = int(array.min()), int(array.max())
        raise ValueError(f"codes of {fmt.name} lie in [0, {(1 << fmt.bits) - 1}], got values from {low} to {high}.")
    unused = 1 << fmt.mantissa_bits
    if fmt.specials == "narrow" and (array == unused).any():
        raise ValueError(f"code {unused:#x} is not used by {fmt.name}, whose range is symmetric.")
    return table(fmt)[array]


def grid(fmt: Format) -> np.ndarray:
    """Returns every finite value in ascending order as float64, zero once; for formats of at most 16 bits."""
    _check_size(fmt)
    positive = table(fmt)[: fmt.max_code + 1]
    if not fmt.signed:
        return positive.copy()
    lowest = [fmt.min] if fmt.specials == "full" else []
    return np.concatenate([lowest, -positive[:0:-1], positive])


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


def _is_integer(dtype: np.dtype) -> bool:
    """Returns whether `dtype` is an integer of NumPy or ml_dtypes."""
    return dtype.kind in "iu" or (_is_ml_dtype(dtype) and "int" in dtype.name)


def _widened(array: np.ndarray) -> np.ndarray:
    """Returns `array` as float64; NumPy warns of signalling NaNs, which are as good as others here."""
    with np.errstate(invalid="ignore"):
        return array.astype(np.float64)


def code_dtype(fmt: Format) -> type[np.unsignedinteger]:
    """Returns the smallest unsigned integer that holds a code."""
    return np.uint8 if fmt.bits <= 8 else np.uint16


def codes_of_bits(xp: ModuleType, layout: Layout, bits: Any, fmt: Format) -> Any:
    """Returns the codes of the values in `bits`, which are on the grid of `fmt`, as words of the container."""
    word = layout.word
    a = bits & word(layout.sign - 1)
    negative = (bits ^ a) >> word(layout.bits - 1)
    if fmt.kind == "int":
        steps = _steps(xp, layout, a, fmt)
        codes = xp.where(negative == word(1), word(0) - steps, steps) & word((1 << fmt.bits) - 1)
        return xp.where(a > word(layout.inf), word(0), codes)
    codes = _magnitude_codes(xp, layout, a, fmt) | (negative << word(fmt.bits - 1) if fmt.signed else word(0))
    return xp.where(a > word(layout.inf), word(fmt.nan_code or 0), codes)


def _steps(xp: ModuleType, layout: Layout, a: Any, fmt: Format) -> Any:
    """Returns how many times the format's step the magnitudes `a` are: their significand without its low zeros."""
    word = layout.word
    one, width = word(1), word(layout.mantissa_bits)
    e = xp.maximum(a >> width, one)
    top = word(fmt.min_exponent + layout.bias + layout.mantissa_bits - fmt.mantissa_bits)
    # Magnitudes beyond the equally spaced ones are not asked for; the shift is kept within the word for them.
    return (a - ((e - one) << width)) >> ((top - e) & word(layout.bits - 1))


def _magnitude_codes(xp: ModuleType, layout: Layout, a: Any, fmt: Format) -> Any:
    """Returns exponent and mantissa fields of the magnitudes `a`, which are values of a float format."""
    word, lowest = layout.word, fmt.min_exponent + layout.bias
    if not fmt.has_zero:
        return (a >> word(layout.mantissa_bits)) - word(lowest)
    shifted = a >> word(layout.mantissa_bits - fmt.mantissa_bits)
    normal = shifted - word((lowest - 1) << fmt.mantissa_bits)
    codes = xp.where(a < word(lowest << layout.mantissa_bits), _steps(xp, layout, a, fmt), normal)
    return codes if fmt.inf_code is None else xp.where(a == word(layout.inf), word(fmt.inf_code), codes)


@lru_cache(maxsize=64)
def table(fmt: Format) -> np.ndarray:
    """Returns the value of every code, NaN for one that is not used, as a read-only float64 array."""
    half = 1 << (fmt.bits - int(fmt.signed))
    if fmt.kind == "int":
        steps = np.arange(1 << fmt.bits, dtype=np.int64)
        values = np.where(steps < half, steps, steps - 2 * half) * fmt.min_subnormal
        if fmt.specials == "narrow":
            values[half] = np.nan
    else:
        values = _positive_values(fmt, half)
    if fmt.kind == "float" and fmt.signed:
        negative = -values
        if not fmt.has_negative_zero:
            negative[0] = np.nan
        values = np.concatenate([values, negative])
    values.flags.writeable = False
    return values


def _positive_values(fmt: Format, count: int) -> np.ndarray:
    """Returns the values of the codes 0 to count - 1 of a float format, specials included."""
    codes = np.arange(count, dtype=np.uint64)
    field_of_code_0 = fmt.min_exponent + FLOAT64.bias - int(fmt.has_zero)
    normal = codes << np.uint64(FLOAT64.mantissa_bits - fmt.mantissa_bits)
    normal = (normal + (np.uint64(field_of_code_0) << np.uint64(FLOAT64.mantissa_bits))).view(np.float64)
    is_subnormal = (codes >> np.uint64(fmt.mantissa_bits) == 0) & fmt.has_zero
    values = np.where(is_subnormal, codes * np.float64(fmt.min_subnormal), normal)
    values[fmt.max_code + 1 :] = np.nan
    if fmt.has_inf:
        values[fmt.max_code + 1] = np.inf
    return values

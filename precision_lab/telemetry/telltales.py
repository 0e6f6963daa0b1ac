"""Tell-tales: what the bits of a stored array give away about where it has been.

The one heuristic here, that bits were read as the wrong 16-bit type, rests on how weights and gradients are spread:
their density is smooth at zero, so each binade below the median has half as many values as the one above. Read as
float16, the three lowest exponent bits of a bfloat16 become mantissa, eight binades become one, and hardly a value is
left far below the median; everything is finite, and no count of NaNs can see it. The other way round one binade becomes
eight, and the values are tiny.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np

from precision_lab import formats
from precision_lab.telemetry.census import Fit

_FEWEST = 512
_TINY = 2.0**-24
SIXTEEN_BITS = {"bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}


def misread_as(x: np.ndarray) -> str | None:
    """Returns the 16-bit type whose bits an array seems to hold under the name of another one, None for no sign of it.

    Args:
      x: float16 or bfloat16; or 16-bit integers or records without a type, as which files may keep them.
    """
    if x.dtype.itemsize != 2 or x.size < _FEWEST:
        return None
    readings = {name: np.abs(_values(x, name)) for name in SIXTEEN_BITS if name != x.dtype.name}
    likely = [name for name, read in readings.items() if _both_signs(x) and _is_smooth_at_zero(read)]
    if len(likely) != 1 or (x.dtype.name in SIXTEEN_BITS and not _is_out_of_shape(x)):
        return None
    return likely[0]


def _values(x: np.ndarray, name: str) -> np.ndarray:
    """Returns the bits of an array read as a type, as float32."""
    return np.ascontiguousarray(x).view(SIXTEEN_BITS[name]).astype(np.float32).ravel()


def _both_signs(x: np.ndarray) -> bool:
    """Returns whether between a tenth and nine tenths of the sign bits are set."""
    return 0.1 < float(np.mean(np.ascontiguousarray(x).view(np.uint16) >> 15)) < 0.9


def _is_out_of_shape(x: np.ndarray) -> bool:
    """Returns whether the values, as what the dtype says they are, are spread as no weights or gradients are."""
    read = np.abs(_values(x, x.dtype.name))
    given = read[np.isfinite(read) & (read > 0)]
    if given.size < _FEWEST:
        return False
    middle = float(np.median(given))
    if x.dtype.name == "float16":
        return _share_below(given, middle / 8) < 0.005
    return middle < _TINY and _share_below(given, middle / 8) > 0.2


def _is_smooth_at_zero(read: np.ndarray) -> bool:
    """Returns whether magnitudes halve from binade to binade below their median, as a smooth density at zero has it.

    For a normal, a uniform and a Laplace distribution the shares below a quarter, an eighth and a sixteenth of the
    median are 0.13, 0.067 and 0.034; 0.125, 0.063, 0.031; and 0.16, 0.083, 0.042.
    """
    given = read[read > 0]
    if given.size < _FEWEST or not np.all(np.isfinite(given)):
        return False
    middle = float(np.median(given))
    quarter, eighth, sixteenth = (_share_below(given, middle / n) for n in (4, 8, 16))
    return 0.02 < eighth < 0.15 and 1.4 * eighth < quarter < 2.8 * eighth and 1.4 < eighth / max(sixteenth, 1e-9) < 2.8


def _share_below(magnitudes: np.ndarray, limit: float) -> float:
    return float(np.mean(magnitudes < limit))


def constant(x: np.ndarray) -> float | None:
    """Returns the one value that all of an array's elements have, None if they differ or there is only one."""
    if x.size < 2:
        return None
    flat = x.ravel()
    return float(flat[0]) if bool(np.all(flat == flat[0])) else None


def whole_numbers(x: np.ndarray) -> tuple[int, int] | None:
    """Returns the smallest and the largest of values that are all whole numbers, None if one is not or all are equal.

    Beyond 2**24 every float32 is whole, so that larger numbers tell nothing.
    """
    if x.size < 2 or constant(x) is not None:
        return None
    values = np.asarray(x, np.float64).ravel()
    if not np.all(np.isfinite(values)) or np.max(np.abs(values)) > 2.0**24 or np.any(values != np.rint(values)):
        return None
    return int(np.min(values)), int(np.max(values))


def narrower(x: np.ndarray, fits: tuple[Fit, ...]) -> str | None:
    """Returns the 16-bit type that holds every value of a wider array, though few values are so round by chance."""
    held = [fit.format for fit in fits if fit.changed == 0 and fit.format in SIXTEEN_BITS]
    if x.dtype.itemsize <= 2 or not held or whole_numbers(x) is not None or constant(x) is not None:
        return None
    return held[0] if len(np.unique(x.ravel()[: 1 << 16])) >= 16 else None


def is_record(dtype: np.dtype) -> bool:
    """Returns whether a dtype is of bytes without a type, which is what NumPy writes for those of ml_dtypes."""
    return dtype.kind == "V" and dtype.names is None and dtype.name.startswith("void")


FORMATS_OF_TELLTALES = tuple(formats.format(name) for name in SIXTEEN_BITS)
"""What `narrower` needs the fits of."""

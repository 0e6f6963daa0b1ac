"""What became of an array between two checkpoints: cast, read as another type, sent through fewer bits, or trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np

from precision_lab import formats
from precision_lab.formats import Format
from precision_lab.telemetry.census import is_floating, rounded, widened
from precision_lab.telemetry.telltales import SIXTEEN_BITS

SAME, VALUES, CAST, REINTERPRETED, THROUGH, SHAPE = "same", "values", "cast", "reinterpreted", "through", "shape"


@dataclass(frozen=True)
class Change:
    """How an array differs from an earlier one of the same path.

    Attributes:
      kind: "same"; "values" differ; "cast" to another dtype, and nothing else; "reinterpreted", the same bits under
        another dtype; "through" a narrower format and back; "shape" differs, and nothing is counted.
      before, after: the dtypes.
      changed: how many values differ; NaNs equal each other.
      overflowed: finite values that are not finite any more.
      zeroed: non-zero values that are zero now.
      max_rel: largest difference, relative to the earlier value, of those finite in both; 0 if none changed.
      via: of "through", the format.
    """

    kind: str
    before: str
    after: str
    changed: int = 0
    overflowed: int = 0
    zeroed: int = 0
    max_rel: float = 0.0
    via: str = ""


def change(before: np.ndarray, after: np.ndarray) -> Change:
    """Returns how two arrays differ; of what is not real numbers only whether the bytes do."""
    names = before.dtype.name, after.dtype.name
    if before.shape != after.shape:
        return Change(SHAPE, *names)
    if not (is_real(before.dtype) and is_real(after.dtype)):
        same = before.tobytes() == after.tobytes()
        return Change((SAME if names[0] == names[1] else REINTERPRETED) if same else VALUES, *names)
    differ = _differ(before, after)
    counts = int(np.sum(differ)), *_lost(before, after), _max_rel(before, after)
    if names[0] != names[1]:
        return Change(_kind_of_cast(before, after, counts[0]), *names, *counts)
    if not counts[0]:
        return Change(SAME, *names)
    via = _through(before, after)
    return Change(THROUGH if via else VALUES, *names, *counts, via=via)


def is_real(dtype: np.dtype) -> bool:
    """Returns whether a dtype is of real numbers or truth values, NumPy's own or of ml_dtypes."""
    return dtype.kind in "iub" or is_floating(dtype) or jnp.issubdtype(dtype, jnp.integer)


def _differ(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns where two arrays have different values, exactly."""
    if a.dtype.kind in "iub" and b.dtype.kind in "iub":
        return a != b
    if _is_long(a.dtype) or _is_long(b.dtype):
        return _differ_from_long(a, b) if _is_long(a.dtype) else _differ_from_long(b, a)
    x, y = _wide(a), _wide(b)
    return (x != y) & ~(np.isnan(x) & np.isnan(y))


def _is_long(dtype: np.dtype) -> bool:
    """Returns whether a dtype is of integers that float64 has not all of."""
    return dtype.kind in "iu" and dtype.itemsize == 8


def _differ_from_long(whole: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Returns where 64-bit integers and other numbers differ; compared as integers, since float64 would round them."""
    info, real = np.iinfo(whole.dtype), _wide(other)
    possible = (real >= float(info.min)) & (real < float(info.max + 1)) & (real == np.trunc(real))
    return ~possible | (np.where(possible, real, 0).astype(whole.dtype) != whole)


def _wide(x: np.ndarray) -> np.ndarray:
    """Returns the same values in float64; those that it would round in NumPy's long double, where that is wider."""
    return x.astype(np.longdouble if x.dtype.itemsize > 8 or _is_long(x.dtype) else np.float64)


def _lost(before: np.ndarray, after: np.ndarray) -> tuple[int, int]:
    """Returns how many finite values are no longer finite, and how many non-zero ones are zero."""
    x, y = _wide(before), _wide(after)
    return int(np.sum(np.isfinite(x) & ~np.isfinite(y))), int(np.sum((x != 0) & (y == 0)))


def _max_rel(before: np.ndarray, after: np.ndarray) -> float:
    """Returns the largest relative difference."""
    x, y = _wide(before), _wide(after)
    known = np.isfinite(x) & np.isfinite(y) & (x != 0)
    with np.errstate(over="ignore"):
        return float(np.max(np.abs(y[known] - x[known]) / np.abs(x[known]), initial=0))


def _kind_of_cast(before: np.ndarray, after: np.ndarray, changed: int) -> str:
    """Returns whether another dtype came by a cast, by reading the same bits, or with other values."""
    if not changed:
        return CAST
    if before.dtype.itemsize == after.dtype.itemsize and before.tobytes() == after.tobytes():
        return REINTERPRETED
    both = is_floating(before.dtype) and is_floating(after.dtype) and after.dtype.itemsize <= 8
    return CAST if both and _is_rounded(before, after, formats.format(after.dtype)) else VALUES


def _is_rounded(before: np.ndarray, after: np.ndarray, fmt: Any) -> bool:
    """Returns whether the later values are the earlier ones rounded to a format."""
    if not isinstance(fmt, Format):
        return False
    expected, found = _nearest(before, fmt).astype(np.float64), widened(after).astype(np.float64)
    # What overflows becomes infinite, NaN or the largest value, as whoever cast it chose.
    over = ~np.isfinite(expected) | (np.abs(_wide(before)) > fmt.max)
    return bool(np.all((expected == found) | over | (np.isnan(expected) & np.isnan(found))))


def _through(before: np.ndarray, after: np.ndarray) -> str:
    """Returns the 16-bit format that values went through and came back from; empty for none."""
    if not is_floating(after.dtype) or after.dtype.itemsize <= 2:
        return ""
    return next((name for name in SIXTEEN_BITS if _is_rounded_to(before, after, formats.format(name))), "")


def _is_rounded_to(before: np.ndarray, after: np.ndarray, fmt: Any) -> bool:
    """Returns whether the later values are the earlier ones rounded to a format, what overflows included."""
    return not np.any(_differ(_nearest(before, fmt), after))


def _nearest(x: np.ndarray, fmt: Format) -> np.ndarray:
    """Returns values on the grid of a format with a dtype; of long doubles, which JAX has not, by NumPy's cast."""
    if x.dtype.itemsize <= 8:
        return rounded(x, fmt)
    with np.errstate(over="ignore"):
        return x.astype(fmt.dtype)

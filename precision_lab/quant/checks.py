"""What `fake_quantize` and `quantize` refuse of their arguments, in one place, so that both refuse the same."""

from __future__ import annotations

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from precision_lab.quant.core import Given
from precision_lab.quant.granularity import contracted
from precision_lab.quant.quantizer import Quantizer
from precision_lab.quant.tiles import Tiles

ON_NONFINITE = ("nan", "raise")


def checked(x: Any, qz: Quantizer, key: Any, given: Given) -> tuple[jax.Array, Given]:
    """Returns the array and what is given with it, if they fit the quantizer."""
    dtype = getattr(x, "dtype", None)
    if dtype is None or np.dtype(dtype).name not in ("float16", "bfloat16", "float32"):
        came = type(x).__name__ if dtype is None else f"{dtype} {np.shape(x)}"
        raise TypeError(f"quantizers take float16, bfloat16 or float32 arrays, got {came}; say x.astype(jnp.float32).")
    x = jnp.asarray(x)
    _check_given(qz, key, given)
    if _refuses_negative(qz, given) and not isinstance(x, jax.core.Tracer) and x.size:
        values = np.asarray(x, np.float32)  # a captured array has values under a trace too, where jnp would trace
        if np.any(values < 0):
            raise ValueError(
                f"{qz!r} has no negative values, but the smallest of {x.shape} is {values.min():g}. Say 'affine', or a "
                "signed format."
            )
    return x, given


def refuse_nonfinite(x: Any, on_nonfinite: str) -> None:
    """Raises for NaNs and infinities if that is asked for."""
    if on_nonfinite not in ON_NONFINITE:
        raise ValueError(f"on_nonfinite={on_nonfinite!r} must be one of {', '.join(ON_NONFINITE)}.")
    if on_nonfinite != "raise":
        return
    if isinstance(x, jax.core.Tracer):
        raise ValueError(
            "on_nonfinite='raise' looks at values, which a traced array has not; call it outside of jit and other "
            "transformations, or leave it out: a group with a NaN or an infinity is NaN."
        )
    bad = ~np.isfinite(np.asarray(x, np.float32))
    if bad.any():
        first = tuple(int(place[0]) for place in np.nonzero(bad)) if bad.ndim else ()
        count, shape = np.count_nonzero(bad), np.shape(x)
        raise ValueError(
            f"{count} of {bad.size} elements are NaN or infinite in an array {shape}, the first at {first}."
        )


def _refuses_negative(qz: Quantizer, given: Given) -> bool:
    """Returns whether negative values are beyond the grid, and nobody has asked for a clip at zero."""
    unsigned = qz.format.kind in ("int", "float") and not qz.format.signed
    return unsigned and not qz.has_zero_point and given.offset is None and qz.estimator not in ("pact", "dorefa")


def _check_given(qz: Quantizer, key: Any, given: Given) -> None:
    """Refuses arguments that the quantizer has no use for."""
    if (key is not None) != (qz.rounding == "stochastic"):
        way = "rounding='stochastic' needs key=" if key is None else "key= is for rounding 'stochastic'"
        raise ValueError(f"{qz!r}: {way}.")
    if given.scale is not None and (not qz.is_scaled or qz.estimator == "dorefa"):
        raise ValueError(f"{qz!r} has scales of its own or none; leave out scale=.")
    if given.zero_point is not None and (given.scale is None or not qz.has_zero_point):
        raise ValueError(f"{qz!r}: zero_point= is for scheme 'affine', together with scale=.")
    if given.scale is not None and given.zero_point is None and qz.has_zero_point:
        raise ValueError(f"{qz!r}: scale= needs zero_point= under scheme 'affine'.")
    if given.offset is not None and (given.scale is None or qz.estimator != "lsq+"):
        raise ValueError(f"{qz!r}: offset= is for estimator 'lsq+', together with scale=.")


def check_shapes(given: Given, tiles: Tiles, qz: Quantizer) -> None:
    """Refuses scales that do not broadcast to the shape that scales have."""
    for name, value in given._asdict().items():
        if value is None:
            continue
        try:
            fits = np.broadcast_shapes(np.shape(value), tiles.scale_shape) == tiles.scale_shape
        except ValueError:
            fits = False
        if not fits:
            raise ValueError(
                f"{name}= has shape {np.shape(value)}, but scales of {qz!r} for an array {tiles.shape} have "
                f"{tiles.scale_shape}."
            )


def block_axes(shape: tuple[int, ...], qz: Quantizer, axis: Any) -> int | tuple[int, ...]:
    """Returns the axes that the blocks of a block format lie along: square tiles along the last two."""
    if len(qz.format.block) == 1:
        return contracted(shape, axis, qz.format.name)[-1:]
    return qz.format.axes(len(shape), None)

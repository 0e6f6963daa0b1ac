"""Codes inside JAX: encode and decode as traceable functions, bit for bit those for NumPy."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from precision_lab.formats.codes import code_dtype, codes_of_bits, table
from precision_lab.formats.containers import as_float, to_bits
from precision_lab.formats.params import FLOAT32, FLOAT64, layout_of
from precision_lab.formats.rounding import round_to
from precision_lab.formats.scalar import Format


def encode_array(x: jax.Array, fmt: Format, **options: Any) -> jax.Array:
    """Returns the codes of `x` rounded to `fmt`; options as for `round_to`, documented at `codes.encode`."""
    if x.dtype in (jnp.float16, jnp.bfloat16):
        x = as_float(to_bits(x))  # float32, which also holds what a narrow type does not reach
    rounded = round_to(x, fmt, **options)
    return codes_of_bits(jnp, layout_of(x.dtype), to_bits(rounded), fmt).astype(code_dtype(fmt))


def decode_array(codes: jax.Array, fmt: Format) -> jax.Array:
    """Returns the values of `codes`, documented at `codes.decode`."""
    words = _words_of_codes(fmt)
    if codes.dtype == fmt.dtype:
        codes = _stored_codes(codes, fmt)
    if not jnp.issubdtype(codes.dtype, jnp.integer):
        raise TypeError(f"codes of {fmt.name} are integers, got {codes.dtype} {codes.shape}.")
    index = codes.astype(jnp.int32)
    taken = jnp.take(jnp.asarray(words), index, mode="clip")
    nan = words.dtype.type(FLOAT32.nan if words.dtype == np.uint32 else FLOAT64.nan)
    return as_float(jnp.where((index >= 0) & (index < len(words)), taken, nan))


def _stored_codes(stored: jax.Array, fmt: Format) -> jax.Array:
    """Returns the codes of an array of the format's own dtype."""
    if fmt.kind == "int":
        return stored.astype(jnp.int32) & ((1 << fmt.bits) - 1)
    if fmt.bits not in (8, 16):
        raise TypeError(f"arrays of {stored.dtype} have no codes in JAX; decode NumPy arrays, or integers from encode.")
    return jax.lax.bitcast_convert_type(stored, code_dtype(fmt))


def _words_of_codes(fmt: Format) -> np.ndarray:
    """Returns the bits of the value of every code, in float32 if that is exact; floats could lose subnormals."""
    values = table(fmt)
    with np.errstate(over="ignore", invalid="ignore"):
        narrow = values.astype(np.float32)
    if ((narrow == values) | np.isnan(values)).all():
        return narrow.view(np.uint32)
    if not jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
        raise ValueError(f"values of {fmt.name} need float64; enable x64, or decode NumPy arrays.")
    return values.view(np.uint64)

"""Arrays as the words the kernel works on, and back: bit patterns in float32's layout, or in float64's.

float16 and bfloat16 are widened with integer operations. A cast would do the same, but XLA may remove a pair of casts
and with it a rounding that the caller asked for, and may flush subnormals on the way.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from precision_lab.formats.kernel import round_magnitude
from precision_lab.formats.params import FLOAT32, FormatParams, layout_of

_U32 = np.uint32
# In a called function inside of a loop, XLA of JAX 0.10 permutes the elements of a constant that is transposed and then
# read as bits; where it cannot see that it is a constant, it does not. JAX 0.12 has it right.
_FOLDS_WRONGLY = jax.__version_info__ < (0, 12)
# Differences between float16's and float32's exponent fields, for numbers and for infinities and NaNs.
_REBIAS = _U32((127 - 15) << 23)
_REBIAS_TOP = _U32((255 - 31) << 23)
_SUBNORMAL_SCALE = _U32(24 << 23)
_FLOAT16_MIN_NORMAL = _U32((127 - 14) << 23)

# Largest finite value in float32's layout, and the low mantissa bits that are always zero.
_NARROW = {"float16": (_U32(0x477FE000), 13), "bfloat16": (_U32(0x7F7F0000), 16)}


def as_float(words: jax.Array) -> jax.Array:
    """Returns uint32 as float32, or uint64 as float64, of the same bits."""
    return lax.bitcast_convert_type(words, jnp.float32 if words.dtype == jnp.uint32 else jnp.float64)


def as_word(floats: jax.Array) -> jax.Array:
    """Returns float32 as uint32, or float64 as uint64, of the same bits."""
    return lax.bitcast_convert_type(floats, layout_of(floats.dtype).word)


def to_bits(x: jax.Array) -> jax.Array:
    """Returns the values of `x` as words in the layout they are rounded in; every dtype's values fit exactly."""
    x = lax.optimization_barrier(x) if _FOLDS_WRONGLY else x
    if x.dtype == jnp.bfloat16:
        return lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32) << _U32(16)
    if x.dtype == jnp.float16:
        return _widen_float16(lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32))
    return as_word(x)


def from_bits(words: jax.Array, dtype: Any) -> jax.Array:
    """Returns words as an array of `dtype`, whose values they must be; the inverse of `to_bits`."""
    if dtype == jnp.bfloat16:
        return lax.bitcast_convert_type((words >> _U32(16)).astype(jnp.uint16), jnp.bfloat16)
    if dtype == jnp.float16:
        return lax.bitcast_convert_type(_narrow_float16(words).astype(jnp.uint16), jnp.float16)
    return as_float(words)


def _widen_float16(bits: jax.Array) -> jax.Array:
    """Returns float16 bits as float32 bits. A subnormal is an integer times 2**-24, and integers convert exactly."""
    a = bits & _U32(0x7FFF)
    subnormal = jnp.where(a == _U32(0), _U32(0), as_word(a.astype(jnp.float32)) - _SUBNORMAL_SCALE)
    special = jnp.where(a >= _U32(0x7C00), _REBIAS_TOP, _REBIAS)
    r = jnp.where(a < _U32(0x0400), subnormal, (a << _U32(13)) + special)
    return r | ((bits ^ a) << _U32(16))


def _narrow_float16(words: jax.Array) -> jax.Array:
    """Returns float32 bits of float16 values as float16 bits; the inverse of `_widen_float16`."""
    a = words & _U32(0x7FFFFFFF)
    subnormal = jnp.where(a == _U32(0), _U32(0), as_float(a + _SUBNORMAL_SCALE).astype(jnp.uint32))
    special = jnp.where(a >= _U32(FLOAT32.inf), _REBIAS_TOP, _REBIAS)
    r = jnp.where(a < _FLOAT16_MIN_NORMAL, subnormal, (a - special) >> _U32(13))
    return r | ((words ^ a) >> _U32(16))


def within(xp: ModuleType, dtype: Any, p: FormatParams) -> FormatParams:
    """Returns `p` with its largest value lowered to the largest that both the format and `dtype` have."""
    if np.dtype(dtype).name not in _NARROW:
        return p
    largest, spare = _NARROW[np.dtype(dtype).name]
    cap = round_magnitude(xp, FLOAT32, largest, _U32(0), p, "toward_zero")
    low_bits = _U32((1 << spare) - 1)

    def lowered(bits: Any) -> Any:
        return xp.minimum(bits & ~low_bits, cap)

    return p._replace(max=lowered(p.max), min=lowered(p.min))

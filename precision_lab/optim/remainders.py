"""A float32 number as a bfloat16 number and 16 more bits: half of a master is the parameter itself.

The two are joined by adding integers: the bits of the bfloat16 number, moved up by 16, plus the signed remainder. A
bfloat16 number with an even last bit is nearest to 65537 float32 numbers, both ties included, and 16 bits tell 65536
apart. So the nearest-even cast cannot be kept for all of them: one number in 131072 must move to its neighbour.
Here those are the ties between an even number and the next larger one in magnitude; all ties round away from zero.
"""

import jax
import jax.numpy as jnp
import numpy as np

_HALF, _SIGN, _QUIET_NAN = np.uint32(0x8000), np.uint32(0x80000000), np.uint16(0x7FC0)


def nearest_away(master: jax.Array) -> jax.Array:
    """Returns `master` in bfloat16, rounded to nearest with ties away from zero; infinite above 3.39e38."""
    bits = _bits(master)
    rounded = ((bits + _HALF) >> 16).astype(jnp.uint16)
    quiet = (bits >> 16).astype(jnp.uint16) & np.uint16(0x8000) | _QUIET_NAN
    return jax.lax.bitcast_convert_type(jnp.where(jnp.isnan(master), quiet, rounded), jnp.bfloat16)


def remainder(master: jax.Array, p: jax.Array) -> jax.Array:
    """Returns the int16 remainder that joins with `p`, a nearest bfloat16 number of `master`, to `master`.

    A tie that was rounded towards zero has none; its remainder is that of the float32 number before it. That of NaN
    is 0. That of a zero `p` holds the sign as well, in its highest bit, so that the sign of `p` does not matter.
    """
    bits = _bits(master)
    apart = (bits - (_short(p) << 16)).astype(jnp.int32)
    near = jnp.clip(apart, -32768, 32767).astype(jnp.int16)
    size = jnp.minimum(bits & ~_SIGN, np.uint32(0x7FFF))
    at_zero = (size | (bits & _SIGN) >> 16).astype(jnp.uint16).astype(jnp.int16)
    return jnp.where(_is_zero(p), at_zero, jnp.where(jnp.isnan(master), np.int16(0), near))


def join(p: jax.Array, rest: jax.Array) -> jax.Array:
    """Returns the float32 number whose nearest bfloat16 number is `p` and whose remainder is `rest`."""
    low = rest.astype(jnp.uint16).astype(jnp.uint32)
    at_zero = (low & ~_HALF) | (low & _HALF) << 16
    near = (_short(p) << 16) + rest.astype(jnp.int32).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(jnp.where(_is_zero(p), at_zero, near), jnp.float32)


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(x, jnp.uint32)


def _short(p: jax.Array) -> jax.Array:
    """Returns the bits of a bfloat16 number as uint32."""
    return jax.lax.bitcast_convert_type(p, jnp.uint16).astype(jnp.uint32)


def _is_zero(p: jax.Array) -> jax.Array:
    """Returns whether a bfloat16 number is a zero; a comparison of floats would flush subnormals to it."""
    return _short(p) & np.uint32(0x7FFF) == 0

"""Statistics of a tensor: a few small arrays, computed inside jit, merged exactly, read on the host.

The core is the exponent histogram: how many elements have a magnitude in [2**e, 2**(e + 1)), for every e of float32,
subnormals included, and how many are zero, infinite or NaN. It is made of bits alone, so neither flushed subnormals nor
an inexact logarithm can move an element. From it follow the shares beyond and below any format, whether or not that
format was known when the program ran; what needs the elements themselves, the error of rounding to one format, is
counted beside it.

The histogram is a scatter-add, which on CPU costs about 1.5 ns an element (sorting 50, comparing with every bin 100 and
more); `limit` bounds the cost by looking at evenly spread elements only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from precision_lab import formats
from precision_lab.formats import Format
from precision_lab.rewrite import _compat

# Bins: zero; the binades of float32's magnitudes, the lowest first; infinite; NaN.
MIN_EXPONENT, MAX_EXPONENT = -149, 127
ZERO, INF, NAN = 0, MAX_EXPONENT - MIN_EXPONENT + 2, MAX_EXPONENT - MIN_EXPONENT + 3
BINS = NAN + 1

_U32 = np.uint32
_INF_BITS, _MIN_NORMAL_BITS, _SIGN = _U32(0x7F800000), _U32(0x00800000), _U32(0x80000000)


class TensorStats(NamedTuple):
    """What was counted; every leaf may have leading axes, such as one of layers.

    Attributes:
      counts: uint32 (..., BINS, 2), elements in each bin as a low and a high word.
      amax: float32, largest finite magnitude; 0 if there is none.
      amin: float32, smallest non-zero finite magnitude; infinite if there is none.
      exponent: int32, k of the unit 2**k in which the sums are, so that squares neither overflow nor vanish.
      total: float32, sum of the finite elements, in 2**k.
      squares: float32, sum of their squares, in 4**k.
      nonfinite: bool, whether any element is infinite or NaN, among those not looked at too.
      noise: float32, sum of squared errors of rounding the finite elements to the format, in 4**k; NaN without format.
      overflowed: uint32 (..., 2), finite elements that the format cannot hold.
      flushed: uint32 (..., 2), non-zero elements that the format makes zero.
    """

    counts: Any
    amax: Any
    amin: Any
    exponent: Any
    total: Any
    squares: Any
    nonfinite: Any
    noise: Any
    overflowed: Any
    flushed: Any


def tensor_stats(x: jax.Array, fmt: Any = None, *, limit: int | None = None) -> TensorStats:
    """Returns the statistics of an array.

    Args:
      x: floating array of any shape. Magnitudes of float64 outside float32's range count in its outermost binades.
      fmt: format whose rounding errors are counted; None counts none.
      limit: look at so many elements at most, evenly spread; then all numbers but `nonfinite` are of this sample. None
        looks at all.

    Raises:
      TypeError: `x` is not floating.
      ValueError: `limit` is not positive, or the array has 2**32 elements or more.
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"statistics are of floating arrays, got {x.dtype} {x.shape}.")
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 element, got {limit}.")
    sample = thinned(x, limit)
    if sample.size >= 2**32:
        raise ValueError(f"{x.size} elements overflow a 32-bit count; give a limit.")
    bits = _magnitude_bits(sample)
    counts = jnp.zeros(BINS, jnp.uint32).at[_bins(bits).ravel()].add(_U32(1), mode="promise_in_bounds")
    amax = jnp.max(jnp.where(bits < _INF_BITS, bits, _U32(0)), initial=_U32(0))
    amin = jnp.min(jnp.where(bits == _U32(0), _INF_BITS, jnp.minimum(bits, _INF_BITS)), initial=_INF_BITS)
    exponent = _unit(amax)
    values = jnp.where(bits < _INF_BITS, _as_float32(sample), jnp.float32(0)) * _power_of_two(-exponent)
    some = counts[INF] + counts[NAN] > 0
    return TensorStats(
        counts=_wide(counts),
        amax=_from_bits(amax),
        amin=_from_bits(amin),
        exponent=exponent,
        total=_sum(values),
        squares=_sum(values * values),
        nonfinite=some if sample is x else some | _any_nonfinite(x),
        **_of_rounding(sample, bits, fmt, exponent),
    )


def stats_of_many(
    tensors: Sequence[tuple[jax.Array, Any]], limit: int | None, look: jax.Array | None = None
) -> list[TensorStats]:
    """Returns the statistics of (array, format) pairs; the same as `tensor_stats` of each.

    Under a limit the samples of all tensors are rows of one array and counted at once, which takes a few kernels for
    all in place of some dozen for each.

    Args:
      tensors: the pairs.
      limit: as in `tensor_stats`.
      look: truth value, traced or not; if it is false nothing is looked at, and the statistics are of no elements.
    """
    found: dict[int, TensorStats] = {}
    for fmt in dict.fromkeys(fmt for _, fmt in tensors):
        rows = [i for i, (x, other) in enumerate(tensors) if other == fmt and x.dtype != jnp.float64]
        if limit is not None and len(rows) > 1:
            found |= zip(rows, _rows_stats([tensors[i][0] for i in rows], fmt, limit, look), strict=True)

    def alone(x: jax.Array, fmt: Any) -> TensorStats:
        return _if_looking(look, lambda x: tensor_stats(x, fmt, limit=limit), lambda _: nothing(), x)

    return [found[i] if i in found else alone(x, fmt) for i, (x, fmt) in enumerate(tensors)]


def _rows_stats(arrays: Sequence[jax.Array], fmt: Any, limit: int, look: jax.Array | None) -> list[TensorStats]:
    """Returns the statistics of arrays whose samples are padded with zeros to one length, which are not counted."""
    distinct = {id(x): x for x in arrays}  # the input of several products is read once
    known = {key: _sample(x, limit, look) for key, x in distinct.items()}
    samples = [known[id(x)] for x in arrays]

    def counted(samples: Sequence[tuple[jax.Array, jax.Array]]) -> list[TensorStats]:
        length = max(sample.size for sample, _ in samples)
        spare = np.array([length - sample.size for sample, _ in samples], np.uint32)
        rows = jnp.stack([jnp.pad(sample, (0, int(n))) for (sample, _), n in zip(samples, spare, strict=True)])
        stats = jax.vmap(lambda row: tensor_stats(row, fmt))(rows)
        bad = stats.nonfinite | jnp.stack([bad for _, bad in samples])
        stats = stats._replace(counts=stats.counts.at[:, ZERO, 0].add(-spare), nonfinite=bad)
        return [TensorStats(*(leaf[i] for leaf in stats)) for i in range(len(samples))]

    return _if_looking(look, counted, lambda samples: [nothing() for _ in samples], samples)


def _sample(x: jax.Array, limit: int, look: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Returns the elements of an array that are looked at, float32, and whether any other is infinite or NaN.

    An array that is larger than its sample has a conditional of its own, so that it need not be kept until the samples
    of others are there.
    """

    def some(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return _exact_float32(thinned(x, limit).ravel()), _any_nonfinite(x) if x.size > limit else jnp.zeros((), bool)

    def none(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return jnp.zeros(thinned(x, limit).size, jnp.float32), jnp.zeros((), bool)

    return _if_looking(look if x.size > limit else None, some, none, x)


def _if_looking(look: jax.Array | None, some: Callable, none: Callable, x: Any) -> Any:
    """Returns `some(x)` if a truth value is true or there is none, else `none(x)`, of the same shapes."""
    if look is None:
        return some(x)
    return lax.cond(look, lambda x: _compat.varying(some(x)), lambda x: _compat.varying(none(x)), x)


def merge(a: TensorStats, b: TensorStats) -> TensorStats:
    """Returns the statistics of both together; associative and commutative, exact in the counts."""
    exponent = jnp.maximum(a.exponent, b.exponent)

    def added(name: str, power: int) -> jax.Array:
        terms = [getattr(s, name) * _power_of_two(s.exponent - exponent) ** power for s in (a, b)]
        return terms[0] + terms[1]

    return TensorStats(
        counts=_add_wide(a.counts, b.counts),
        amax=_by_bits(jnp.maximum, a.amax, b.amax),
        amin=_by_bits(jnp.minimum, a.amin, b.amin),
        exponent=exponent,
        total=added("total", 1),
        squares=added("squares", 2),
        nonfinite=a.nonfinite | b.nonfinite,
        noise=added("noise", 2),
        overflowed=_add_wide(a.overflowed, b.overflowed),
        flushed=_add_wide(a.flushed, b.flushed),
    )


def nothing() -> TensorStats:
    """Returns the statistics of no elements."""
    words, zero = jnp.zeros(2, jnp.uint32), jnp.zeros((), jnp.float32)
    return TensorStats(
        counts=jnp.zeros((BINS, 2), jnp.uint32),
        amax=zero,
        amin=jnp.full((), jnp.inf, jnp.float32),
        exponent=jnp.asarray(_LEAST_UNIT),
        total=zero,
        squares=zero,
        nonfinite=jnp.zeros((), bool),
        noise=zero,
        overflowed=words,
        flushed=words,
    )


def empty(like: TensorStats) -> TensorStats:
    """Returns the statistics of no elements, which change nothing when merged, of the shapes of `like`."""
    return jax.tree.map(lambda leaf, own: jnp.broadcast_to(leaf, own.shape), nothing(), like)


def thinned(x: jax.Array, limit: int | None) -> jax.Array:
    """Returns every n-th element, n being coprime to all axes so that every channel has its turn; or `x` itself."""
    if limit is None or x.size <= limit:
        return x
    stride = -(-x.size // limit)
    while any(math.gcd(stride, side) > 1 for side in x.shape):
        stride += 1
    return x.reshape(-1)[::stride]


def _magnitude_bits(x: jax.Array) -> jax.Array:
    """Returns the magnitudes as float32 bit patterns; exact but for float64, which is truncated into range."""
    if x.dtype == jnp.float64:
        return _narrowed(lax.bitcast_convert_type(x, jnp.uint64))
    if x.dtype == jnp.bfloat16:
        bits = lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32) << _U32(16)
    else:  # The values of float16 and of every narrower format are normal numbers in float32.
        bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    return bits & ~_SIGN


def _narrowed(words: jax.Array) -> jax.Array:
    """Returns float64 bit patterns as those of float32 magnitudes in the same binade, clipped to its range."""
    words = words & np.uint64(2**63 - 1)
    exponent = (words >> np.uint64(52)).astype(jnp.int32) - 1023
    mantissa = ((words >> np.uint64(29)).astype(jnp.uint32)) & _U32(2**23 - 1)
    normal = ((exponent + 127).astype(jnp.uint32) << _U32(23)) | mantissa
    below = (mantissa | _MIN_NORMAL_BITS) >> jnp.clip(-126 - exponent, 0, 23).astype(jnp.uint32)
    bits = jnp.where(exponent < -126, jnp.maximum(below, _U32(1)), normal)
    bits = jnp.where(exponent > MAX_EXPONENT, _INF_BITS - _U32(1), bits)
    infinite = np.uint64(0x7FF << 52)
    bits = jnp.where(words < infinite, bits, _INF_BITS + (words > infinite).astype(jnp.uint32))
    return jnp.where(words == 0, _U32(0), bits)


def _bins(bits: jax.Array) -> jax.Array:
    """Returns the bin of each magnitude. A subnormal is an integer times 2**-149, and integers convert exactly."""
    field = lax.bitcast_convert_type(bits.astype(jnp.float32), jnp.uint32) >> _U32(23)
    subnormal = jnp.maximum(field, _U32(126)) - _U32(126)
    normal = (bits >> _U32(23)) + _U32(-126 - MIN_EXPONENT) + (bits > _INF_BITS)
    return jnp.where(bits < _MIN_NORMAL_BITS, subnormal, normal).astype(jnp.int32)


# Units of the sums: 2**-k must be a normal number, and so must what a merge multiplies with.
_LEAST_UNIT, _GREATEST_UNIT = np.int32(-100), np.int32(126)


def _unit(amax: jax.Array) -> jax.Array:
    """Returns the exponent of the largest magnitude, given as bits."""
    return jnp.clip((amax >> _U32(23)).astype(jnp.int32) - 127, _LEAST_UNIT, _GREATEST_UNIT)


def _power_of_two(exponent: jax.Array) -> jax.Array:
    """Returns 2**exponent in float32, exactly; zero below the normal numbers, where it would change no sum."""
    bits = jnp.maximum(exponent + 127, 0).astype(jnp.uint32) << _U32(23)
    return _from_bits(bits)


def _any_nonfinite(x: jax.Array) -> jax.Array:
    """Returns whether an element is infinite or NaN, in one vectorised pass: zero times these is NaN."""
    return jnp.isnan(_sum(x * jnp.zeros((), x.dtype)))


def _exact_float32(x: jax.Array) -> jax.Array:
    """Returns the values in float32; those of bfloat16 by their bits, since a cast may flush subnormals."""
    if x.dtype != jnp.bfloat16:
        return x.astype(jnp.float32)
    return _from_bits(lax.bitcast_convert_type(x, jnp.uint16).astype(jnp.uint32) << _U32(16))


def _as_float32(x: jax.Array) -> jax.Array:
    return x.astype(jnp.float32)


def _sum(x: jax.Array) -> jax.Array:
    """Returns the sum in float32, first over rows, which XLA vectorises on CPU, then over what is left."""
    rows = x.reshape(-1, x.shape[-1]) if x.ndim > 1 else x[None]
    return jnp.sum(jnp.sum(rows, axis=0, dtype=jnp.float32))


def _of_rounding(x: jax.Array, bits: jax.Array, fmt: Any, exponent: jax.Array) -> dict[str, jax.Array]:
    """Returns the leaves that depend on the format."""
    if fmt is None:
        return {
            "noise": jnp.full((), jnp.nan, jnp.float32),
            **dict.fromkeys(("overflowed", "flushed"), jnp.zeros(2, jnp.uint32)),
        }
    fmt = formats.format(fmt)
    wide = x if x.dtype == jnp.float64 else _as_float32(x)
    rounded = formats.round_to(wide, fmt)
    given, held = bits < _INF_BITS, jnp.isfinite(rounded)
    over = given & (_saturates(wide, fmt) if held_everywhere(fmt) else ~held)
    flushed = (bits > _U32(0)) & given & (_magnitude_bits(rounded) == _U32(0))
    unit = _power_of_two(-exponent)
    error = jnp.where(held, _as_float32(wide - rounded) * unit, jnp.float32(jnp.inf))
    error = jnp.where(given, error, jnp.float32(0))
    return {
        "noise": _sum(error * error),
        "overflowed": _wide(jnp.sum(over, dtype=jnp.uint32)),
        "flushed": _wide(jnp.sum(flushed, dtype=jnp.uint32)),
    }


def held_everywhere(fmt: Any) -> bool:
    """Returns whether a format makes every number a number, by saturating or by scaling."""
    return not isinstance(fmt, Format) or fmt.native_overflow == "saturate"


def _saturates(x: jax.Array, fmt: Any) -> jax.Array:
    """Returns which elements lie beyond the largest values of a format; none where a block has a scale of its own."""
    if not isinstance(fmt, Format):
        return jnp.zeros(x.shape, bool)
    return (x > jnp.asarray(fmt.max, x.dtype)) | (x < jnp.asarray(fmt.min, x.dtype))


def _by_bits(choose: Callable[..., jax.Array], *magnitudes: jax.Array) -> jax.Array:
    """Returns one of some magnitudes, chosen by their bits, since XLA on CPU may compare subnormals as zeros."""
    return _from_bits(choose(*(lax.bitcast_convert_type(x, jnp.uint32) for x in magnitudes)))


def _from_bits(bits: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(bits, jnp.float32)


def _wide(count: jax.Array) -> jax.Array:
    """Returns uint32 counts as low and high words on a new last axis."""
    return jnp.stack([count, jnp.zeros_like(count)], axis=-1)


def _add_wide(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns the sum of counts in low and high words, exactly."""
    low = a[..., 0] + b[..., 0]
    return jnp.stack([low, a[..., 1] + b[..., 1] + (low < a[..., 0])], axis=-1)

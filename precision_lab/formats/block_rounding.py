"""round_to_blocks and encode_blocks: arrays in a block format, as floats on its grid or as the codes that are stored.

Both go through one function, so that decoding what is stored gives the rounded array bit for bit. Power-of-two
scales are applied to the bits of a value, elements are rounded by the kernel that `round_to` uses, and neither can
be changed by what XLA does around it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from precision_lab.formats import block_codes, block_scales, kernel
from precision_lab.formats.blocks import MIN_SCALE_EXPONENT, NAN_SCALE, BlockFormat, block_format
from precision_lab.formats.catalogue import FORMATS
from precision_lab.formats.containers import as_float, as_word, from_bits, to_bits, within
from precision_lab.formats.options import check_rounding
from precision_lab.formats.params import FLOAT32, FormatParams
from precision_lab.formats.randomness import How, make_draw, random_words
from precision_lab.formats.scalar import Format
from precision_lab.formats.tiles import Tiles

_U32 = np.uint32
_MAGNITUDE = _U32(FLOAT32.sign - 1)
_INF, _NAN = _U32(FLOAT32.inf), _U32(FLOAT32.nan)
_FLOAT32_MAX = np.float32(np.finfo(np.float32).max)
_SCALE = FORMATS["float8_e4m3fn"]
_LARGEST = {"float16": 0x477FE000, "bfloat16": 0x7F7F0000, "float32": 0x7F7FFFFF}

# What an infinity or a NaN does to the block it is in.
NONFINITE: dict[str, str] = {
    "block": "the scale is NaN, and with it the whole block",
    "saturate": "infinities become the largest element, under a scale found without them; NaN as in 'block'",
}


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["codes", "scales", "tensor_scale"],
    meta_fields=["format", "axis", "dtype"],
)
@dataclass(frozen=True)
class BlockArray:
    """An array as a block format stores it; a pytree.

    Attributes:
      codes: element codes, uint8 or uint16, of the array's own shape; padding is not kept.
      scales: codes of the block scales, uint8; the array's shape with every blocked axis counted in blocks.
      tensor_scale: float32 scalar that multiplies every value; None where the format has no such scale.
      format: the block format.
      axis: the axes blocks lie along, counted from the front.
      dtype: dtype of the values.
    """

    codes: Any
    scales: Any
    tensor_scale: Any
    format: BlockFormat
    axis: tuple[int, ...]
    dtype: np.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the shape of the array."""
        return self.codes.shape

    @property
    def bits_per_element(self) -> Fraction:
        """Returns the true bits per element when packed, all scales included."""
        return self.format.bits_per_element(self.shape, self.axis)

    def decode(self) -> jax.Array:
        """Returns the values, bit for bit those of `round_to_blocks`."""
        return _decode(self)


class _Plan(NamedTuple):
    """What is known of a rounding at compile time."""

    format: BlockFormat
    axes: tuple[int, ...]
    how: How
    nonfinite: str

    @property
    def rounding(self) -> str:
        """Returns the name of the rounding."""
        assert self.how.rounding is not None
        return self.how.rounding


def round_to_blocks(
    x: Any,
    fmt: str | BlockFormat,
    *,
    axis: int | tuple[int, ...] | None = None,
    rounding: str = "nearest_even",
    nonfinite: str = "block",
    tensor_amax: Any | None = None,
    key: jax.Array | None = None,
    bits: Any | None = None,
    n_bits: int | None = None,
    centred: bool = False,
) -> jax.Array:
    """Returns `x` with every value as the block format `fmt` would store it, in the dtype of `x`.

    The gradient is straight through. A last, smaller block is as if filled up with zeros.

    Args:
      x: float16, bfloat16 or float32 array.
      fmt: a block format or its name, such as "mxfp8", "mxfp4:rceil", "nvfp4_2d" or "bfp8@16".
      axis: the axis that blocks lie along, two axes for square tiles; None means the last ones. Choose the axis that
        a product will contract.
      rounding: one of `ROUNDINGS`, for the elements; block scales follow their rule.
      nonfinite: one of `NONFINITE`. The specifications of block formats leave this to the implementation.
      tensor_amax: largest magnitude to expect in the whole array, for formats with a scale for it, as calibration
        would give it; None takes that of `x`. Larger values saturate.
      key: randomness of stochastic rounding, as for `round_to`.
      bits: the same as unsigned integers of the shape of `x`, as for `round_to`.
      n_bits: use only so many random bits for an element, as hardware does; as for `round_to`.
      centred: with `n_bits`, without the bias of that on average; as for `round_to`.

    Returns:
      An array like `x`. Values are exact products of element and scale, at most the largest of its dtype; only
      NVFP4's are products of three floats, in the order of TransformerEngine, rounded to the dtype of `x` at the end.
      NVFP4 computes its scales in float32, and gives zeros where XLA flushes subnormals and no magnitude is above
      7.9e-36.

    Raises:
      TypeError: `x` is of another dtype.
      ValueError: an unknown format or option, or one that the format cannot honour.
    """
    how = _how(rounding, n_bits, centred)
    operands, plan = _checked(x, fmt, axis, how, nonfinite, tensor_amax, key, bits)
    return _round(*operands, plan)


def encode_blocks(
    x: Any,
    fmt: str | BlockFormat,
    *,
    axis: int | tuple[int, ...] | None = None,
    rounding: str = "nearest_even",
    nonfinite: str = "block",
    tensor_amax: Any | None = None,
    key: jax.Array | None = None,
    bits: Any | None = None,
    n_bits: int | None = None,
    centred: bool = False,
) -> BlockArray:
    """Returns `x` as it is stored; arguments and errors as for `round_to_blocks`, whose values `decode` gives."""
    how = _how(rounding, n_bits, centred)
    operands, plan = _checked(x, fmt, axis, how, nonfinite, tensor_amax, key, bits)
    return _encode(*operands, plan)


def _checked(
    x: Any, spec: Any, axis: Any, how: How, nonfinite: str, amax: Any, key: Any, bits: Any
) -> tuple[tuple[jax.Array, Any, Any], _Plan]:
    """Returns ((x, tensor_amax, random words), plan) if they go together; raises otherwise."""
    fmt = block_format(spec)
    assert how.rounding is not None
    check_rounding(how.rounding, random=key is not None or bits is not None)
    if nonfinite not in NONFINITE:
        raise ValueError(f"nonfinite must be one of {', '.join(NONFINITE)}, got {nonfinite!r}.")
    if amax is not None and not fmt.tensor_scale:
        raise ValueError(f"tensor_amax is for formats with a scale for the whole array, which {fmt.name} has not.")
    dtype = getattr(x, "dtype", None)
    if dtype is None or np.dtype(dtype).name not in _LARGEST:
        came = type(x).__name__ if dtype is None else f"{dtype} {np.shape(x)}"
        raise TypeError(f"blocks are made of float16, bfloat16 or float32 arrays, got {came}.")
    x = jnp.asarray(x)
    words = random_words(x, key, bits, how)
    plan = _Plan(fmt, fmt.axes(x.ndim, axis), how, nonfinite)
    return (x, None if amax is None else jnp.float32(amax), words), plan


class _Quantized(NamedTuple):
    """Blocks after rounding: element values as float32 words, codes of the scales, and the scale of the array."""

    words: jax.Array
    scales: jax.Array
    tensor_scale: Any


@partial(jax.custom_jvp, nondiff_argnums=(3,))
@partial(jax.jit, static_argnums=(3,), inline=True)
def _round(x: jax.Array, amax: Any, random: Any, plan: _Plan) -> jax.Array:
    """Returns `x` rounded."""
    tiles = Tiles(x.shape, plan.axes, plan.format.block)

    def exactly(x: jax.Array) -> jax.Array:
        return _values(_quantize(x, amax, random, plan, tiles), plan.format, tiles, x.dtype)

    if not _has_direct_path(plan, np.dtype(x.dtype)):
        return exactly(x)
    return jax.lax.platform_dependent(x, cpu=partial(_directly, exactly, plan.format, tiles), default=exactly)


def _has_direct_path(plan: _Plan, dtype: np.dtype) -> bool:
    """Returns whether `_directly` can do this rounding."""
    fmt = plan.format
    usual = plan.rounding == "nearest_even" and plan.nonfinite == "block" and not fmt.tensor_scale
    inside = dtype == np.float32 or (fmt.rule == "floor" and dtype != np.float16)
    return usual and inside and block_scales.has_fast_path(fmt.element)


def _directly(exactly: Callable[[jax.Array], jax.Array], fmt: BlockFormat, tiles: Tiles, x: jax.Array) -> jax.Array:
    """Returns `x` rounded without dividing by scales, if all are within bounds; by `exactly` otherwise. For CPUs."""
    least, most = (np.int32(each - MIN_SCALE_EXPONENT) for each in block_scales.direct_exponents(fmt.element))
    values = tiles.split(x) if x.dtype == jnp.float32 else as_float(tiles.split(to_bits(x)))
    largest = _largest(values, tiles, exact=False)
    bad, zero = largest >= _INF, largest == _U32(0)
    codes = block_scales.scale_codes(jnp.where(bad, _U32(0), largest), fmt).astype(np.int32)
    within = (codes >= least) & (codes <= most) | bad | zero  # any scale will do for zeros, and where all is NaN

    def direct(x: jax.Array) -> jax.Array:
        shift = (jnp.clip(codes, least, most) + np.int32(MIN_SCALE_EXPONENT)) << np.int32(FLOAT32.mantissa_bits)
        rounded = block_scales.round_scaled(tiles.split(to_bits(x)), fmt.element, shift=shift.astype(np.uint32))
        return from_bits(tiles.join(rounded | jnp.where(bad, _NAN, _U32(0))), x.dtype)

    # What seems to be zero may be a subnormal that XLA has flushed. The other branch gives the predicate, False there,
    # because in a shard_map both have to vary over the same axes.
    nonzero = lambda x: jnp.any(zero & (tiles.split(to_bits(x)) & _MAGNITUDE > _U32(0)))  # noqa: E731
    some = jnp.any(zero)
    flushed = jax.lax.cond(some, nonzero, lambda x: some, x)
    return jax.lax.cond(jnp.all(within) & ~flushed, direct, exactly, x)


@_round.defjvp
def _round_jvp(plan: _Plan, primals: Any, tangents: Any) -> Any:
    return _round(*primals, plan), tangents[0]


@partial(jax.jit, static_argnums=(3,), inline=True)
def _encode(x: jax.Array, amax: Any, random: Any, plan: _Plan) -> BlockArray:
    """Returns the codes of `x`."""
    fmt = plan.format
    tiles = Tiles(x.shape, plan.axes, fmt.block)
    words, scales, tensor_scale = _quantize(x, amax, random, plan, tiles)
    # Under a NaN scale nothing is looked at; zeros are what compresses best.
    finite = jnp.where(scales == _nan_scale(fmt), _U32(0), words)
    codes = tiles.join(block_codes.codes_of(jnp, finite, fmt.element))
    scales = jnp.squeeze(scales, tiles.within).astype(jnp.uint8)
    return BlockArray(codes, scales, tensor_scale, fmt, plan.axes, np.dtype(x.dtype))


@jax.jit
def _decode(array: BlockArray) -> jax.Array:
    """Returns the values of a block array."""
    fmt, tiles = array.format, Tiles(array.shape, array.axis, array.format.block)
    words = block_codes.words_of(jnp, tiles.split(array.codes), fmt.element, as_word)
    scales = jnp.expand_dims(array.scales, tiles.within)
    values = _values(_Quantized(words, scales, array.tensor_scale), fmt, tiles, array.dtype)
    if not (fmt.element.has_nan or fmt.element.has_inf):
        return values
    # Others may have stored infinities and NaNs; we do not.
    special = tiles.join(words)
    return jnp.where(special & _MAGNITUDE >= _INF, from_bits(special, array.dtype), values)


def _quantize(x: jax.Array, amax: Any, random: Any, plan: _Plan, tiles: Tiles) -> _Quantized:
    """Returns the rounded elements and their scales; scales keep the rank of the split array."""
    fmt = plan.format
    words = tiles.split(to_bits(x))
    magnitudes = words & _MAGNITUDE
    # XLA reduces the array itself faster than what was made of its bits.
    values = tiles.split(x) if x.dtype == jnp.float32 else as_float(words)
    if plan.nonfinite == "saturate":
        # NaNs stay, and are found below.
        values = as_float(jnp.where(magnitudes == _INF, _U32(0), magnitudes))
    largest = _largest(values, tiles, exact=fmt.max_exponent == 0 and fmt.rule not in ("floor", "amax"))
    bad = largest >= _INF
    largest = jnp.where(bad, _U32(0), largest)
    draw = None if random is None else make_draw(FLOAT32, tiles.split(random), plan.how)
    if fmt.tensor_scale:
        words, scales, tensor_scale = _amax_scale(words, largest, amax, plan, draw)
        return _Quantized(words, jnp.where(bad, _nan_scale(fmt), scales), tensor_scale)
    codes = block_scales.scale_codes(largest, fmt)
    words = _power_of_two_elements(words, codes, plan, draw, np.dtype(x.dtype))
    return _Quantized(words, jnp.where(bad, _nan_scale(fmt), codes), None)


def _how(rounding: str, n_bits: int | None, centred: bool) -> How:
    """Returns the rounding as the randomness it uses describes it."""
    return How(rounding, rounding == "stochastic", n_bits, centred, gradient="straight_through")


def _nan_scale(fmt: BlockFormat) -> np.uint32:
    """Returns the code of a scale that is NaN."""
    return _U32(NAN_SCALE if _SCALE.nan_code is None or not fmt.tensor_scale else _SCALE.nan_code)


def _largest(values: Any, tiles: Tiles, *, exact: bool) -> Any:
    """Returns the words of the largest magnitude of each block; of NaN or an infinity where there is one.

    As floats, subnormals may come out as zero, but then all scales are the smallest one, unless the largest element
    is below 2 and the scale is rounded up: `exact` compares words, which is slower.
    """
    if exact:
        return jnp.max(as_word(values) & _MAGNITUDE, tiles.within, keepdims=True)
    high, low = (reduce(values, tiles.within, keepdims=True) for reduce in (jnp.max, jnp.min))
    return as_word(jnp.maximum(high, -low)) & _MAGNITUDE


def _power_of_two_elements(words: Any, codes: Any, plan: _Plan, draw: Any, dtype: np.dtype) -> Any:
    """Returns the elements of MX formats and block floating point: values over their scale, rounded."""
    fmt, magnitudes = plan.format, words & _MAGNITUDE
    largest = _largest_elements(codes, fmt, dtype)
    nearest = plan.rounding == "nearest_even" and block_scales.has_fast_path(fmt.element)
    scaled = block_scales.divide(magnitudes, codes, sticky=not nearest)
    if plan.nonfinite == "saturate":
        scaled = jnp.where(magnitudes == _INF, _U32(FLOAT32.floor_bits(-fmt.element.lowest)), scaled)
    scaled = scaled | (words ^ magnitudes)
    if nearest:
        return block_scales.round_scaled(scaled, fmt.element, largest)
    rounded = _round_elements(scaled, fmt.element, plan.rounding, draw)
    if largest is None:
        return rounded
    magnitudes = rounded & _MAGNITUDE
    return jnp.minimum(magnitudes, largest) | (rounded ^ magnitudes)


def _largest_elements(codes: Any, fmt: BlockFormat, dtype: np.dtype) -> Any | None:
    """Returns the largest elements that do not exceed `dtype` under their scales; None where all stay below.

    Only rules that round the scale up can exceed it, or elements with more mantissa bits than the dtype has.
    """
    dtype_mantissa_bits = FORMATS[dtype.name].mantissa_bits
    if fmt.rule == "floor" and block_scales.top_mantissa_bits(fmt.element) <= dtype_mantissa_bits:
        return None
    largest = _U32(_LARGEST[dtype.name])
    # Under smaller scales the quotient would be beyond float32, and is beyond any element already.
    enough = _U32(FLOAT32.bias - 254 + (_LARGEST[dtype.name] >> FLOAT32.mantissa_bits))
    most = block_scales.divide(jnp.full_like(codes, largest), jnp.maximum(codes, enough), sticky=False)
    return _round_elements(most, fmt.element, "toward_zero")


def _amax_scale(words: Any, largest: Any, amax: Any, plan: _Plan, draw: Any) -> tuple[Any, Any, Any]:
    """Returns (element words, scale codes, tensor scale) of NVFP4.

    Source: TransformerEngine, transformer_engine/pytorch/custom_recipes/quantization_nvfp4.py: its operations in its
      order, each rounded to float32.
    """
    fmt, block_amax = plan.format, as_float(largest)
    # XLA reorders products of what it knows at compile time; behind the barrier it knows no scale.
    array_amax = jax.lax.optimization_barrier(jnp.max(block_amax, initial=0.0) if amax is None else amax)
    encode = jnp.minimum(np.float32(_SCALE.max * fmt.element.max) / array_amax, _FLOAT32_MAX)
    encode = jnp.where(array_amax == 0, np.float32(1), encode)
    decode = np.float32(1) / encode
    per_element = encode * (np.float32(1) / np.float32(fmt.element.max))
    wanted = jnp.minimum(block_amax * per_element, np.float32(_SCALE.max))
    scale_words = _round_elements(as_word(wanted), _SCALE, "nearest_even")
    factor = jnp.minimum(np.float32(1) / (as_float(scale_words) * decode), _FLOAT32_MAX)
    top = np.float32(fmt.element.max)
    scaled = as_word(jnp.clip(as_float(words) * factor, -top, top))
    rounded = _round_elements(scaled, fmt.element, plan.rounding, draw)
    return rounded, block_codes.codes_of(jnp, scale_words, _SCALE).astype(jnp.uint32), decode


def _round_elements(words: Any, fmt: Format, rounding: str, draw: Any = None) -> Any:
    """Returns float32 words of values in range rounded to `fmt`; a rounding towards zero saturates beyond it."""
    if rounding == "nearest_even" and block_scales.has_fast_path(fmt):
        return block_scales.round_scaled(words, fmt)
    return kernel.round_bits(jnp, FLOAT32, words, fmt.params(overflow="saturate"), rounding, draw)


def _values(blocks: _Quantized, fmt: BlockFormat, tiles: Tiles, dtype: Any) -> jax.Array:
    """Returns the values of rounded blocks, as an array of `dtype`."""
    codes = blocks.scales.astype(jnp.uint32)
    if not fmt.tensor_scale:
        return from_bits(tiles.join(block_scales.multiply(blocks.words, codes)), dtype)
    # A NaN scale makes every product NaN.
    scales = as_float(block_codes.words_of(jnp, codes, _SCALE, as_word))
    words = as_word(as_float(blocks.words) * scales * blocks.tensor_scale)
    return from_bits(tiles.join(_narrowed(words, np.dtype(dtype))), dtype)


def _narrowed(words: Any, dtype: np.dtype) -> Any:
    """Returns float32 words rounded to `dtype`, saturating."""
    if dtype == np.float32:
        return words
    fmt = FORMATS[dtype.name]
    params: FormatParams = within(np, dtype, fmt.params(overflow="saturate"))
    return kernel.round_bits(jnp, FLOAT32, words, params, "nearest_even")

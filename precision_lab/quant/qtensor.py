"""QTensor: an array as it is stored when quantized, a pytree of packed codes and scales."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from precision_lab import formats
from precision_lab.formats import BlockArray, decode_codebook, encode_blocks, encode_codebook
from precision_lab.formats.packing import pack_codes, unpack_codes
from precision_lab.quant import checks
from precision_lab.quant.arithmetic import narrow
from precision_lab.quant.core import Given, Parts, products, quantize_parts
from precision_lab.quant.double import DoubleScales
from precision_lab.quant.numbers import static_params
from precision_lab.quant.parsing import quantizer
from precision_lab.quant.quantizer import Quantizer
from precision_lab.quant.scales import usable
from precision_lab.quant.tiles import Tiles

_WORD_BITS = 16
_DATA = ["packed", "scales", "zero_points", "offsets", "tensor_scale"]
_META = ["quantizer", "shape", "dtype", "axis"]


@partial(jax.tree_util.register_dataclass, data_fields=_DATA, meta_fields=_META)
@dataclass(frozen=True)
class QTensor:
    """A quantized array: a pytree of plain dtypes that any checkpointer can save, and `jit` and `scan` can carry.

    Attributes:
      packed: codes without gaps, uint8 in one axis.
      scales: float32, of the shape of scales: that of the array with the number of runs along each axis. Their codes,
        uint8 or uint16, if the quantizer stores them in another format, as block formats do; `DoubleScales` if they are
        quantized themselves; None where there is no scale.
      zero_points: packed codes of zero, uint8 in one axis; None without.
      offsets: float32, of the shape of scales; None without.
      tensor_scale: float32 scale of the whole array, for NVFP4; None without.
      quantizer: what made it.
      shape: shape of the array.
      dtype: dtype of the values.
      axis: the contracted axes, counted from the front; None where they were not needed.
    """

    packed: Any
    scales: Any
    zero_points: Any
    offsets: Any
    tensor_scale: Any
    quantizer: Quantizer
    shape: tuple[int, ...]
    dtype: np.dtype
    axis: tuple[int, ...] | None

    @property
    def tiles(self) -> Tiles:
        """Returns how elements share scales."""
        return Tiles.of(self.shape, self.quantizer.granularity, self.axis)

    @property
    def codes(self) -> jax.Array:
        """Returns the codes, in the shape of the array: uint8, uint16 or, for wider floats, uint32 bits of float32."""
        return _unpacked(self.packed, _element(self.quantizer), self.shape)

    @property
    def integers(self) -> jax.Array:
        """Returns the codes of an integer format of at most 8 bits as the integers that they are: int8, or uint8."""
        fmt = self.quantizer.code_format
        unused = np.int8(8 - fmt.bits)
        if not fmt.signed:
            return self.codes
        if not unused:
            return jax.lax.bitcast_convert_type(self.codes, jnp.int8)
        # Shifted up and back, the highest bit of the code fills the bits above it.
        return jax.lax.shift_right_arithmetic((self.codes << unused).astype(jnp.int8), unused)

    @property
    def scale(self) -> jax.Array | None:
        """Returns what values are multiplied by, float32 of the shape of scales; None for block formats and casts."""
        if self.quantizer.format.kind == "block" or self.scales is None:
            return None
        if isinstance(self.scales, DoubleScales):
            return usable(self.scales.decode(), self.quantizer)
        if self.quantizer.scale_format == "float32":
            return self.scales
        return formats.format(self.quantizer.scale_format).decode(jnp.asarray(self.scales))

    @property
    def zero_point(self) -> jax.Array | None:
        """Returns the codes of zero as float32 integers of the shape of scales; None without."""
        if self.zero_points is None:
            return None
        codes = _unpacked(self.zero_points, self.quantizer.code_format, self.tiles.scale_shape)
        return self.quantizer.code_format.decode(codes)

    def dequantize(self) -> jax.Array:
        """Returns the values in `dtype`, bit for bit those of `fake_quantize`."""
        return _dequantize(self)

    @property
    def nbytes(self) -> int:
        """Returns the bytes of everything stored: codes, scales, zero points, second scales."""
        return sum(leaf.size * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(self))

    @property
    def bits_per_element(self) -> Fraction:
        """Returns the true bits per element, everything stored included, exactly; 0 without elements."""
        size = int(np.prod(self.shape, dtype=np.int64))
        return Fraction(8 * self.nbytes, size) if size else Fraction(0)


def quantize(
    x: Any,
    qz: Any,
    *,
    axis: int | tuple[int, ...] | None = None,
    key: jax.Array | None = None,
    scale: Any = None,
    zero_point: Any = None,
    offset: Any = None,
    on_nonfinite: str = "nan",
) -> QTensor:
    """Returns `x` as it is stored; arguments and errors as for `fake_quantize`, whose values `dequantize` gives.

    A group with a NaN or an infinity has the scale NaN, since its codes could not tell.
    """
    qz = quantizer(qz)
    x, given = checks.checked(x, qz, key, Given(scale, zero_point, offset))
    checks.refuse_nonfinite(x, on_nonfinite)
    if qz.format.kind == "block":
        axes = checks.block_axes(x.shape, qz, axis)
        return _of_blocks(encode_blocks(x, qz.format, axis=axes, rounding=qz.rounding, key=key), qz)
    tiles = Tiles.of(x.shape, qz.granularity, axis)
    checks.check_shapes(given, tiles, qz)
    return _quantize(x, given, key, qz, tiles, _front(axis, x.ndim))


def _front(axis: int | tuple[int, ...] | None, rank: int) -> tuple[int, ...] | None:
    """Returns axes counted from the front."""
    if axis is None:
        return None
    return tuple(each + rank if each < 0 else each for each in ((axis,) if isinstance(axis, int) else axis))


@partial(jax.jit, static_argnums=(3, 4, 5), inline=True)
def _quantize(x: jax.Array, given: Given, key: Any, qz: Quantizer, tiles: Tiles, axis: Any) -> QTensor:
    """Returns `x` quantized and stored."""
    parts = quantize_parts(x, tiles, given, qz, static_params(qz), key)
    values = tiles.join(parts.values)
    zero_points = None
    if parts.zero_point is not None:
        zero_points = _packed(parts.zero_point, qz.code_format)
        values = tiles.join(parts.values + tiles.spread(parts.zero_point))
    scales = parts.doubled if parts.doubled is not None else parts.scale
    if parts.doubled is None and qz.scale_format != "float32":
        scales = formats.format(qz.scale_format).encode(parts.scale)
    packed = _packed(values, qz.code_format)
    return QTensor(packed, scales, zero_points, parts.offset, None, qz, x.shape, np.dtype(x.dtype), axis)


@jax.jit
def _dequantize(q: QTensor) -> jax.Array:
    """Returns the values of a stored array."""
    qz, tiles = q.quantizer, q.tiles
    if qz.format.kind == "block":
        return BlockArray(q.codes, q.scales, q.tensor_scale, qz.format, q.axis or (), q.dtype).decode()
    values = _values_of(q)
    scale, zero_point = q.scale, q.zero_point
    if scale is not None:
        values = tiles.split(values)
    if zero_point is not None:
        values = values - tiles.spread(zero_point)
    return narrow(products(Parts(values, scale, zero_point, q.offsets), tiles), q.dtype)


def _of_blocks(array: BlockArray, qz: Quantizer) -> QTensor:
    """Returns a block array with its codes packed."""
    packed = pack_codes(array.codes, qz.format.element)
    rest = (array.shape, array.dtype, array.axis)
    return QTensor(packed, array.scales, None, None, array.tensor_scale, qz, *rest)


def _element(qz: Quantizer) -> Any:
    """Returns the format of one code."""
    return qz.format.element if qz.format.kind == "block" else qz.code_format


def _packed(values: jax.Array, fmt: Any) -> jax.Array:
    """Returns the packed codes of values on the grid of `fmt`."""
    if fmt.kind == "codebook":
        return pack_codes(encode_codebook(values, fmt), fmt)
    if fmt.bits > _WORD_BITS:
        return jax.lax.bitcast_convert_type(values, jnp.uint8).reshape(-1)
    return pack_codes(fmt.encode(values), fmt)


def _unpacked(packed: jax.Array, fmt: Any, shape: tuple[int, ...]) -> jax.Array:
    """Returns codes in their shape."""
    packed = jnp.asarray(packed)
    if fmt.kind != "codebook" and fmt.bits > _WORD_BITS:
        return jax.lax.bitcast_convert_type(packed.reshape(*shape, 4), jnp.uint32)
    return unpack_codes(packed, fmt, shape)


def _values_of(q: QTensor) -> jax.Array:
    """Returns the values of the codes of a stored array, float32."""
    fmt = q.quantizer.code_format
    if fmt.kind == "codebook":
        return decode_codebook(q.codes, fmt)
    if fmt.bits > _WORD_BITS:
        return jax.lax.bitcast_convert_type(q.codes, jnp.float32)
    if fmt.kind == "int" and fmt.bits <= 8:
        return q.integers.astype(jnp.float32) * np.float32(fmt.step)  # a power of two
    return fmt.decode(q.codes)

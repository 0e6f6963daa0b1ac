"""Qwix's quantization in our words: quantizers with its grids and scales, and its stored arrays as QTensors.

Nothing here imports Qwix; its objects are read by the names of their attributes.
"""

from __future__ import annotations

import math
import re
from typing import Any

import jax.numpy as jnp
import numpy as np

from precision_lab import formats
from precision_lab.formats.packing import pack_codes
from precision_lab.quant.granularity import Granularity
from precision_lab.quant.qtensor import QTensor
from precision_lab.quant.quantizer import Quantizer

_INTEGER = re.compile(r"int([2-8])")
_AFFINE = ("int4", "int8")


def qwix_quantizer(qtype: Any, method: str = "absmax", shared: Any = "channel") -> Quantizer:
    """Returns the quantizer with the grid and the scale of a Qwix type.

    Its integers use all codes under amax / (2**(bits - 1) - 1/2), our scheme "full_clipped". Qwix takes XLA's
    division, which multiplies by the rounded reciprocal of a broadcast scale, where our quotient is rounded correctly.
    So the codes are the same but for ties: above all a largest element that is negative has the lowest code or the one
    above. `dataclasses.replace(qz, reciprocal=True)` has those of Qwix on CPUs; with "minmax" there are ties left,
    because Qwix adds the zero point before it rounds. Two things are meant to differ: Qwix rounds scales and quotients
    to the dtype of the array, where ours are float32 (one code in ten of bfloat16 arrays differs by one); and a group
    whose scale would be below 1e-19 keeps its values here.

    Args:
      qtype: a type of Qwix's: "int2" to "int8", a float8 or float4 dtype or its name, "nf4".
      method: its calibration: "absmax" or "minmax", and after a comma a factor of at most 1.
      shared: what shares a scale, a granularity or its name.

    Raises:
      ValueError: a type or calibration that no quantizer of ours equals.
    """
    name = qtype if isinstance(qtype, str) else np.dtype(qtype).name
    kind, *factors = (part.strip() for part in method.lower().split(","))
    if kind not in ("absmax", "minmax") or len(factors) > 1:
        raise ValueError(
            f"Qwix's calibration {method!r} has no twin here: 'absmax' and 'minmax' do. For a fixed range give "
            "fake_quantize or quantize its scale=."
        )
    clip = float(factors[0]) if factors else 1.0
    if kind == "minmax" and name not in _AFFINE:
        raise ValueError(f"Qwix's {name!r} has no 'minmax'; {' and '.join(_AFFINE)} do.")
    if name == "nf4":
        return Quantizer("nf4", shared, clip=clip)
    if _INTEGER.fullmatch(name):
        return Quantizer(name, shared, "affine" if kind == "minmax" else "full_clipped", clip=clip)
    if name.startswith(("float8", "float4")) and name != "float8_e8m0fnu":
        return Quantizer(name, shared, clip=clip)
    raise ValueError(
        f"Qwix's {name!r} has no twin here: int2 to int8, float8 and float4 types and nf4 do. Its mxfp8, mxfp4 and "
        "nvfp4 have scales of their own rules, 'int1' is all zeros, and unsigned types clip negative values."
    )


def qtensor_of_qarray(array: Any) -> QTensor:
    """Returns a `qwix.QArray` as a QTensor with the same codes and scales, so that both dequantize to the same bits.

    Args:
      array: an object with `qvalue`, `scale`, `zero_point` and `qtype`; scales by tensor, by channel, or in tiles along
        one axis.

    Raises:
      ValueError: tiles along several axes, or beside an axis that shares a scale as a whole; or another qtype.
    """
    shape, scales = tuple(array.qvalue.shape), jnp.asarray(array.scale)
    shared, axis = _sharing(shape, scales.shape)
    qz = qwix_quantizer(array.qtype, "absmax" if array.zero_point is None else "minmax", shared)
    packed = _packed(array.qvalue, qz)
    zero_points = None if array.zero_point is None else _packed(array.zero_point, qz)
    scale32 = scales.astype(jnp.float32)
    return QTensor(packed, scale32, zero_points, None, None, qz, shape, np.dtype(scales.dtype), axis)


def _sharing(shape: tuple[int, ...], scales: tuple[int, ...]) -> tuple[Granularity, tuple[int, ...] | None]:
    """Returns what shares a scale, and the contracted axes."""
    if math.prod(scales) == 1:
        return Granularity("tensor"), None
    axes: tuple[int, ...] = tuple(i for i, (size, n) in enumerate(zip(shape, scales, strict=True)) if size != n)
    tiled = [i for i in axes if scales[i] > 1]
    if not tiled:
        # Where every axis has scales of its own, one with a single element may be called the contracted one.
        return Granularity("channel"), axes or tuple(i for i, size in enumerate(shape) if size == 1)[:1] or None
    if len(axes) > 1:
        raise ValueError(
            f"scales {scales} of an array {shape} share axes {axes} in tiles; only tiles along one axis, with scales "
            "of its own for every place on the others, are groups here."
        )
    [axis] = tiled
    return Granularity("group", (shape[axis] // scales[axis],)), axes


def _packed(codes: Any, qz: Quantizer) -> Any:
    """Returns Qwix's codes, which are values or numbers of levels, packed as ours."""
    fmt = qz.code_format
    if fmt.kind == "codebook":
        return pack_codes(jnp.asarray(codes).astype(jnp.uint8), fmt)
    return pack_codes(formats.format(fmt).encode(jnp.asarray(codes).astype(jnp.float32)), fmt)

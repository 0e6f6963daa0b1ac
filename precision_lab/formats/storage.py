"""Arrays as they are stored: packed codes with the name of their format, and trees that any checkpointer can save.

Checkpointers know a fixed set of dtypes; TensorStore, under Orbax, has no E8M0, no FP6, no FP4 and no 2-bit integers.
`to_storable` turns every leaf that is in doubt into unsigned bytes and writes down, in JSON types, what they were;
`from_storable` turns them back. Neither touches a file: the tree and the metadata go wherever a run keeps its state.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from precision_lab.formats.block_rounding import BlockArray
from precision_lab.formats.blocks import BlockFormat, block_format
from precision_lab.formats.catalogue import format
from precision_lab.formats.codebooks import Codebook
from precision_lab.formats.packing import pack, pack_codes, unpack, unpack_codes

# Every checkpointer has these; other dtypes of one byte or less are stored as codes.
_PLAIN = ("bool", "int8", "uint8", "bfloat16")


@partial(jax.tree_util.register_dataclass, data_fields=["codes"], meta_fields=["format", "shape", "dtype"])
@dataclass(frozen=True)
class PackedArray:
    """An array as the packed codes of its format; a pytree whose only leaf is uint8.

    Attributes:
      codes: packed codes, uint8 in one axis.
      format: a scalar format of at most 16 bits, or a codebook.
      shape: shape of the array.
      dtype: dtype of the values.
    """

    codes: Any
    format: Any
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Returns the bytes of the packed codes."""
        return self.codes.size

    def decode(self) -> np.ndarray:
        """Returns the values in their dtype."""
        codes = unpack_codes(np.asarray(self.codes), self.format, self.shape)
        with np.errstate(over="ignore", invalid="ignore"):
            return self.format.decode(codes).astype(np.float32).astype(self.dtype)


def pack_array(x: Any, fmt: Any) -> PackedArray:
    """Returns `x`, rounded to a scalar format or codebook to nearest, as packed codes.

    Args:
      x: real array of at most 32 bits per element.
      fmt: a format of at most 16 bits or a codebook, or its name.

    Raises:
      TypeError: `fmt` is a block format, for which there is `encode_blocks`.
      ValueError: as for `Format.encode`.
    """
    fmt = fmt if isinstance(fmt, Codebook) else format(fmt)
    if isinstance(fmt, BlockFormat):
        raise TypeError(f"{fmt.name} is a block format; use encode_blocks, whose result can be stored as it is.")
    array = np.asarray(x)
    return PackedArray(pack_codes(fmt.encode(array), fmt), fmt, array.shape, array.dtype)


def block_bytes(array: BlockArray) -> int:
    """Returns the bytes that `to_storable` gives a block array: packed codes, block scales, array scale."""
    scale = 0 if array.tensor_scale is None else 4
    return -(-array.codes.size * array.format.element.bits // 8) + array.scales.size + scale


def to_storable(tree: Any) -> tuple[Any, dict[str, Any]]:
    """Returns `tree` with nothing in it but plain dtypes, and what `from_storable` needs to undo that.

    Args:
      tree: pytree of arrays, PackedArrays and BlockArrays.

    Returns:
      (tree, metadata): arrays of unusual dtypes and packed or block arrays have become dicts of unsigned arrays;
      metadata is a dict of JSON types from their paths to their descriptions.
    """
    metadata: dict[str, Any] = {}

    def convert(path: Any, leaf: Any) -> Any:
        stored, description = _stored(leaf)
        if description:
            metadata[_name(path)] = description
        return stored

    return jax.tree_util.tree_map_with_path(convert, tree, is_leaf=_is_ours), metadata


def from_storable(tree: Any, metadata: dict[str, Any]) -> Any:
    """Returns the tree that `to_storable` was given; arrays that were converted are NumPy arrays.

    Raises:
      ValueError: `metadata` describes a path that `tree` does not have.
    """
    found: set[str] = set()

    def is_stored(node: Any) -> bool:
        return isinstance(node, dict) and "codes" in node

    def convert(path: Any, leaf: Any) -> Any:
        name = _name(path)
        if name not in metadata:
            return leaf
        found.add(name)
        return _restored({key: np.asarray(value) for key, value in leaf.items()}, metadata[name])

    restored = jax.tree_util.tree_map_with_path(convert, tree, is_leaf=is_stored)
    if missing := set(metadata) - found:
        raise ValueError(f"metadata describes paths that the tree has not: {', '.join(sorted(missing))}.")
    return restored


def _name(path: Any) -> str:
    """Returns a path as text, the same for a dict's key and an object's attribute."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _is_ours(node: Any) -> bool:
    """Returns whether a node of a tree is stored as a whole."""
    return isinstance(node, (PackedArray, BlockArray))


def _stored(leaf: Any) -> tuple[Any, dict[str, Any] | None]:
    """Returns what to store of a leaf, and its description if that is something else."""
    if isinstance(leaf, PackedArray):
        described = {"kind": "packed", "format": _spec(leaf.format), "dtype": leaf.dtype.name}
        return {"codes": leaf.codes}, {**described, "shape": list(leaf.shape)}
    if isinstance(leaf, BlockArray):
        parts = {"codes": pack(leaf.codes, leaf.format.element.bits), "scales": leaf.scales}
        parts |= {} if leaf.tensor_scale is None else {"tensor_scale": leaf.tensor_scale}
        described = {"kind": "block", "format": leaf.format.name, "dtype": leaf.dtype.name}
        return parts, {**described, "shape": list(leaf.shape), "axis": list(leaf.axis)}
    dtype = np.dtype(getattr(leaf, "dtype", np.float32))
    if dtype.itemsize > 1 or dtype.name in _PLAIN or isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf, None
    array = np.asarray(leaf)
    codes = array.view(np.uint8).reshape(array.shape) & np.uint8((1 << _dtype_bits(dtype)) - 1)
    return {"codes": pack(codes, _dtype_bits(dtype))}, {
        "kind": "dtype",
        "dtype": dtype.name,
        "shape": list(array.shape),
    }


def _spec(fmt: Any) -> Any:
    """Returns a format's name, or what makes a codebook of the user's own."""
    if isinstance(fmt, Codebook):
        return {"name": fmt.name, "levels": list(fmt.levels), "ties": fmt.ties, "packed": fmt.packed}
    return fmt.name


def _restored(parts: dict[str, np.ndarray], described: dict[str, Any]) -> Any:
    """Returns the leaf of this description."""
    shape, dtype = tuple(described["shape"]), _dtype(described["dtype"])
    if described["kind"] == "dtype":
        codes = unpack(parts["codes"], _dtype_bits(dtype), shape)
        if dtype.name.startswith("int"):
            # The dtypes of a few signed bits keep the sign in the unused ones.
            shift = 8 - _dtype_bits(dtype)
            return ((codes << shift).view(np.int8) >> shift).astype(dtype)
        return codes.view(dtype)
    if described["kind"] == "packed":
        spec = described["format"]
        fmt = Codebook(**{**spec, "levels": tuple(spec["levels"])}) if isinstance(spec, dict) else format(spec)
        return PackedArray(parts["codes"], fmt, shape, dtype)
    fmt = block_format(described["format"])
    codes = unpack(parts["codes"], fmt.element.bits, shape)
    scale = parts.get("tensor_scale")
    scale = None if scale is None else jnp.asarray(scale)
    axis = tuple(described["axis"])
    return BlockArray(jnp.asarray(codes), jnp.asarray(parts["scales"]), scale, fmt, axis, dtype)


def _dtype(name: str) -> np.dtype:
    """Returns the dtype of this name, those of ml_dtypes included."""
    return np.dtype(getattr(ml_dtypes, name, None) or name)


def _dtype_bits(dtype: np.dtype) -> int:
    """Returns the bits a value of a dtype of at most one byte has."""
    digits = "".join(each if each.isdigit() else " " for each in dtype.name.split("_")[0]).split()
    return int(digits[-1])

"""Number formats: what they are, exact rounding to them, their codes, and what they cost in memory.

Everything here works without JAX except what works on JAX arrays, which is loaded when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from precision_lab.formats.blocks import BLOCK_FORMATS, BlockFormat, block_format
from precision_lab.formats.catalogue import ALIASES, FORMATS, REGISTERED, format, register, register_finder
from precision_lab.formats.codebooks import CODEBOOKS, Codebook, codebook
from precision_lab.formats.options import OVERFLOWS, ROUNDINGS, SUBNORMALS
from precision_lab.formats.params import FormatParams, stack_formats
from precision_lab.formats.scalar import Format

if TYPE_CHECKING:
    from precision_lab.formats.block_rounding import BlockArray, encode_blocks, round_to_blocks
    from precision_lab.formats.casts import cast_through
    from precision_lab.formats.codebook_rounding import decode_codebook, encode_codebook, round_to_codebook
    from precision_lab.formats.randomness import random_bits
    from precision_lab.formats.rounding import round_to
    from precision_lab.formats.storage import PackedArray, from_storable, pack_array, to_storable

__all__ = [
    "ALIASES",
    "BLOCK_FORMATS",
    "CODEBOOKS",
    "FORMATS",
    "OVERFLOWS",
    "REGISTERED",
    "ROUNDINGS",
    "SUBNORMALS",
    "BlockArray",
    "BlockFormat",
    "Codebook",
    "Format",
    "FormatParams",
    "PackedArray",
    "block_format",
    "cast_through",
    "codebook",
    "decode_codebook",
    "encode_blocks",
    "encode_codebook",
    "format",
    "from_storable",
    "pack_array",
    "random_bits",
    "register",
    "register_finder",
    "round_to",
    "round_to_blocks",
    "round_to_codebook",
    "stack_formats",
    "to_storable",
]

# The modules that import JAX, and what they export here.
_LAZY = {
    "block_rounding": ("BlockArray", "encode_blocks", "round_to_blocks"),
    "casts": ("cast_through",),
    "codebook_rounding": ("decode_codebook", "encode_codebook", "round_to_codebook"),
    "randomness": ("random_bits",),
    "rounding": ("round_to",),
    "storage": ("PackedArray", "from_storable", "pack_array", "to_storable"),
}
_HOME = {name: module for module, names in _LAZY.items() for name in names}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Packing and storage: bytes without gaps, and every format through a checkpoint."""

import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from precision_lab import formats
from precision_lab.formats.block_rounding import BlockArray, encode_blocks
from precision_lab.formats.blocks import BLOCK_FORMATS
from precision_lab.formats.codebooks import CODEBOOKS, codebook
from precision_lab.formats.packing import pack, pack_digits, packed_bytes, unpack, unpack_digits
from precision_lab.formats.storage import PackedArray, block_bytes, from_storable, pack_array, to_storable

SMALL = [fmt for fmt in formats.FORMATS.values() if fmt.bits <= 16] + list(CODEBOOKS.values())
DTYPES = [
    *("float8_e5m2", "float8_e4m3fn", "float8_e4m3", "float8_e3m4", "float8_e8m0fnu"),
    *("float8_e5m2fnuz", "float8_e4m3fnuz", "float8_e4m3b11fnuz"),
    *("float6_e3m2fn", "float6_e2m3fn", "float4_e2m1fn", "int4", "int2", "uint4", "uint2"),
]


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 5, 6, 7, 8, 12])
@pytest.mark.parametrize("shape", [(0,), (1,), (7,), (3, 5), (64,), (2, 33)])
def test_packing_loses_nothing_and_no_bit(bits, shape):
    codes = np.random.default_rng(bits).integers(0, 1 << bits, shape).astype(np.uint16)

    packed = pack(codes, bits)

    assert packed.dtype == np.uint8
    assert packed.size == packed_bytes(codes.size, bits) == -(-codes.size * bits // 8)
    np.testing.assert_array_equal(unpack(packed, bits, shape), codes)
    # NumPy's own packing of single bits, lowest first, is the same stream.
    stream = codes.reshape(-1, 1) >> np.arange(bits, dtype=np.uint16) & 1
    np.testing.assert_array_equal(packed, np.packbits(stream.astype(np.uint8).reshape(-1), bitorder="little"))


def test_jax_arrays_pack_alike_under_jit():
    codes = np.random.default_rng(0).integers(0, 8, (5, 7)).astype(np.uint8)

    packed = jax.jit(lambda c: pack(c, 3))(codes)

    np.testing.assert_array_equal(packed, pack(codes, 3))
    np.testing.assert_array_equal(jax.jit(lambda p: unpack(p, 3, (5, 7)))(packed), codes)
    trits = codes % 3
    np.testing.assert_array_equal(jax.jit(lambda c: pack_digits(c, 3, 5))(trits), pack_digits(trits, 3, 5))


@pytest.mark.parametrize("count", [0, 1, 4, 5, 6, 243])
def test_five_trits_share_a_byte(count):
    trits = np.random.default_rng(1).integers(0, 3, count).astype(np.uint8)

    packed = pack_digits(trits, 3, 5)

    assert packed.size == packed_bytes(count, 2, per_byte=5) == -(-count // 5)
    np.testing.assert_array_equal(unpack_digits(packed, 3, 5, (count,)), trits)


def test_nibbles_are_low_then_high():
    np.testing.assert_array_equal(pack(np.uint8([0x1, 0x2, 0xF]), 4), [0x21, 0x0F])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: pack(np.int8([1]), 4), TypeError, "codes are unsigned integers, got int8"),
        (lambda: pack(np.uint8([1]), 0), ValueError, "codes of 1 to 16 bits"),
        (lambda: unpack(np.uint8([1]), 4, (3,)), ValueError, "3 codes of 4 bits take 2 bytes"),
        (lambda: unpack(np.int8([1]), 4, (2,)), TypeError, "packed codes are uint8"),
        (lambda: pack_digits(np.uint8([1]), 3, 6), ValueError, "6 digits of base 3 do not fit a byte"),
        (lambda: pack_array(np.float32([1]), "mxfp4"), TypeError, "use encode_blocks"),
    ],
)
def test_what_cannot_be_packed_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("fmt", SMALL, ids=str)
def test_a_packed_array_takes_the_bytes_accounted_and_decodes_to_the_rounded_one(fmt):
    x = np.random.default_rng(2).standard_normal((3, 11)).astype(np.float32)
    if not (fmt.kind == "codebook" or fmt.min < 0):
        x = np.abs(x)

    packed = pack_array(x, fmt)

    assert packed.nbytes == -(-x.size * fmt.storage_bits // 8) or fmt.storage_bits == 8 / 5
    assert packed.nbytes >= x.size * fmt.storage_bits / 8
    assert packed.decode().dtype == np.float32
    np.testing.assert_array_equal(packed.decode(), fmt.decode(fmt.encode(x)).astype(np.float32))


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_a_block_array_takes_the_bytes_accounted(name):
    encoded = encode_blocks(np.random.default_rng(2).standard_normal((33, 45)).astype(np.float32), name)

    tree, _ = to_storable(encoded)

    stored = sum(leaf.nbytes for leaf in jax.tree.leaves(tree))
    assert stored == block_bytes(encoded) == -(-encoded.format.stored_bits((33, 45)) // 8)


def test_every_format_survives_a_checkpoint(tmp_path):
    x = np.random.default_rng(3).standard_normal((5, 18)).astype(np.float32)
    tree = {
        "plain": {"a": jnp.float32(x), "b": np.arange(3), "bf16": jnp.asarray(x, jnp.bfloat16)},
        "dtypes": {name: every_code(name) for name in DTYPES},
        "packed": {fmt.name.replace(":", "_"): pack_array(np.abs(x), fmt) for fmt in SMALL},
        "own": pack_array(x, codebook([0.5, -1.0, 2.0], name="own levels")),
        "blocks": [encode_blocks(x, name, axis=None) for name in BLOCK_FORMATS],
    }

    stored, metadata = to_storable(tree)
    with ocp.CheckpointManager(tmp_path) as manager:
        manager.save(0, args=ocp.args.Composite(tree=ocp.args.StandardSave(stored), is_=ocp.args.JsonSave(metadata)))
    with ocp.CheckpointManager(tmp_path) as manager:
        args = ocp.args.Composite(tree=ocp.args.StandardRestore(stored), is_=ocp.args.JsonRestore())
        loaded = manager.restore(0, args=args)
    restored = from_storable(loaded["tree"], loaded["is_"])

    ours = (PackedArray, BlockArray)
    before, after = (jax.tree.leaves(each, is_leaf=lambda node: isinstance(node, ours)) for each in (tree, restored))
    for one, other in zip(before, after, strict=True):
        assert isinstance(other, ours) == isinstance(one, ours)
        if isinstance(one, ours):
            assert (one.format, one.shape, one.dtype) == (other.format, other.shape, other.dtype)
            one, other = one.decode(), other.decode()
        assert one.dtype == other.dtype
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


def every_code(name):
    """Returns every code of a dtype of ml_dtypes."""
    dtype = np.dtype(getattr(ml_dtypes, name))
    bits = int(name.split("_")[0][-1])
    codes = np.arange(1 << bits, dtype=np.uint8)
    if name.startswith("int"):
        return (np.arange(1 << bits) - (1 << bits - 1)).astype(dtype)
    return codes.view(dtype)


def test_metadata_is_json_and_must_fit_the_tree():
    tree, metadata = to_storable({"w": pack_array(np.float32([1, -1, 0]), "ternary")})

    assert json.loads(json.dumps(metadata)) == metadata
    with pytest.raises(ValueError, match="paths that the tree has not: w"):
        from_storable({"v": tree["w"]}, metadata)

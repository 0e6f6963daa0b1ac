"""QTensors: what is stored, how many bytes it takes, and that it survives what pytrees go through."""

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from precision_lab import formats
from precision_lab.quant import QTensor, fake_quantize, quantize

RNG = np.random.default_rng(3)
SPECS = ["int8@channel", "int4@group32,affine", "nf4,double", "mxfp4", "nvfp4", "ternary", "bfloat16", "tf32"]
SPECS += ["int4@channel,signed_max,scale=float16", "int3@group7", "uint4,dorefa", "fixed8.4", "float8_e4m3fn@block8x8"]


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape).astype(np.float32))


def test_int8_codes_and_scale_worked_by_hand():
    """Check 1 of JAX quantization; Qwix divides by 127.5."""
    x = jnp.asarray([-1, -0.5, 0, 0.5, 1], jnp.float32)

    stored = quantize(x, "int8")

    np.testing.assert_array_equal(np.asarray(stored.codes).view(np.int8), [-127, -64, 0, 64, 127])
    assert float(stored.scale[0]) == pytest.approx(0.00787402, abs=5e-9)
    assert float(quantize(x, "int8,full_clipped").scale[0]) == pytest.approx(0.00784314, abs=5e-9)


def test_ties_go_to_even_or_away():
    """Check 2 of JAX quantization."""
    x = jnp.asarray([0.5, 1.5, 2.5, -0.5, -1.5], jnp.float32)

    np.testing.assert_array_equal(fake_quantize(x, "int8", scale=1.0), [0, 2, 2, 0, -2])
    np.testing.assert_array_equal(fake_quantize(x, "int8,nearest_away", scale=1.0), [1, 2, 3, -1, -2])


@pytest.mark.parametrize("bits", range(2, 9))
def test_plus_and_minus_the_largest_have_codes_of_equal_magnitude(bits):
    """Check 3 of JAX quantization."""
    fake = fake_quantize(jnp.asarray([-3.0, 3.0, 1.0]), f"int{bits}")

    assert float(fake[0]) == -float(fake[1])
    np.testing.assert_allclose(fake[1], 3, rtol=1e-6)


def test_bfloat16_has_the_codes_of_float32():
    """Check 6 of JAX quantization: none of 4096 differs (Qwix: 9.2 %)."""
    x = normal(64, 64).astype(jnp.bfloat16)

    np.testing.assert_array_equal(
        quantize(x, "int8@channel", axis=0).codes, quantize(x.astype(jnp.float32), "int8@channel", axis=0).codes
    )


def affine_by_the_book(x, bits):
    """Section 2.1 of the notes on a row, in float32, by division."""
    qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    low, high = min(x.min(), np.float32(0)), max(x.max(), np.float32(0))
    scale = np.float32(high - low) / np.float32(qmax - qmin)
    if scale < np.finfo(np.float32).tiny:
        return np.full(x.shape, qmin), np.float32(1), qmin
    zero_point = np.clip(qmin - np.round(low / scale), qmin, qmax)
    return np.clip(np.round(x / scale) + zero_point, qmin, qmax), scale, zero_point


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_affine_codes_are_those_of_the_formula(bits):
    """Check 19: positive, negative, constant, zero and mixed rows; no code differs."""
    x = RNG.normal(size=(60, 33)).astype(np.float32) * np.exp(RNG.normal(size=(60, 1)) * 4).astype(np.float32)
    x[:10], x[10:20], x[20:30], x[30] = np.abs(x[:10]), -np.abs(x[10:20]), x[20:30, :1], 0

    stored = quantize(jnp.asarray(x), f"int{bits}@channel,affine", axis=1)

    decoded = formats.format(f"int{bits}:full").decode(np.asarray(stored.codes))
    for row, codes, scale, zero in zip(x, decoded, stored.scale, stored.zero_point, strict=True):
        expected = affine_by_the_book(row, bits)
        np.testing.assert_array_equal(codes, expected[0])
        np.testing.assert_array_equal([scale[0], zero[0]], [expected[1], expected[2]])


def test_signed_max_makes_the_largest_element_exact_and_uses_every_code():
    x = jnp.asarray([7.0, -1.0, 0.5, -6.0, 2.0, 3.5, 6.2], jnp.float32)

    stored = quantize(x, "int4,signed_max")

    assert float(stored.scale[0]) == -7 / 8
    assert float(stored.dequantize()[0]) == 7
    np.testing.assert_array_equal(
        formats.format("int4:full").decode(np.asarray(stored.codes)), [-8, 1, -1, 7, -2, -4, -7]
    )


def test_power_of_two_scales_are_the_smallest_that_clip_nothing():
    x = jnp.asarray([[7.0, 7.01, 3.5, 0.001]], jnp.float32)

    scale = quantize(x, "int4@channel,pow2", axis=0).scale

    np.testing.assert_array_equal(scale, [[1, 2, 0.5, 2.0**-12]])


@pytest.mark.parametrize(
    ("spec", "shape", "nbytes"),
    [
        ("int8@channel", (64, 16), 64 * 16 + 16 * 4),
        ("int4@group32,affine", (64, 16), 64 * 16 // 2 + 32 * 4 + 32 // 2),
        ("int4@group32", (65, 16), 65 * 16 // 2 + 48 * 4),
        ("int3", (5, 7), 14 + 4),
        ("ternary@channel", (64, 16), 205 + 16 * 4),
        ("binary", (64, 16), 128 + 4),
        ("nf4,double", (1024, 64), 32768 + 1024 + 4 * 4 + 4),
        ("mxfp4", (64, 16), 512 + 32),
        ("nvfp4", (64, 16), 512 + 64 + 4),
        ("bfloat16", (64, 16), 2048),
        ("int4@group32,scale=float8_e4m3fn", (64, 16), 512 + 32),
    ],
)
def test_bytes_are_counted_by_hand_and_really_stored(spec, shape, nbytes):
    """Check 48: what is reported is what the leaves hold."""
    stored = quantize(normal(*shape), spec, axis=0)

    assert stored.nbytes == nbytes
    assert sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(stored)) == nbytes
    assert float(stored.bits_per_element) == nbytes * 8 / (shape[0] * shape[1])
    assert {np.asarray(leaf).dtype.name for leaf in jax.tree.leaves(stored)} <= {"uint8", "uint16", "float32"}


@pytest.mark.parametrize("spec", SPECS)
def test_orbax_gives_back_the_same_bits(spec, tmp_path):
    stored = quantize(normal(37, 18), spec, axis=0)
    checkpointer = ocp.StandardCheckpointer()

    checkpointer.save(tmp_path / "saved", {"w": stored})
    checkpointer.wait_until_finished()
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), {"w": stored})
    restored = checkpointer.restore(tmp_path / "saved", target)["w"]

    assert isinstance(restored, QTensor)
    assert (restored.quantizer, restored.shape, restored.dtype) == (stored.quantizer, stored.shape, stored.dtype)
    np.testing.assert_array_equal(restored.dequantize(), stored.dequantize())


@pytest.mark.parametrize("spec", ["int4@group7,affine", "nf4,double", "mxfp4"])
def test_a_qtensor_is_a_pytree_for_jit_and_scan(spec):
    stored = quantize(normal(14, 6), spec, axis=0)

    through_jit = jax.jit(lambda q: q)(stored)
    carried, outs = jax.lax.scan(lambda q, _: (q, q.dequantize()), stored, None, length=2)

    for each in (through_jit.dequantize(), carried.dequantize(), *outs):
        np.testing.assert_array_equal(each, stored.dequantize())
    assert jax.tree.structure(through_jit) == jax.tree.structure(stored)


def test_a_negative_axis_is_the_same_axis():
    x = normal(6, 8)

    np.testing.assert_array_equal(
        quantize(x, "int4@group4", axis=-1).dequantize(), quantize(x, "int4@group4", axis=1).dequantize()
    )
    np.testing.assert_array_equal(fake_quantize(x, "int4@channel", axis=(-2, -1)), fake_quantize(x, "int4@tensor"))


@pytest.mark.parametrize(
    "spec", ["int4@group5", "nf4@channel", "int4@group5,affine", "float8_e4m3fn@block4x3", "int8,pow2"]
)
def test_quantizing_twice_at_a_fixed_scale_changes_nothing(spec):
    """Check 10 of JAX quantization."""
    x = normal(12, 8)
    stored = quantize(x, spec, axis=0)
    fixed = {"scale": stored.scale, "zero_point": stored.zero_point}

    once = fake_quantize(x, spec, axis=0, **fixed)

    np.testing.assert_array_equal(once, stored.dequantize())
    np.testing.assert_array_equal(fake_quantize(once, spec, axis=0, **fixed), once)


def test_users_levels_are_stored_too():
    book = formats.codebook([-1.0, -0.2, 0.0, 0.3, 1.0], name="mine")
    x = normal(9, 5)

    from precision_lab.quant import Quantizer

    stored = quantize(x, Quantizer(book, "channel"), axis=0)

    levels = np.asarray(x) / np.abs(x).max(0)
    nearest = np.asarray(book.levels)[np.abs(levels[..., None] - np.asarray(book.levels)).argmin(-1)]
    np.testing.assert_allclose(stored.dequantize(), nearest * np.abs(x).max(0), rtol=1e-6)
    assert stored.nbytes == (45 * 3 + 7) // 8 + 5 * 4

"""Codes beside those of torchao and bitsandbytes, which multiply by the reciprocal of a scale; so do we if told."""

import jax.numpy as jnp
import numpy as np
import pytest

from precision_lab import formats
from precision_lab.quant import quantize

BITS, SHAPES = (2, 3, 4, 8), ((4, 32), (3, 33), (2, 128))
SEEDS = range(25)
# A product with the reciprocal is within 1.5 units of the last place of the quotient, and so is a tie from its side.
NEAR_A_TIE = 3 * 2.0**-23


def rows(seed, shape):
    """Returns rows of many sizes, and some that are zero, constant, of one sign, with an outlier, or tiny."""
    rng = np.random.default_rng(seed)
    x = (rng.normal(size=shape) * np.exp(3 * rng.normal(size=(shape[0], 1)))).astype(np.float32)
    special = [x, np.abs(x), -np.abs(x), np.full(shape, x[0, 0]), np.zeros(shape), x * np.float32(1e-30)]
    made = np.float32(special[seed % 6]).copy()
    if seed % 5 == 0:
        made[0, 3] *= 1000
    return made


def ours(x, bits, option="", **given):
    stored = quantize(jnp.asarray(x), f"int{bits}@channel,affine{option}", axis=1, **given)
    codes = formats.format(f"int{bits}:full").decode(np.asarray(stored.codes))
    return np.asarray(codes, np.int64), np.asarray(stored.scale), np.asarray(stored.zero_point, np.int64)


def far_from_ties(x, scale):
    """Returns where no rounding of the quotient could cross a tie, in float64."""
    exact = x.astype(np.float64) / scale.astype(np.float64)
    return np.abs(np.abs(exact - np.floor(exact)) - 0.5) > NEAR_A_TIE * np.maximum(np.abs(exact), 1)


def test_check_19_codes_by_reciprocals_differ_at_ties_alone():
    """300 configurations in numpy's float32: no code differs but where a last place decides a tie, at most .2 %.

    Quotients are rounded correctly, and products with the reciprocal of a scale are those of "reciprocal".
    """
    different = total = 0
    for seed in SEEDS:
        for bits in BITS:
            for shape in SHAPES:
                x = rows(seed, shape)
                codes, scale, zero = ours(x, bits)
                qmin, qmax = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1

                by_reciprocal = np.clip(np.round(x * (np.float32(1) / scale)).astype(np.int64) + zero, qmin, qmax)
                correctly = np.float32(x.astype(np.float64) / scale)  # 53 bits are enough for the second rounding

                np.testing.assert_array_equal(codes, np.clip(np.round(correctly).astype(np.int64) + zero, qmin, qmax))
                np.testing.assert_array_equal(ours(x, bits, ",reciprocal")[0], by_reciprocal)
                apart = codes != by_reciprocal
                assert not np.any(apart & far_from_ties(x, scale)), (seed, bits, shape)
                assert np.abs(codes - by_reciprocal).max() <= 1
                different, total = different + apart.sum(), total + x.size
    assert different <= 0.002 * total


def test_check_19_codes_are_those_of_torchao():
    """The same 300, torchao's own kernels: scales and zero points too, but for a last place of the range's quotient.

    At torchao's scales and zero points, no code differs from those of "reciprocal".
    """
    torch = pytest.importorskip("torch", reason="torchao is no dependency")
    primitives = pytest.importorskip("torchao.quantization.quant_primitives", reason="torchao is no dependency")

    zeros = 0
    for seed in SEEDS:
        for bits in BITS:
            for shape in SHAPES:
                x = rows(seed, shape)
                codes, scale, zero = ours(x, bits)
                limits = {"quant_min": -(2 ** (bits - 1)), "quant_max": 2 ** (bits - 1) - 1}
                block, tensor = (1, shape[1]), torch.from_numpy(x)

                s, z = primitives.choose_qparams_affine(
                    tensor, primitives.MappingType.ASYMMETRIC, block, torch.int8, **limits, scale_dtype=torch.float32
                )
                q = primitives.quantize_affine(tensor, block, s, z, torch.int8, **limits).numpy()

                empty = ~x.any(1)  # torchao's scale of nothing is the smallest normal number, ours is one
                s, z = s.numpy()[:, None], z.numpy()[:, None]
                np.testing.assert_allclose(s[~empty], scale[~empty], rtol=2.0**-23)
                alike = far_from_ties(np.minimum(x.min(1, keepdims=True), 0), scale) & ~empty[:, None]
                np.testing.assert_array_equal(z[alike], zero[alike])
                same = alike & far_from_ties(x, scale)
                np.testing.assert_array_equal(q[same], codes[same])
                np.testing.assert_array_equal((q - z)[empty], 0)
                given = {"scale": jnp.asarray(s), "zero_point": jnp.asarray(z, jnp.float32)}
                np.testing.assert_array_equal(ours(x, bits, ",reciprocal", **given)[0], q)
                zeros += empty.sum()
    assert zeros > 0


def nf4_weights():
    """Returns blocks of 64 of many sizes and shapes of distribution, one of zeros."""
    rng = np.random.default_rng(3)
    x = np.concatenate([rng.normal(size=1 << 15), rng.laplace(size=1 << 14), rng.uniform(-1, 1, 1 << 14)])
    x = (x.reshape(-1, 64) * np.exp(rng.normal(size=(len(x) // 64, 1)))).astype(np.float32)
    x[7] = 0
    return x


LEVELS = np.float32(formats.format("nf4").levels)
MIDDLES = (LEVELS[1:].astype(np.float64) + LEVELS[:-1]) / 2


def far_from_middles(x):
    units = x.astype(np.float64) / np.where(x.any(1), np.abs(x).max(1), 1)[:, None]
    return np.abs(units[..., None] - MIDDLES).min(-1) > 2.0**-22


def test_check_19_nf4_codes_are_those_of_the_formula_of_bitsandbytes():
    """Codes are how many midpoints lie below w (1 / amax), in numpy's float32; its bytes have the first code on top."""
    x = nf4_weights()
    amax = np.abs(x).max(1, keepdims=True)

    stored = quantize(jnp.asarray(x), "nf4@channel", axis=1)

    units = np.clip(x * (np.float32(1) / np.maximum(amax, np.float32(1e-38))), -1, 1)
    codes = np.sum(units[..., None] > np.float32(MIDDLES), -1)
    np.testing.assert_array_equal(np.asarray(stored.codes)[far_from_middles(x)], codes[far_from_middles(x)])
    assert far_from_middles(x).mean() > 0.9999
    np.testing.assert_array_equal(quantize(jnp.asarray(x), "nf4@channel,reciprocal", axis=1).codes, codes)
    np.testing.assert_array_equal(stored.scale, np.where(amax > 0, amax, 1))


def test_check_19_nf4_bytes_are_those_of_torchao():
    torch = pytest.importorskip("torch", reason="torchao is no dependency")
    nf4 = pytest.importorskip("torchao.quantization.quantize_.workflows.nf4.nf4_tensor", reason="no dependency")
    x = nf4_weights()
    x = x[x.any(1)]  # torchao divides by a zero scale

    packed = nf4.NF4Tensor.convert_to_norm_float_weight(torch.from_numpy(x), len(x), 64, torch.from_numpy(LEVELS))

    stored = quantize(jnp.asarray(x), "nf4@channel", axis=1)
    codes = np.asarray(stored.codes).reshape(-1, 2)
    same = far_from_middles(x).reshape(-1, 2).all(1)
    np.testing.assert_array_equal((codes[:, 0] << 4 | codes[:, 1])[same], packed.numpy().ravel()[same])

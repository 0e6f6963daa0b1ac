"""The one law of the package: fake quantization is quantization, stored or not, bit for bit."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from precision_lab import formats
from precision_lab.quant import fake_quantize, quantize, quantizer

SCALARS = [name for name in formats.FORMATS if name not in ("float64", "float8_e8m0fnu")]
SHARED = itertools.cycle(["", "@channel", "@group7", "@block8x5"])
SPECS = [
    *(name + (next(SHARED) if quantizer(name).is_scaled else "") for name in SCALARS),
    *("int3@group32", "int5@group7", "int8@block4x16", "uint4@group5,affine", "fixed8.4", "e3m2@token", "e5m3:bias=12"),
    *(f"int4@{shared},{scheme}" for shared in ("tensor", "group16") for scheme in ("full_clipped", "affine", "pow2")),
    *("int8@channel,affine", "int4@group32,signed_max", "int4@group32,signed_max,scale=float16", "int8,full"),
    *("int4@group16,affine,scale=bfloat16", "int4@group7,double", "float8_e4m3fn@group16,pow2,scale=float8_e5m2"),
    *("nf4", "nf4,double", "nf4@channel", "bnb_fp4", "dynamic8@tensor", "ternary", "ternary@channel", "binary@channel"),
    *("mxfp8", "mxfp6_e3m2", "mxfp4:rceil", "mxint8", "nvfp4", "nvfp4_2d", "bfp8@16"),
    *("int4@channel,mse", "nf4@group16,mse", "uint4@group16,affine,mse", "int4@channel,percentile99", "int4,kl"),
    *("int4@channel,affine,percentile90", "int4,aciq", "int4@channel,affine,aciq", "int4,aciq_normal", "int4,ema"),
    *("int2@channel,absmean", "int4,calibration=lsq", "int4@channel,clip=0.7", "int4@group16,lsq", "uint4,dorefa"),
    *(
        "int4@group7,affine,reciprocal",
        "nf4,reciprocal,double",
        "int4@channel,mse,reciprocal",
        "ternary,twn,reciprocal",
    ),
    *("int4@channel,stochastic", "uint8@group7,affine,stochastic", "mxfp4,stochastic", "int4,toward_zero"),
]


def data(dtype, shape=(37, 18), *, seed=0):
    x = np.random.default_rng(seed).normal(size=shape) * 3
    x[:, 1] = 0
    x[:, 2] = 1e-41
    x[:, 3] = 5
    x[:, 4] *= 1e-4
    x[5:, 5] = -0.0
    return jnp.asarray(x.astype(np.float32)).astype(dtype)


def assert_same_bits(a, b):
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    a, b = (np.asarray(each).view(f"u{each.dtype.itemsize}") for each in (a, b))
    np.testing.assert_array_equal(a, b)


def fit(x, spec):
    """Returns data that the quantizer takes: unsigned formats have no negative values."""
    qz = quantizer(spec)
    unsigned = qz.format.kind == "int" and not qz.format.signed and qz.scheme == "symmetric" and qz.estimator == "ste"
    key = jax.random.key(3) if qz.rounding == "stochastic" else None
    return (jnp.abs(x) if unsigned else x), key


DTYPES = itertools.cycle([jnp.float32, jnp.bfloat16, jnp.float16])


@pytest.mark.parametrize(("spec", "dtype"), [(spec, next(DTYPES)) for spec in SPECS], ids=SPECS)
def test_fake_quantization_is_what_is_stored_and_read_again(spec, dtype):
    """Shapes are ragged, and columns of zeros, subnormals and constants among the data."""
    x, key = fit(data(dtype), spec)

    fake = fake_quantize(x, spec, axis=0, key=key)
    real = quantize(x, spec, axis=0, key=key).dequantize()

    assert_same_bits(fake, real)
    assert np.isfinite(np.asarray(fake, np.float32)).all()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("spec", ["int4@group7,affine", "nf4,double", "int8@channel,mse", "float8_e5m2@block8x5"])
def test_one_program_with_sums_behind_the_products_changes_no_bit(spec, dtype):
    x = data(dtype)

    together = jax.jit(lambda x: (fake_quantize(x, spec, axis=0) + x, quantize(x, spec, axis=0).dequantize() + x))(x)

    expected = fake_quantize(x, spec, axis=0) + x
    for each in together:
        assert_same_bits(each, expected)


@pytest.mark.parametrize(
    "spec", ["int8", "int4@channel,affine", "nf4", "mxfp4", "nvfp4", "int4@group4,double", "binary"]
)
@pytest.mark.parametrize("shape", [(1,), (5,), (1, 1), (0, 3), (3, 0), (2, 0, 3), (130, 3)])
def test_shapes_of_no_and_one_element_are_stored_too(spec, shape):
    x = jnp.asarray(np.random.default_rng(1).normal(size=shape).astype(np.float32))

    stored = quantize(x, spec, axis=0)

    assert stored.codes.shape == shape
    assert_same_bits(fake_quantize(x, spec, axis=0), stored.dequantize())


@pytest.mark.parametrize("spec", ["nvfp4", "nvfp4_2d", "nvfp4,stochastic", "nf4@group16,double", "int8@tensor,mse"])
def test_a_batch_of_arrays_is_quantized_array_by_array(spec):
    """What is found once in a whole array, as NVFP4's second scale, is found in every example by itself."""
    x = jnp.stack([data(jnp.float32, seed=seed) * 10.0**seed for seed in range(3)])
    keys = jax.random.split(jax.random.key(1), 3)

    def both(x, key):
        key = key if quantizer(spec).rounding == "stochastic" else None
        return fake_quantize(x, spec, axis=0, key=key), quantize(x, spec, axis=0, key=key).dequantize()

    for found, expected in zip(jax.jit(jax.vmap(both))(x, keys), zip(*map(both, x, keys), strict=True), strict=True):
        assert_same_bits(found, jnp.stack(expected))

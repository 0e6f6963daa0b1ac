"""The one law of the package: fake quantization is quantization, stored or not, bit for bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from precision_lab import formats
from precision_lab.quant import fake_quantize, quantize, quantizer

SCALARS = [name for name in formats.FORMATS if name not in ("float64", "float8_e8m0fnu")]
SPECS = [
    *SCALARS,
    *(f"{name}@channel" for name in SCALARS if formats.format(name).bits <= 8 and ":" not in name),
    *("int3@group32", "int5@group7", "int8@block4x16", "uint4@group5,affine", "fixed8.4", "e3m2@token", "e5m3:bias=12"),
    *(f"int4@{shared},{scheme}" for shared in ("tensor", "group16") for scheme in ("full_clipped", "affine", "pow2")),
    *("int8@channel,affine", "int4@group32,signed_max", "int4@group32,signed_max,scale=float16", "int8,full"),
    *("int4@group16,affine,scale=bfloat16", "int4@group7,double", "float8_e4m3fn@group16,pow2,scale=float8_e5m2"),
    *("nf4", "nf4,double", "nf4@channel", "bnb_fp4", "dynamic8@tensor", "ternary", "ternary@channel", "binary@channel"),
    *("mxfp8", "mxfp6_e3m2", "mxfp4:rceil", "mxint8", "nvfp4", "nvfp4_2d", "bfp8@16"),
    *("int4@channel,mse", "nf4@group16,mse", "uint4@group16,affine,mse", "int4@channel,percentile99", "int4,kl"),
    *("int4@channel,affine,percentile90", "int4,aciq", "int4@channel,affine,aciq", "int4,aciq_normal", "int4,ema"),
    *("int2@channel,absmean", "int4,calibration=lsq", "int4@channel,clip=0.7", "int4@group16,lsq", "uint4,dorefa"),
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


@pytest.mark.parametrize("spec", SPECS)
def test_fake_quantization_is_what_is_stored_and_read_again(spec):
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        x, key = fit(data(dtype), spec)

        fake = fake_quantize(x, spec, axis=0, key=key)
        real = quantize(x, spec, axis=0, key=key).dequantize()

        assert_same_bits(fake, real)
        assert np.isfinite(np.asarray(fake, np.float32)).all()

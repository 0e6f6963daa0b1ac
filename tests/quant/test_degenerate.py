"""Groups of zeros, tiny groups, and groups with a NaN; numbers in names are those of notes on peers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from precision_lab.quant import fake_quantize, quantize, quantizer
from tests.jaxprs import equations

SPECS = ["int8@channel", "int4@channel,affine", "int8@channel,full", "int4@channel,signed_max", "int4@channel,pow2"]
SPECS += [
    "int4@group3,double",
    "nf4@channel",
    "nf4,double",
    "ternary@channel",
    "binary@channel",
    "float8_e4m3fn@channel",
]
SPECS += ["float4_e2m1fn@group2", "int4@channel,mse", "int4@channel,percentile99", "int4@channel,kl", "mxfp4", "nvfp4"]
SPECS += ["int4@channel,aciq", "int4@channel,calibration=lsq", "uint4@channel,affine", "uint4,dorefa"]
CLIPPING = ["clipped", "tanh", "ewgs", "lsq", "pact"]


@pytest.mark.parametrize("spec", [*SPECS, *(f"int4@channel,{estimator}" for estimator in CLIPPING)])
def test_groups_of_zeros_become_exact_zeros_with_finite_gradients(spec):
    """Check 15 of quantization, 4 of JAX quantization."""
    x = jnp.zeros((6, 4))

    value, gradient = jax.value_and_grad(lambda x: jnp.sum(fake_quantize(x, spec, axis=0) * 3))(x)

    assert value == 0
    assert np.isfinite(gradient).all()
    assert not np.any(quantize(x, spec, axis=0).dequantize())


@pytest.mark.parametrize("spec", [spec for spec in SPECS if "@channel" in spec and "kl" not in spec])
def test_a_zero_channel_beside_others_stays_zero(spec):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)).at[:, 2].set(0)

    fake = np.asarray(fake_quantize(x, spec, axis=0))

    assert not fake[:, 2].any()
    assert fake[:, [0, 1, 3]].any(0).all()


@pytest.mark.parametrize("spec", ["int8@channel", "int8@channel,full"])
def test_a_channel_of_tiny_values_keeps_its_precision(spec):
    """Check 4 of JAX quantization: relative error at most 1/254 of the largest."""
    x = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (64, 2)) * [1e-20, 1], jnp.float32)

    error = np.abs(fake_quantize(x, spec, axis=0) - x)[:, 0].max()

    assert error <= 1e-20 / 254 * 1.0001


@pytest.mark.parametrize("tiny", [1e-45, 1e-40, 1e-38])
def test_what_is_too_small_for_a_scale_becomes_zero(tiny):
    fake = fake_quantize(jnp.full((4, 2), tiny, jnp.float32), "int8@channel", axis=0)

    assert not np.any(fake)


@pytest.mark.parametrize("spec", [spec for spec in SPECS if "@channel" in spec])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_nan_or_infinity_is_seen_in_its_channel_and_in_no_other(spec, bad):
    """Check 5 of JAX quantization."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)).at[3, 1].set(bad)

    fake = np.asarray(fake_quantize(x, spec, axis=0))

    np.testing.assert_array_equal(np.isnan(fake), np.arange(4)[None] == np.full((6, 1), 1))
    np.testing.assert_array_equal(fake, quantize(x, spec, axis=0).dequantize())


@pytest.mark.parametrize("run", [fake_quantize, quantize])
@pytest.mark.parametrize("spec", ["int8@channel", "nf4", "mxfp4", "bfloat16"])
def test_nonfinite_numbers_raise_if_that_is_asked_for(run, spec):
    """Check 5 of JAX quantization: on_nonfinite="raise"; how many and where."""
    x = jnp.ones((6, 4), jnp.bfloat16)
    bad = x.at[3, 1].set(jnp.nan).at[5, 0].set(-jnp.inf)

    run(x, spec, axis=0, on_nonfinite="raise")
    run(bad, spec, axis=0)
    with pytest.raises(
        ValueError, match=r"2 of 24 elements are NaN or infinite in an array \(6, 4\), the first at \(3, 1\)"
    ):
        run(bad, spec, axis=0, on_nonfinite="raise")
    with pytest.raises(ValueError, match="looks at values, which a traced array has not"):
        jax.jit(lambda x: run(x, spec, axis=0, on_nonfinite="raise"))(x)
    with pytest.raises(ValueError, match="on_nonfinite='ignore' must be one of nan, raise"):
        run(x, spec, axis=0, on_nonfinite="ignore")


@pytest.mark.parametrize(
    ("spec", "looks"), [("int8@channel", 1), ("float8_e4m3fn", 1), ("nf4", 1), ("int8,full", 2), ("int8,affine", 2)]
)
def test_an_array_is_looked_through_as_often_as_its_scheme_needs(spec, looks):
    """Once for the largest magnitude, twice for the smallest and the largest value."""
    jaxpr = jax.make_jaxpr(lambda x: fake_quantize(x, spec, axis=0))(jnp.ones((64, 4)))

    assert sum(eqn.primitive.name.startswith("reduce_m") for eqn in equations(jaxpr)) == looks


def test_a_nan_under_a_given_scale_is_seen_too():
    x = jnp.ones((4, 2)).at[0, 1].set(np.nan)

    fake = np.asarray(fake_quantize(x, "int8@channel", axis=0, scale=0.1))

    assert np.isnan(fake[:, 1]).all()
    assert np.isfinite(fake[:, 0]).all()


def test_a_constant_is_exact_where_the_grid_has_its_end():
    """Check 16 of quantization: constant 5, INT8; the divisor 127.5 errs by half a step, 5 / 255 = .0196."""
    x = jnp.full((8,), 5.0)

    np.testing.assert_allclose(fake_quantize(x, "int8,affine"), 5, rtol=2e-7)
    np.testing.assert_allclose(fake_quantize(x, "int8,full"), 5, rtol=2e-7)
    np.testing.assert_allclose(5 - fake_quantize(x, "int8,full_clipped"), 0.0196, atol=1e-4)


def test_a_single_outlier_is_clipped_by_one_scheme_only():
    """Check 17 of quantization: 1000 among 1e-3 errs by 3.92 with the divisor 127.5."""
    x = jnp.full((256,), 1e-3).at[7].set(1000)

    assert abs(1000 - fake_quantize(x, "int8,full_clipped")[7] - 3.92) < 0.01
    assert abs(1000 - fake_quantize(x, "int8,full")[7]) <= 1e-3


@pytest.mark.parametrize("spec", ["uint8", "uint4@channel", "uint4,clipped"])
def test_unsigned_formats_refuse_negative_values(spec):
    """Check 8 of JAX quantization."""
    with pytest.raises(ValueError, match=r"has no negative values, but the smallest of .* is -2"):
        fake_quantize(jnp.asarray([[1.0, -2.0]]), spec, axis=0)
    with pytest.raises(ValueError, match="Say 'affine'"):
        quantize(jnp.asarray([[1.0, -2.0]]), spec, axis=0)


def test_binary_is_never_zero_but_for_zeros():
    """Check 8 of JAX quantization."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32))

    fake = fake_quantize(x, "binary@channel", axis=0)

    assert np.all(fake != 0)
    np.testing.assert_array_equal(np.sign(fake), np.where(x >= 0, 1, -1))


@pytest.mark.parametrize("largest", [3e38, 1e30])
def test_affine_ranges_beyond_half_of_float32_are_finite(largest):
    x = jnp.asarray([-largest, 0, largest], jnp.float32)

    fake = np.asarray(fake_quantize(x, "int8,affine"))

    np.testing.assert_allclose(fake, x, atol=largest / 100)


def test_float16_results_stay_in_its_range():
    x = jnp.asarray([-300.0, 65504, 65000], jnp.float16)

    assert np.isfinite(np.asarray(fake_quantize(x, "int4,affine"), np.float32)).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"qz": "int4,stochastic"}, "needs key="),
        ({"qz": "int4", "key": jax.random.key(0)}, "is for rounding 'stochastic'"),
        ({"qz": "bfloat16", "scale": 1.0}, "leave out scale="),
        ({"qz": "int4", "scale": 1.0, "zero_point": 1}, "is for scheme 'affine'"),
        ({"qz": "int4,affine", "scale": 1.0}, "needs zero_point="),
        ({"qz": "int4", "scale": 1.0, "offset": 1.0}, r"is for estimator 'lsq\+'"),
        ({"qz": "int4", "scale": np.ones(3)}, r"scale= has shape \(3,\), but scales .* have \(1, 1\)"),
        ({"qz": "int4@channel"}, "needs axis="),
        ({"qz": "mxfp4"}, "needs axis="),
    ],
)
def test_arguments_without_use_are_refused(arguments, message):
    x = jnp.ones((4, 2))
    qz = quantizer(arguments.pop("qz"))

    for function in (fake_quantize, quantize):
        with pytest.raises(ValueError, match=message):
            function(x, qz, **arguments)


@pytest.mark.parametrize("x", [np.ones(3), np.ones(3, np.int32), [1.0], 1.0])
def test_arrays_of_other_dtypes_are_refused(x):
    with pytest.raises(TypeError, match="float16, bfloat16 or float32"):
        fake_quantize(x, "int8")


@pytest.mark.parametrize("fmt", ["nf4@channel", "int8@channel", "int4@channel,affine"])
@pytest.mark.parametrize("size", [2.0**127, 2.0**126, 2.0**-100])
def test_a_scale_whose_reciprocal_is_no_normal_number_serves_as_well(fmt, size):
    """All of a tensor of huge values would be zero. Powers of two, so the values are those of the tensor of ones."""
    x = jnp.float32([[1.0, -1.0, 0.5, 0.0]])

    found = fake_quantize(x * np.float32(size), f"{fmt},reciprocal", axis=1)

    np.testing.assert_array_equal(found, fake_quantize(x, f"{fmt},reciprocal", axis=1) * np.float32(size))

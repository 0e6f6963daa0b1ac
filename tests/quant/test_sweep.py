"""The numbers of quantizers, traced: one program for a sweep, and the results of separate ones."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from precision_lab.formats import ROUNDINGS
from precision_lab.quant import fake_quantize, quantizer, quantizer_params, stack_quantizers

X = jnp.asarray(np.random.default_rng(0).normal(size=(37, 6)).astype(np.float32))


@pytest.mark.parametrize(
    "specs",
    [
        [f"int{bits}@group8" for bits in (2, 3, 4, 6, 8, 16)],
        [f"int{bits}@channel,affine" for bits in (2, 4, 8)],
        [f"int{bits}@channel,full,clip={clip}" for bits, clip in ((2, 0.5), (4, 0.9), (8, 1.0))],
        [f"int{bits}@channel,signed_max" for bits in (3, 4)],
        [f"int{bits}@channel,aciq" for bits in (2, 4)],
        [f"int{bits}@channel,mse" for bits in (2, 4)],
        ["float8_e4m3fn@channel", "float8_e5m2@channel", "e3m2@channel", "float4_e2m1fn@channel", "int4@channel"],
        ["int4@channel,lsq", "int2@channel,lsq"],
        ["int4@channel,ewgs=0.1", "int4@channel,ewgs=0.5"],
    ],
    ids=lambda specs: specs[0],
)
def test_vmapped_traced_and_static_quantizers_agree(specs):
    """Checks 24 and 25 of JAX quantization, which ask for 1e-5; here bit for bit."""
    common, params = stack_quantizers(specs)

    def both(p):
        return jax.value_and_grad(lambda x: jnp.sum(fake_quantize(x, common, axis=0, params=p) * X))(X)

    together = jax.jit(jax.vmap(lambda p: fake_quantize(X, common, axis=0, params=p)))(params)
    gradients = jax.vmap(both)(params)[1]

    for spec, fake, gradient in zip(specs, together, gradients, strict=True):
        np.testing.assert_array_equal(fake, fake_quantize(X, spec, axis=0))
        expected = jax.grad(lambda x, spec=spec: jnp.sum(fake_quantize(x, spec, axis=0) * X))(X)
        np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)


def test_a_sweep_over_widths_compiles_once():
    """Check 24 of JAX quantization."""
    traces, compiled = [], []
    params = [quantizer_params(f"int{bits}@channel") for bits in range(2, 9)]

    @jax.jit
    def run(params):
        traces.append(1)
        return fake_quantize(X, "int8@channel", axis=0, params=params)

    jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: compiled.append(event))
    for each in params:
        run(each)

    assert len(traces) == 1
    assert sum("backend_compile" in event for event in compiled) == 1


def test_the_scale_may_be_traced():
    fake = jax.jit(lambda s: fake_quantize(X, "int4", scale=s))(0.25)

    np.testing.assert_array_equal(fake, np.clip(np.round(X / np.float32(0.25)), -7, 7) * np.float32(0.25))


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (["int4@channel", "int4@tensor"], "differ in more than numbers"),
        (["int4@channel", "uint4@channel"], "differ in more than numbers"),
        (["nf4"], "cannot be traced"),
        (["int4,kl"], "cannot be traced"),
        (["bfloat16"], "cannot be traced"),
        ([], "at least one"),
    ],
)
def test_what_is_structure_cannot_be_stacked(specs, message):
    with pytest.raises(ValueError, match=message):
        stack_quantizers(specs)


def test_params_of_no_use_are_refused():
    with pytest.raises(ValueError, match="params= are for scaled scalar formats"):
        fake_quantize(X, quantizer("nf4"), axis=0, params=quantizer_params("int4"))


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("name", ["int2", "int3", "int4:full", "int8", "int16", "uint2", "uint8"])
def test_integers_need_no_more_than_the_ends_of_their_grid(name, rounding):
    """Subnormals, both zeros, infinities and NaN included; the scale is one, so that all of them arrive."""
    edges = [0.0, -0.0, 0.5, -0.5, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 1e30, -1e30]
    x = np.concatenate([np.arange(-600, 600) / 4, np.linspace(-1e-38, 1e-38, 500), edges]).astype(np.float32)
    x = np.abs(x) if name[0] == "u" else x
    qz = quantizer(f"{name}@tensor,{rounding}")
    widest = quantizer(f"{'uint16' if name[0] == 'u' else 'int16'}@tensor,{qz.scheme},{rounding}")
    key = jax.random.key(0) if rounding == "stochastic" else None
    ends = quantizer_params(qz)._replace(format=None)

    found = jax.jit(lambda p: fake_quantize(x, widest, scale=1.0, key=key, params=p))(ends)

    expected = jax.jit(lambda: fake_quantize(x, qz, scale=1.0, key=key))()
    np.testing.assert_array_equal(np.asarray(found).view(np.uint32), np.asarray(expected).view(np.uint32))


def test_ends_alone_do_not_describe_a_float():
    with pytest.raises(ValueError, match="params= are for scaled scalar formats"):
        fake_quantize(X, "e4m3@channel", axis=0, params=quantizer_params("int4@channel")._replace(format=None))

"""Acceptance checks of quantized products and block formats that no other file holds; numbers are the notes'.

Sampling errors are four standard errors unless a test says otherwise.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from precision_lab.nn import apply_policy
from precision_lab.quant import fake_quantize
from tests.jaxprs import assert_same_bits

RNG = np.random.default_rng(21)
W, X = (RNG.standard_normal(shape, np.float32) for shape in ((256, 64), (128, 256)))
RULES = ("floor", "even", "rceil", "ceil")


def relative_error(out, exact):
    return float(np.linalg.norm(out - exact) / np.linalg.norm(exact))


CALLS = {
    "@": lambda w, x: x @ w,
    "jnp.dot": lambda w, x: jnp.dot(x, w),
    "jnp.matmul": lambda w, x: jnp.matmul(x, w),
    "a jitted helper": jax.jit(lambda w, x: x @ w),
}


@pytest.mark.parametrize("first", ["plain", "quantized"])
@pytest.mark.parametrize("name", CALLS)
def test_a_policy_on_a_function_is_not_remembered_by_the_function(name, first):
    """Check 16 of JAX quantization; .24 +- .02 is the error of int3 in groups of 128 with Qwix's scale."""
    fn = CALLS[name]
    quantized = apply_policy(fn, "weight=int3@group128,full_clipped")
    order = {"plain": (fn, quantized), "quantized": (quantized, fn)}[first]

    found = {id(each): each(W, X) for each in order}

    assert relative_error(found[id(fn)], X @ W) < 1e-6
    assert relative_error(found[id(quantized)], X @ W) == pytest.approx(0.24, abs=0.02)


def test_a_second_width_on_the_same_shapes_is_not_the_first():
    """Check 17: against a product of operands quantized one by one, in float64."""
    for bits in (8, 2):
        out = apply_policy(CALLS["@"], f"weight=int{bits}@channel,activation=int8@token")(W, X)

        w, x = fake_quantize(W, f"int{bits}@channel", axis=0), fake_quantize(X, "int8@token", axis=1)
        expected = np.asarray(x, np.float64) @ np.asarray(w, np.float64)
        assert relative_error(out, X @ W) == pytest.approx(relative_error(expected, X @ W), rel=1e-3)


def test_an_activation_of_the_shape_of_the_weight_is_no_weight():
    """Check 18: batch 64 into 64 x 64."""
    w, x = W[:64], X[:64, :64]
    quantized = apply_policy(CALLS["@"], "weight=int4@channel,activation=int8@token")

    errors = [relative_error(quantized(w, rows), rows @ w) for rows in (x, x[:32])]

    assert errors[0] == pytest.approx(errors[1], rel=0.2)


def test_a_function_and_a_model_of_it_are_quantized_alike():
    """Check 20."""
    model = nnx.Linear(256, 64, use_bias=False, rngs=nnx.Rngs(0))
    policy = "weight=int4@group32,activation=int8@token"

    of_model = apply_policy(model, policy)(X)
    of_function = apply_policy(lambda tree, x: x @ tree["kernel"], policy)({"kernel": model.kernel.get_value()}, X)

    np.testing.assert_allclose(of_model, of_function, rtol=1e-6, atol=1e-6)


def test_four_bits_by_four_bits_run_forward_and_backward():
    """Check 22: .10 to .14 on (8, 32) @ (32, 16) normal numbers, with the scale of Qwix; mean of 32 draws."""
    quantized = apply_policy(CALLS["@"], "weight=int4@channel,full_clipped,activation=int4@token,full_clipped")
    w, x = jnp.asarray(W.reshape(32, 32, 16)), jnp.asarray(X[:32].reshape(32, 8, 32))

    out = jax.jit(jax.vmap(quantized))(w, x)
    gradients = jax.grad(lambda w, x: jnp.sum(quantized(w, x) ** 2), (0, 1))(w[0], x[0])

    errors = [relative_error(each, exact) for each, exact in zip(out, x @ w, strict=True)]
    assert 0.10 < np.mean(errors) < 0.14
    assert all(bool(jnp.isfinite(each).all()) and bool(jnp.any(each)) for each in gradients)


@pytest.mark.parametrize("length", [32, 128, 256])
@pytest.mark.parametrize("name", ["mxfp8", "mxfp4", "nvfp4"])
def test_block_formats_run_forward_and_backward_at_every_length(name, length):
    """Check 23; MXFP8 errs by .037 +- .01 at 256, both operands quantized."""
    quantized = apply_policy(CALLS["@"], f"weight={name},activation={name}")
    w, x = W[:length], X[:, :length]

    out, pullback = jax.vjp(jax.jit(quantized), w, x)

    assert all(bool(jnp.isfinite(each).all()) for each in pullback(out))
    if (name, length) == ("mxfp8", 256):
        assert relative_error(out, x @ w) == pytest.approx(0.037, abs=0.01)


def test_a_quantizing_policy_leaves_parameters_as_they_are():
    """Check 28, but for its checkpoint."""
    model = nnx.Linear(256, 64, rngs=nnx.Rngs(0))

    under = apply_policy(model, "w8a8")

    assert_same_bits(nnx.to_pure_dict(nnx.state(under)), nnx.to_pure_dict(nnx.state(model)))


def test_two_models_at_once_are_those_one_by_one():
    """Check 35: bit for bit where codes are multiplied, whose sums are exact."""
    quantized = apply_policy(CALLS["@"], "weight=int8@channel,activation=int8@token,execution=native")
    weights = jnp.asarray(W.reshape(2, 128, 64))

    together = jax.jit(jax.vmap(quantized, (0, None)))(weights, X[:, :128])

    for out, w in zip(together, weights, strict=True):
        np.testing.assert_array_equal(out, jax.jit(quantized)(w, X[:, :128]))


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        *zip((f"mxfp4:{rule}" for rule in RULES), (18.8, 19.0, 18.8, 16.8), strict=True),
        *zip((f"mxfp8:{rule}" for rule in RULES), (30.6, 31.2, 31.5, 31.5), strict=True),
        ("nvfp4", 20.4),
    ],
)
def test_block_formats_on_normal_numbers(spec, expected):
    """Check 46 of quantization; the last digit of the notes and the sample's error, some .03 dB each."""
    x = RNG.standard_normal((4096, 64), np.float32)

    error = np.asarray(fake_quantize(x, spec, axis=1), np.float64) - x

    assert 10 * np.log10(np.mean(x.astype(np.float64) ** 2) / np.mean(error**2)) == pytest.approx(expected, abs=0.1)

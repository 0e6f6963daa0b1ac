"""Delayed scaling: scales from the steps before, checked against products quantized by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from precision_lab import DelayedScaling
from precision_lab.quant import fake_quantize

POLICY = "float8_hybrid,compute=float32"


def normal(shape, seed):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


W, X = normal((16, 8), 0), normal((4, 16), 1)


def loss(params, x):
    return jnp.sum((x @ params["w"]) ** 2) / 2


def by_hand(w, x, amax):
    """Output and gradients with scales amax / 448 and amax / 57344; the cotangent of the loss is the output."""
    scales = {"rhs": amax["rhs"] / np.float32(448), "lhs": amax["lhs"] / np.float32(448)}
    wq = np.asarray(fake_quantize(w, "float8_e4m3fn", scale=scales["rhs"]), np.float64)
    xq = np.asarray(fake_quantize(x, "float8_e4m3fn", scale=scales["lhs"]), np.float64)
    out = xq @ wq
    cotangent = np.float32(amax["output_cotangent"]) / np.float32(57344)
    g = np.asarray(fake_quantize(out.astype(np.float32), "float8_e5m2", scale=cotangent), np.float64)
    return (out**2).sum() / 2, xq.T @ g


def test_a_step_uses_the_magnitudes_of_the_steps_before_and_hands_on_its_own():
    scaling = DelayedScaling(POLICY, length=2)
    history = scaling.init(loss, {"w": W}, X)
    before = {role: np.asarray(row).max() for role, row in history["w"].items()}
    step = jax.jit(scaling.value_and_grad(loss))

    (value, grads), after = step({"w": W}, history, 3 * X)

    expected, dw = by_hand(W, 3 * X, before)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    np.testing.assert_allclose(grads["w"], dw, rtol=1e-4, atol=1e-4)
    assert after["w"]["lhs"].tolist() == [3 * np.abs(X).max(), np.abs(X).max()]
    assert after["w"]["rhs"].tolist() == [np.abs(W).max()] * 2


def test_the_first_history_keeps_the_first_step_in_range():
    """Check 31 of the notes on JAX quantization: inputs of size 1000 have a relative error of at most 0.04."""
    scaling = DelayedScaling(POLICY)
    x = 1000 * normal((64, 16), 2)

    (value, _), _ = scaling.value_and_grad(loss)({"w": W}, scaling.init(loss, {"w": W}, x), x)

    # Half of the loss is a square: an error of 0.04 becomes 0.08.
    assert abs(value / loss({"w": W}, x) - 1) < 0.08


def test_microbatches_leave_the_scale_where_it_was():
    scaling = DelayedScaling(POLICY, length=4)
    history = scaling.init(loss, {"w": W}, X)
    step = scaling.value_and_grad(loss)

    for _ in range(2):
        _, history = step({"w": W}, history, X)

    assert float(history["w"]["lhs"].max()) == np.abs(X).max()


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0.0])
def test_a_magnitude_that_is_zero_or_not_finite_keeps_the_scale(bad):
    scaling = DelayedScaling(POLICY, length=3)
    history = scaling.init(loss, {"w": W}, X)

    _, after = scaling.value_and_grad(loss)({"w": W}, history, np.full_like(X, bad))

    assert after["w"]["lhs"].tolist() == [np.abs(X).max(), np.abs(X).max(), 0]


def test_layers_of_a_scan_share_a_scale_and_the_margin_is_headroom():
    def deep(params, x):
        return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0])

    params = {"w": normal((3, 16, 16), 0)}
    scaling = DelayedScaling(POLICY, length=1, margin=1)
    history = scaling.init(deep, params, X)

    (value, grads), after = jax.jit(scaling.value_and_grad(deep))(params, history, X)

    assert float(after["w"]["rhs"][0]) == np.abs(params["w"]).max()
    assert float(after["w"]["lhs"][0]) == np.abs(X).max()  # what comes after is below 1
    assert np.isfinite(value)
    assert grads["w"].shape == (3, 16, 16)


def test_auxiliary_data_pass_through():
    scaling = DelayedScaling(POLICY, length=1)

    def with_aux(params, x):
        return loss(params, x), x.shape[0]

    history = scaling.init(loss, {"w": W}, X)
    ((_, aux), grads), _ = scaling.value_and_grad(with_aux, has_aux=True)({"w": W}, history, X)

    assert aux == 4
    assert grads["w"].shape == W.shape


def test_a_policy_without_such_sites_and_an_empty_history_are_refused():
    with pytest.raises(ValueError, match="has no site with one scale for each tensor"):
        DelayedScaling("w8a8").init(loss, {"w": W}, X)
    with pytest.raises(ValueError, match="length=0"):
        DelayedScaling(POLICY, length=0)

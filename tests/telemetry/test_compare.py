"""Local and cumulative errors against products quantized by hand with ml_dtypes."""

import math

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax import lax

from precision_lab.nn import apply_policy
from precision_lab.telemetry import compare, observe

X = np.random.default_rng(0).normal(size=(6, 4)).astype(np.float32)
W = np.random.default_rng(1).normal(size=(3, 4, 4)).astype(np.float32)
E4M3 = "compute=float8_e4m3fn"


def quantized(x):
    return np.asarray(x, np.float32).astype(ml_dtypes.float8_e4m3fn).astype(np.float64)


def sqnr_db(reference, other):
    return 10 * math.log10((reference**2).sum() / ((reference - other) ** 2).sum())


def two_layers(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def test_local_errors_start_from_the_reference_and_cumulative_ones_do_not():
    found = compare(two_layers, ["float32", E4M3], {"a": W[0], "b": W[1]}, X)

    h = X.astype(np.float64) @ W[0]
    h8 = quantized(X) @ quantized(W[0])
    y = np.tanh(h) @ W[1]
    local, piled_up = quantized(np.tanh(h)) @ quantized(W[1]), quantized(np.tanh(h8)) @ quantized(W[1])
    first, second, out = (found.at(site, E4M3) for site in ("a", "b", "output"))
    assert first.local.sqnr_db == pytest.approx(sqnr_db(h, h8), abs=0.01)
    assert first.cumulative == first.local
    assert second.local.sqnr_db == pytest.approx(sqnr_db(y, local), abs=0.01)
    assert second.local.max_abs == pytest.approx(np.abs(y - local).max(), rel=1e-3)
    assert second.local.max_rel == pytest.approx((np.abs(y - local) / np.abs(y)).max(), rel=1e-2)
    assert second.cumulative.sqnr_db == pytest.approx(sqnr_db(y, piled_up), abs=0.01)
    assert out.cumulative == second.cumulative
    assert out.local is None


def test_a_policy_does_not_differ_from_itself():
    for row in compare(two_layers, ["bfloat16_mixed", "bfloat16_mixed"], {"a": W[0], "b": W[1]}, X):
        assert (row.cumulative.sqnr_db, row.cumulative.max_abs, row.cumulative.max_rel) == (math.inf, 0.0, 0.0)
        assert row.local in (None, row.cumulative)


def test_a_scan_is_compared_over_all_its_layers():
    def scanned(params, x):
        return lax.scan(jax.checkpoint(lambda h, w: (jnp.tanh(h @ w), None)), x, params["w"])[0]

    row = compare(scanned, ["float32", E4M3], {"w": W}, X).at("w", E4M3)

    h, h8, reference, local, piled_up = X.astype(np.float64), X.astype(np.float64), [], [], []
    for w in W:
        reference.append(h @ w)
        local.append(quantized(h) @ quantized(w))
        piled_up.append(quantized(h8) @ quantized(w))
        h, h8 = np.tanh(reference[-1]), np.tanh(piled_up[-1])
    # A value next to a tie may fall to the other side in float32: within a tenth of a decibel.
    assert row.local.sqnr_db == pytest.approx(sqnr_db(np.stack(reference), np.stack(local)), abs=0.1)
    assert row.cumulative.sqnr_db == pytest.approx(sqnr_db(np.stack(reference), np.stack(piled_up)), abs=0.1)


def test_backward_products_are_sites_of_a_function_that_differentiates():
    found = compare(
        jax.value_and_grad(lambda p, x: (two_layers(p, x) ** 2).sum()),
        ["float32", "bfloat16_mixed"],
        {"a": W[0], "b": W[1]},
        X,
    )

    assert len([site for site in found.sites if not site.startswith("output")]) == 5  # no gradient of x
    assert found.sites[-3:] == ["output/0", "output/1/a", "output/1/b"]
    assert all(20 < row.cumulative.sqnr_db < 80 for row in found)


def test_overflow_is_an_infinite_error():
    def fn(params, x):
        return x @ params["a"]

    row = compare(fn, ["float32", "compute=float16"], {"a": W[0] * 1e5}, X).at("a", "compute=float16")

    assert row.local.sqnr_db == -math.inf
    assert row.local.max_abs == math.inf


def test_models_are_compared_with_their_parameters_stored_as_the_policy_says():
    model = nnx.Linear(4, 4, kernel_init=lambda *_: jnp.asarray(W[0]), rngs=nnx.Rngs(0))

    found = compare(model, ["float32", "bfloat16_pure"], X)

    y, low = model(X), apply_policy(model, "bfloat16_pure")(X)
    expected = sqnr_db(np.asarray(y, np.float64), np.asarray(low, np.float64))
    assert found.at("output", "bfloat16_pure").cumulative.sqnr_db == pytest.approx(expected, abs=1e-6)
    assert "bfloat16_pure" in str(found)
    assert found.to_dicts()[0]["cumulative_sqnr_db"] == found[0].cumulative.sqnr_db


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(ValueError, match="at least one other policy, got 1 in all"):
        compare(two_layers, ["float32"], {"a": W[0], "b": W[1]}, X)
    with pytest.raises(KeyError, match="no site 'c' under policy 'compute=float8_e4m3fn'; sites are a, b, output"):
        compare(two_layers, ["float32", E4M3], {"a": W[0], "b": W[1]}, X).at("c", E4M3)


def test_another_policy_for_a_function_that_is_under_one_is_refused():
    """Both took effect: products were observed twice, in the formats of the one that was to be replaced."""
    params = {"a": W[0], "b": W[1]}
    under = apply_policy(two_layers, "bfloat16_mixed")

    for refused in (
        lambda: compare(under, ["float32", E4M3], params, X),
        lambda: observe(under, params, X, policy=E4M3),
    ):
        with pytest.raises(
            ValueError, match=r"a function under policy '.*bfloat16.*' is seen as it is, without a policy"
        ):
            refused()
    assert len(compare(two_layers, ["float32", (under, params)], params, X)) == len(
        compare(two_layers, ["float32", E4M3], params, X)
    )

"""Acceptance checks 6 to 9 and 45 of the policy notes, on modules of Flax as they come; the numbers are theirs."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import precision_lab as pl
from tests.jaxprs import equations, products

LOW = ("bfloat16", "bfloat16", "float32")
POLICIES = ["params=float32,compute=bfloat16,output=bfloat16", "bfloat16_autocast,output=bfloat16"]


@pytest.mark.parametrize("spec", POLICIES)
def test_check_6_dense_layers_are_low_the_norm_between_them_is_float32_and_the_output_is_as_asked(spec):
    model = linen.Sequential([linen.Dense(8), linen.LayerNorm(), linen.Dense(4)])
    x = jnp.ones((2, 6))
    variables = model.init(jax.random.key(0), x)
    under = pl.apply_policy(model, spec)

    jaxpr = jax.make_jaxpr(under.apply)(variables, x)

    assert products(under.apply, variables, x) == [LOW, LOW]
    statistics = [e for e in equations(jaxpr) if e.primitive.name in ("rsqrt", "reduce_sum", "square")]
    assert statistics
    assert {str(eqn.invars[0].aval.dtype) for eqn in statistics} == {"float32"}
    assert under.apply(variables, x).dtype == jnp.bfloat16


@pytest.mark.parametrize("spec", ["params=float32,compute=float16,output=float32", "float16_autocast"])
def test_check_7_batch_norm_divides_by_a_variance_beyond_float16(spec):
    """X = 300, mean 0, variance 1e5: 300 / sqrt(1e5) = 0.9487; stock NNX in float16 gives 0."""
    norm = nnx.BatchNorm(1, use_running_average=True, rngs=nnx.Rngs(0))
    norm.mean[...] = jnp.zeros(1)
    norm.var[...] = jnp.full(1, 1e5)

    out = pl.apply_policy(norm, spec)(jnp.full((2, 1), 300.0))

    np.testing.assert_allclose(out, 0.9487, atol=1e-3)


@pytest.mark.parametrize("spec", POLICIES)
@pytest.mark.parametrize("kind", ["linen", "nnx"])
def test_check_8_a_large_mean_costs_a_layer_norm_nothing(kind, spec):
    """Mean 1000, standard deviation 1; stock NNX in bfloat16 is off by 3.05."""
    x = 1000 + jax.random.normal(jax.random.key(0), (4, 64))
    spec = spec.replace("output=bfloat16", "output=float32")

    if kind == "linen":
        norm = linen.LayerNorm()
        variables = norm.init(jax.random.key(0), x)
        exact, ours = norm.apply(variables, x), pl.apply_policy(norm, spec).apply(variables, x)
    else:
        norm = nnx.LayerNorm(64, rngs=nnx.Rngs(0))
        exact, ours = norm(x), pl.apply_policy(norm, spec)(x)

    assert jnp.max(jnp.abs(ours - exact)) < 0.02


@pytest.mark.parametrize("spec", POLICIES)
@pytest.mark.parametrize("cell", [linen.LSTMCell, linen.GRUCell])
def test_check_9_recurrent_outputs_are_low_and_the_state_stays_float32(cell, spec):
    model, x = linen.RNN(cell(4)), jnp.ones((2, 5, 3))
    variables = model.init(jax.random.key(0), x)
    under = pl.apply_policy(model, spec)

    jaxpr = jax.make_jaxpr(under.apply)(variables, x)

    [scan] = [eqn for eqn in equations(jaxpr) if eqn.primitive.name == "scan"]
    body = scan.params["jaxpr"]
    carried = [aval for aval in body.out_avals if aval.shape == (2, 4) and aval.dtype != jnp.int32]
    assert {str(aval.dtype) for aval in carried} == {"float32"}
    assert set(products(under.apply, variables, x)) == {LOW}
    assert under.apply(variables, x).dtype == jnp.bfloat16


@pytest.mark.parametrize("spec", ["bfloat16_mixed", "bfloat16_autocast", "float8_hybrid", "w8a8", "w4a16", "mxfp8"])
def test_check_45_a_training_step_runs_under_strict_dtype_promotion(spec):
    model = nnx.Sequential(nnx.Linear(32, 32, rngs=nnx.Rngs(0)), nnx.gelu, nnx.Linear(32, 32, rngs=nnx.Rngs(1)))
    graphdef, params = nnx.split(pl.apply_policy(model, spec))
    tx = pl.loss_scaling(pl.master_weights(optax.sgd(0.1)))
    x = jax.random.normal(jax.random.key(0), (4, 32))

    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("allow"):
        state = tx.init(params)
        grads = jax.grad(lambda p: pl.scale_loss(jnp.mean(nnx.merge(graphdef, p)(x) ** jnp.float32(2)), state))(params)
        updates, state = tx.update(grads, state, params)

    assert pl.step_was_applied(state)
    assert all(jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(updates))


@pytest.mark.slow
def test_check_45_products_are_the_same_without_excess_precision():
    root = Path(__file__).parents[2]
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_allow_excess_precision=false"
    tests = ["tests/rewrite/test_cast.py", "tests/rewrite/test_autocast.py", "tests/nn/test_apply_policy.py"]

    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--optimized", *tests],
        env={**os.environ, "XLA_FLAGS": flags},
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout[-2000:]

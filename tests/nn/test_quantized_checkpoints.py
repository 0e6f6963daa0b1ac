"""Check 28 of JAX quantization: nothing moves but what is stored, and a checkpoint gives back the same outputs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen, nnx

import precision_lab as pl
from precision_lab.nn import add_lora

X = jnp.asarray(np.random.default_rng(0).normal(size=(4, 16)).astype(np.float32))
STATIC = "weight=int8@channel,activation=int8@tensor"
AFFINE = "weight=int4@group8,affine,activation=int8@tensor,affine"


class Net(nnx.Module):
    def __init__(self, seed):
        rngs = nnx.Rngs(seed)
        self.up, self.down = nnx.Linear(16, 32, rngs=rngs), nnx.Linear(32, 4, rngs=rngs)

    def __call__(self, x):
        return self.down(nnx.relu(self.up(x)))


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(4)(linen.relu(linen.Dense(32)(x)))


MAKE = {
    "weights": lambda model: pl.convert(model, "weight=nf4@group16,double", X),
    "static": lambda model: pl.convert(pl.calibrate(model, STATIC, [X])),
    "affine": lambda model: pl.convert(pl.calibrate(model, AFFINE, [X])),
    "trained": lambda model: pl.convert(pl.prepare_qat(model, "weight=int4@channel,lsq", X), None, X),
    "adapters": lambda model: add_lora(
        pl.convert(model, "weight=nf4@group16", X), X, rank=2, key=jax.random.key(1)
    ),
}  # fmt: skip


def saved_and_restored(tree, like, path):
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(path, tree)
        checkpointer.wait_until_finished()
        return checkpointer.restore(path, like)


@pytest.mark.parametrize("kind", MAKE)
def test_a_quantized_nnx_model_comes_back_from_a_checkpoint_with_the_same_outputs(kind, tmp_path):
    """Into a model of other weights, converted in the same way."""
    model, other = MAKE[kind](Net(0)), MAKE[kind](Net(1))
    assert not np.array_equal(model(X), other(X))

    nnx.update(other, saved_and_restored(nnx.state(model), nnx.state(other), tmp_path / "state"))

    np.testing.assert_array_equal(other(X), model(X))
    jax.tree.map(np.testing.assert_array_equal, nnx.state(other), nnx.state(model))


@pytest.mark.parametrize("policy", [STATIC, AFFINE])
def test_a_quantized_linen_model_comes_back_with_the_same_outputs(policy, tmp_path):
    def converted(seed):
        return pl.convert(pl.calibrate(LinenNet(), policy, [X], LinenNet().init(jax.random.key(seed), X)))

    (module, variables), (_, like) = converted(0), converted(1)

    restored = saved_and_restored(variables, like, tmp_path / "variables")

    np.testing.assert_array_equal(module.apply(restored, X), module.apply(variables, X))
    assert not np.array_equal(module.apply(restored, X), module.apply(like, X))


@pytest.mark.parametrize("policy", ["w8a8", "int8_training", "weight=int4@channel"])
def test_a_model_under_a_quantizing_policy_has_the_parameters_and_optimizer_state_of_the_plain_one(policy):
    """Structure, shapes, dtypes and values, for NNX and for Linen."""
    model = Net(0)
    under = pl.apply_policy(model, policy)
    variables = LinenNet().init(jax.random.key(0), X)
    of_linen = pl.apply_policy(LinenNet(), policy).init(jax.random.key(0), X)
    pairs = [(nnx.state(model, nnx.Param), nnx.state(under, nnx.Param)), (variables, of_linen)]

    for plain, quantized in pairs:
        assert jax.tree.structure(plain) == jax.tree.structure(quantized)
        jax.tree.map(np.testing.assert_array_equal, plain, quantized)
        states = [optax.adam(1e-3).init(tree) for tree in (plain, quantized)]
        assert jax.tree.structure(states[0]) == jax.tree.structure(states[1])
        jax.tree.map(np.testing.assert_array_equal, *states)

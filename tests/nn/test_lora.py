"""Adapters of low rank beside weights, floating or packed."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import precision_lab as pl
from precision_lab import models
from precision_lab.models import DataSpec
from precision_lab.models.config import MLPConfig, TransformerConfig
from precision_lab.nn import add_lora, merge_lora
from precision_lab.quant import QTensor

X = jax.random.normal(jax.random.key(0), (16, 4))
BASES = [None, "weight=nf4@group64,double", "w8a8"]


def mlp(base):
    model = models.build(MLPConfig(hidden=(8,)), DataSpec("classification", (4,), 3), 0)
    return model if base is None else pl.convert(model, base, X)


def randomized(model):
    """Returns a model whose B are not zero."""
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam)):
        value = jax.random.normal(jax.random.key(len(str(path))), variable.get_value().shape)
        nnx.update(model, nnx.from_flat_state([(path, variable.replace(value))]))
    return model


@pytest.mark.parametrize("base", BASES)
def test_a_new_adapter_changes_nothing(base):
    model = mlp(base)

    tuned = add_lora(model, X, rank=2, key=jax.random.key(1))

    np.testing.assert_array_equal(tuned(X), model(X))
    assert len(jax.tree.leaves(nnx.state(tuned, nnx.LoRAParam))) == 4


@pytest.mark.parametrize("base", BASES)
def test_gradients_are_of_adapters_alone_and_base_codes_stay(base):
    """Check 33 of notes/jax_quantization.md, first half: ten steps."""
    tuned = add_lora(mlp(base), X, rank=2, key=jax.random.key(1))
    before = nnx.to_pure_dict(nnx.state(tuned, lambda path, _: "lora_adapters" not in path))
    optimizer = nnx.Optimizer(tuned, optax.adam(1e-2), wrt=nnx.LoRAParam)
    targets = jax.random.normal(jax.random.key(2), (16, 3))

    @nnx.jit
    def step(model, optimizer):
        def loss(model):
            return jnp.mean((model(X) - targets) ** 2)

        value, grads = nnx.value_and_grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(model)
        optimizer.update(model, grads)
        return value

    losses = [float(step(tuned, optimizer)) for _ in range(10)]

    assert losses[-1] < losses[0]
    after = nnx.to_pure_dict(nnx.state(tuned, lambda path, _: "lora_adapters" not in path))
    jax.tree.map(np.testing.assert_array_equal, after, before)


@pytest.mark.parametrize("base", [None, "weight=nf4@group64,double,compute=float32"])
def test_a_merged_model_computes_what_the_adapters_did(base):
    """Check 33, second half: within 1e-5."""
    tuned = randomized(add_lora(mlp(base), X, rank=2, key=jax.random.key(1)))

    merged = merge_lora(tuned, X)

    assert not any(isinstance(leaf, QTensor) for leaf in jax.tree.leaves(nnx.state(merged), is_leaf=is_qtensor))
    scale = float(jnp.max(jnp.abs(tuned(X))))
    np.testing.assert_allclose(merged(X), tuned(X), rtol=0, atol=1e-5 * scale)


def test_a_weight_that_two_products_take_in_two_orders_has_no_adapter():
    params = {"w": jnp.eye(4)}

    with pytest.raises(ValueError, match="matches no weight that can have an adapter"):
        add_lora(lambda p, x: x @ p["w"] @ p["w"].T, X, rank=1, key=jax.random.key(0), params=params)


def test_a_function_has_adapters_beside_packed_params_but_not_after_it_was_converted():
    def fn(params, x):
        return x @ params["w"]

    policy = "weight=nf4@group64,double"
    run, packed = pl.convert(fn, policy, X, params={"w": jax.random.normal(jax.random.key(0), (4, 3))})

    tuned, params = add_lora(fn, X, rank=1, key=jax.random.key(1), params=packed, policy=policy)

    np.testing.assert_array_equal(tuned(params, X), run(packed, X))
    with pytest.raises(ValueError, match="give add_lora the function that was converted"):
        add_lora(run, X, rank=1, key=jax.random.key(1), params=packed)


def test_what_does_not_see_adapters_refuses_them():
    tuned = add_lora(mlp(None), X, rank=2, key=jax.random.key(1))

    with pytest.raises(ValueError, match="calibrate does not see the adapters of this model; merge them first"):
        pl.calibrate(tuned, "w8a8", [X])
    with pytest.raises(ValueError, match="sensitivity does not see the adapters"):
        pl.sensitivity(tuned, ["w8a8"], [X])


def is_qtensor(leaf):
    return isinstance(leaf, QTensor)


def test_weights_that_are_transposed_or_contract_several_axes_are_merged_where_they_are():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.heads = nnx.LinearGeneral(4, (2, 3), rngs=rngs)
            self.out = nnx.LinearGeneral((2, 3), 5, axis=(-2, -1), rngs=rngs)
            self.table = nnx.Embed(7, 5, rngs=rngs)

        def __call__(self, x):
            return self.table.attend(self.out(self.heads(x)))

    tuned = randomized(add_lora(Net(nnx.Rngs(0)), X, rank=2, key=jax.random.key(1)))

    merged = merge_lora(tuned, X)

    assert len(nnx.state(tuned, nnx.LoRAParam)["lora_adapters"]) == 3
    assert float(jnp.max(jnp.abs(merged(X) - Net(nnx.Rngs(0))(X)))) > 0.1
    np.testing.assert_allclose(merged(X), tuned(X), rtol=1e-4, atol=1e-4)


def test_a_linen_model_and_a_function_have_them_too():
    module = linen.Dense(3)
    variables = module.init(jax.random.key(0), X)
    tuned, carried = add_lora(module, X, rank=2, key=jax.random.key(1), params=variables)
    carried["lora_adapters"]["kernel"]["b"] = jnp.ones((2, 3))
    _, merged = merge_lora(tuned, X, params=carried)

    np.testing.assert_allclose(tuned.apply(carried, X), module.apply(merged, X), rtol=1e-5, atol=1e-5)

    run, params = add_lora(lambda params, x: x @ params["w"], X, rank=1, key=jax.random.key(1), params={"w": X.T})
    params["lora_adapters"]["w"] = {"a": jnp.ones((4, 1)), "b": jnp.ones((1, 16))}
    expected = X @ X.T + params["lora_factor"] * (X.sum(1, keepdims=True) * jnp.ones((1, 16)))
    np.testing.assert_allclose(run(params, X), expected, rtol=1e-5, atol=1e-5)


def test_adapters_are_not_replaced_by_new_ones():
    tuned = randomized(add_lora(mlp(None), X, rank=2, key=jax.random.key(1)))
    module = linen.Dense(3)
    adapted, carried = add_lora(module, X, rank=2, key=jax.random.key(1), params=module.init(jax.random.key(0), X))

    with pytest.raises(ValueError, match="has adapters, which new ones would replace: merge them first"):
        add_lora(tuned, X, rank=2, key=jax.random.key(2))
    with pytest.raises(ValueError, match="has adapters, which new ones would replace: merge them first"):
        add_lora(adapted, X, rank=2, key=jax.random.key(2), params=carried)
    again = add_lora(merge_lora(tuned, X), X, rank=2, key=jax.random.key(2))
    np.testing.assert_allclose(again(X), tuned(X), rtol=1e-4, atol=1e-5)


def test_paths_choose_the_weights():
    spec = DataSpec("language_model", (8,), 16)
    model = models.build(TransformerConfig(depth=1, width=16, heads=2), spec, 0)

    tuned = add_lora(model, jnp.zeros((1, 8), jnp.int32), rank=1, key=jax.random.key(0), paths="**/query/kernel")

    assert list(nnx.state(tuned, nnx.LoRAParam)["lora_adapters"]) == ["blocks/0/attention/query/kernel"]
    with pytest.raises(ValueError, match=r"paths='\*\*/nothing' matches no weight that can have an adapter"):
        add_lora(model, jnp.zeros((1, 8), jnp.int32), rank=1, key=jax.random.key(0), paths="**/nothing")
    with pytest.raises(TypeError, match="with adapters, got Transformer without"):
        merge_lora(model, jnp.zeros((1, 8), jnp.int32))

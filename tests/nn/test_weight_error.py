"""What quantizers lose of a model's weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import precision_lab as pl
from precision_lab.nn.weight_error import quantized_weights, relative_mse, weight_error
from precision_lab.ptq import round_to_nearest


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.table = nnx.Embed(7, 6, rngs=rngs)
        self.up = nnx.Linear(6, 64, rngs=rngs)
        self.head = nnx.Linear(64, 5, rngs=rngs)

    def __call__(self, tokens):
        return self.head(jax.nn.relu(self.up(self.table(tokens))))


TOKENS = jax.ShapeDtypeStruct((3,), jnp.int32)


def test_errors_are_those_of_the_weights_as_they_would_be_stored():
    model, policy = Net(), "weight=int4@group16"

    errors = weight_error(model, policy, TOKENS)

    assert sorted(errors) == ["head/kernel", "up/kernel"]
    for path, found in errors.items():
        kernel = np.float64(getattr(model, path.split("/")[0]).kernel.get_raw_value())
        stored, _ = round_to_nearest(jnp.float32(kernel), "int4@group16", (0,))
        lost = np.float64(stored.dequantize()) - kernel
        np.testing.assert_allclose([found.error, found.norm], [np.sum(lost**2), np.sum(kernel**2)], rtol=1e-5)
    total = sum(float(one.error) for one in errors.values()) / sum(float(one.norm) for one in errors.values())
    assert float(relative_mse(errors)) == pytest.approx(total, rel=1e-6)


def test_the_values_are_those_that_conversion_stores_bit_for_bit():
    model, policy = Net(), "weight=nf4@group16,double,embedding=int8@channel;head/**:weight=none"

    values = quantized_weights(model, policy, TOKENS)

    converted = dict(nnx.to_flat_state(nnx.state(pl.convert(model, policy, TOKENS), nnx.Param)))
    assert sorted(values) == ["table/embedding", "up/kernel"]
    for path, found in values.items():
        stored = converted[tuple(path.split("/"))].get_raw_value()
        np.testing.assert_array_equal(found, stored.dequantize())


def test_each_slice_of_a_scanned_weight_is_quantized_by_itself():
    weights = jnp.asarray(np.random.default_rng(0).normal(size=(3, 4, 4)) * [[[1]], [[100]], [[0.01]]], jnp.float32)

    def fn(params, x):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, params["w"])[0]

    found = quantized_weights(fn, "weight=int4@tensor", jnp.ones((2, 4)), params={"w": weights})

    for one, w in zip(found["w"], weights, strict=True):
        np.testing.assert_array_equal(one, pl.fake_quantize(w, "int4@tensor", axis=0))


def test_a_policy_that_quantizes_nothing_has_no_errors():
    assert weight_error(Net(), "bfloat16", TOKENS) == {}
    assert np.isnan(relative_mse({}))


def test_a_weight_quantized_in_two_ways_has_no_one_value():
    def fn(params, x):
        return (x @ params["w"]) @ params["w"].T

    with pytest.raises(ValueError, match="'w' is quantized in 2 ways"):
        quantized_weights(fn, "weight=int4@channel", jnp.ones((2, 4)), params={"w": jnp.ones((4, 4))})


class Tied(nnx.Module):
    def __init__(self):
        self.table = nnx.Embed(7, 6, rngs=nnx.Rngs(0))

    def __call__(self, tokens):
        return self.table.attend(self.table(tokens))


@pytest.mark.parametrize(("embedding", "ways"), [("int8@channel", ["int8"]), ("int4@channel", ["int8", "int4"])])
def test_a_tied_embedding_counts_once_for_each_value_that_it_is_used_with(embedding, ways):
    model = Tied()
    table = np.float64(model.table.embedding.get_raw_value())

    errors = weight_error(model, f"weight=int8@channel,embedding={embedding}", TOKENS)

    lost = [np.float64(pl.fake_quantize(jnp.float32(table), f"{name}@channel", axis=1)) - table for name in ways]
    assert list(errors) == ["table/embedding"]
    found = errors["table/embedding"]
    expected = [sum(np.sum(each**2) for each in lost), len(ways) * np.sum(table**2)]
    np.testing.assert_allclose([found.error, found.norm], expected, rtol=1e-5)


def test_a_weight_that_the_model_casts_itself_is_quantized_after_that():
    def fn(params, x):
        return x @ params["w"].astype(jnp.bfloat16)

    weights = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)

    found = quantized_weights(fn, "weight=int8@channel", jnp.ones((2, 4), jnp.bfloat16), params={"w": weights})

    expected = pl.fake_quantize(weights.astype(jnp.bfloat16).astype(jnp.float32), "int8@channel", axis=0)
    np.testing.assert_array_equal(found["w"], expected)

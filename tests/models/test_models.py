"""The built-in models: shapes, sizes, laws, and independence of everything but their seed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from precision_lab import models
from precision_lab.models import CharResMLPConfig, ConvNetConfig, DataSpec, MLPConfig, TransformerConfig

DIGITS = DataSpec("classification", (8, 8, 1), 10)
TEXT = DataSpec("language_model", (12,), 7)
CONTEXT = DataSpec("next_token", (5,), 7)
CASES = {
    "mlp": (MLPConfig(hidden=(16,)), DIGITS),
    "linear": (MLPConfig(hidden=()), DIGITS),
    "convnet": (ConvNetConfig(channels=(4, 8)), DIGITS),
    "convnet_norm": (ConvNetConfig(channels=(4, 8), norm="batch"), DIGITS),
    "transformer": (TransformerConfig(width=16, heads=2), TEXT),
    "char_resmlp": (CharResMLPConfig(width=16, depth=1), CONTEXT),
    "tied": (TransformerConfig(width=16, heads=2, tie_embeddings=True), TEXT),
}
every_model = pytest.mark.parametrize("name", CASES)


def example(spec, batch=3):
    rng = np.random.default_rng(0)
    if spec.task != "classification":
        return jnp.asarray(rng.integers(0, spec.num_classes, (batch, *spec.input_shape)))
    return jnp.asarray(rng.standard_normal((batch, *spec.input_shape)), jnp.float32)


def size(model):
    return sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


@every_model
def test_logits_have_one_entry_per_class(name):
    config, spec = CASES[name]

    logits = jax.eval_shape(lambda x: models.build(config, spec, 0)(x), example(spec))

    lead = (3, *spec.input_shape) if spec.task == "language_model" else (3,)
    assert logits.shape == (*lead, spec.num_classes)
    assert logits.dtype == jnp.float32


@every_model
def test_the_seed_decides_the_parameters_and_nothing_else_does(name):
    config, spec = CASES[name]
    params = lambda seed: jax.tree.leaves(nnx.state(models.build(config, spec, seed), nnx.Param))  # noqa: E731
    jitted = jax.jit(lambda seed: nnx.state(models.build(config, spec, seed), nnx.Param))

    first, again, other = params(3), params(3), params(4)

    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other, strict=True))
    for a, b in zip(first, jax.tree.leaves(jitted(3)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6)


@every_model
def test_every_parameter_has_a_gradient(name):
    config, spec = CASES[name]
    model = models.build(config, spec, 0)
    weights = jnp.asarray(np.random.default_rng(1).standard_normal(spec.num_classes), jnp.float32)

    grads = nnx.jit(nnx.grad(lambda m: jnp.mean(jnp.tanh(m(example(spec)) @ weights))))(model)

    zero = [path for path, g in nnx.to_flat_state(grads) if not np.any(np.asarray(g[...]))]
    # A constant added to all keys moves every score of a row alike, so softmax takes no notice of the key's bias.
    assert [path for path in zero if path[-3:] != ("attention", "key", "bias")] == []


def test_sizes_are_those_worked_out_by_hand():
    mlp = models.build(MLPConfig(hidden=(128, 128)), DIGITS, 0)
    conv = models.build(ConvNetConfig(channels=(4, 8)), DIGITS, 0)
    text = models.build(TransformerConfig(depth=2, width=16, heads=2), TEXT, 0)
    tied = models.build(TransformerConfig(depth=2, width=16, heads=2, tie_embeddings=True), TEXT, 0)

    assert size(mlp) == (64 * 128 + 128) + (128 * 128 + 128) + (128 * 10 + 10)
    assert size(conv) == (9 * 1 * 4 + 4) + (9 * 4 * 8 + 8) + (8 * 10 + 10)
    block = 4 * (16 * 16 + 16) + (16 * 64 + 64) + (64 * 16 + 16) + 2 * 32
    assert size(tied) == 7 * 16 + 12 * 16 + 2 * block + 32
    assert size(text) == size(tied) + 16 * 7 + 7


def test_a_transformer_does_not_see_the_future():
    config, spec = CASES["transformer"]
    model = models.build(config, spec, 0)
    tokens = example(spec)
    changed = tokens.at[:, 7].set((tokens[:, 7] + 1) % 7)

    before, after = model(tokens), model(changed)

    np.testing.assert_array_equal(before[:, :7], after[:, :7])
    assert bool((before[:, 7:] != after[:, 7:]).any(axis=(0, 2)).all())


def test_attention_averages_values_where_all_keys_are_equal():
    """With keys all zero the weights are 1/t over the t positions seen so far."""
    from precision_lab.models.transformer import Attention

    attention = Attention(4, 2, out_stddev=0.02, rngs=nnx.Rngs(0))
    attention.key.kernel[...] = jnp.zeros((4, 4))
    attention.out.kernel[...] = jnp.eye(4)
    x = jax.random.normal(jax.random.key(0), (2, 5, 4))

    out = attention(x)

    means = jnp.cumsum(attention.value(x), axis=1) / jnp.arange(1, 6)[:, None]
    np.testing.assert_allclose(out, means, atol=1e-6)


def test_shorter_sequences_are_welcome():
    config, spec = CASES["transformer"]
    model = models.build(config, spec, 0)
    tokens = example(spec)

    np.testing.assert_allclose(model(tokens[:, :5]), model(tokens)[:, :5], atol=1e-6)


def test_he_initialisation_keeps_the_size_of_activations():
    """The second moment after each ReLU layer equals that before it, to four standard errors over the draws."""
    model = models.build(MLPConfig(hidden=(1024, 1024, 1024)), DataSpec("classification", (1024,), 10), 0)
    x = jax.random.normal(jax.random.key(1), (64, 1024))

    for layer in model.layers:
        x = jax.nn.relu(layer(x))
        assert float(jnp.mean(x**2)) == pytest.approx(1.0, rel=4 * 5**0.5 / 1024**0.5)


@pytest.mark.parametrize(("width", "parameters"), [(16, 8.4e3), (32, 19.8e3), (64, 54.9e3), (128, 174e3)])
def test_the_residual_mlp_has_as_many_parameters_as_the_ablations_were_planned_with(width, parameters):
    spec = DataSpec("next_token", (16,), 65)

    model = nnx.eval_shape(lambda: models.build(CharResMLPConfig(width=width), spec, 0))

    assert size(model) == pytest.approx(parameters, rel=0.005)

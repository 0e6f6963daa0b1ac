"""Batch norms folded: against the batch norms of Flax, and against convolutions with kernels quantized by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from precision_lab.nn import FoldedBatchNorm, batch_norm_pairs, fold_batch_norm, fold_batch_norms
from precision_lab.quant import fake_quantize, known_scales, quantize
from tests.zoo import linen_models, nnx_models

RNG = np.random.default_rng(3)
X = jnp.asarray(RNG.normal(size=(3, 16, 16, 2)).astype(np.float32))


def shaken(tree):
    """Returns variables with other numbers, positive, so that no batch norm is an identity."""
    rng = np.random.default_rng(0)

    def new(array):
        floating = jnp.issubdtype(array.dtype, jnp.floating)
        return jnp.asarray(rng.uniform(0.3, 1.5, array.shape), array.dtype) if floating else array

    return jax.tree.map(new, tree)


def norm_of(features, **options):
    norm = nnx.BatchNorm(features, rngs=nnx.Rngs(0), **options)
    nnx.update(norm, shaken(nnx.state(norm)))
    return norm


class Untidy(nnx.Module):
    """One batch norm after its layer, and four that are not.

    After an activation, of an output that is used again, of a layer that is called twice, and over another axis.
    """

    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(5)])
        self.norms = nnx.List([nnx.BatchNorm(4, rngs=rngs) for _ in range(4)])
        self.other = nnx.BatchNorm(2, axis=0, rngs=rngs)

    def __call__(self, x):
        x = self.norms[0](self.layers[0](x))
        x = self.norms[1](jax.nn.relu(self.layers[1](x)))
        y = self.layers[2](x)
        x = y + self.norms[2](y)
        x = self.norms[3](self.layers[3](self.layers[3](x)))
        return self.other(self.layers[4](x))


@pytest.mark.parametrize("use", [(True, True), (True, False), (False, True), (False, False)], ids=str)
@pytest.mark.parametrize("shape", [(5, 4), (3, 3, 2, 4)], ids=["dense", "conv"])
def test_arrays_folded_are_the_layer_and_the_batch_norm(shape, use):
    """In float64, of y = scale * (x w + bias - mean) / sqrt(var + epsilon) + offset."""
    kernel = RNG.normal(size=shape).astype(np.float32)
    bias, scale, offset, mean, var = RNG.uniform(0.1, 2, (5, 4)).astype(np.float32)
    scale, offset = (value if used else None for value, used in zip((scale, offset), use, strict=True))

    folded, shift = fold_batch_norm(kernel, bias if use[0] else None, scale, offset, mean, var, epsilon=1e-3)

    factor = (1 if scale is None else scale) / np.sqrt(var.astype(np.float64) + 1e-3)
    np.testing.assert_allclose(folded, kernel * factor, rtol=1e-6)
    expected = ((bias if use[0] else 0) - mean) * factor + (0 if offset is None else offset)
    np.testing.assert_allclose(shift, expected, rtol=1e-5, atol=1e-6)


def test_folding_has_the_same_bits_under_jit():
    arrays = (RNG.normal(size=(64, 32)), *RNG.uniform(0.1, 2, (5, 32)))
    arrays = [jnp.asarray(array, jnp.float32) for array in arrays]

    for eager, jitted in zip(fold_batch_norm(*arrays), jax.jit(fold_batch_norm)(*arrays), strict=True):
        np.testing.assert_array_equal(eager, jitted)


def test_a_residual_network_of_nnx_is_folded():
    model = nnx_models.CNN(nnx.Rngs(0))
    nnx.update(model, shaken(nnx.state(model)))

    folded = fold_batch_norms(model, X)

    model.eval()
    np.testing.assert_allclose(folded(X), model(X), rtol=1e-4)
    blocks = [f"blocks/layers/{i}" for i in (0, 1)]
    expected = {f"{b}/{layer}": f"{b}/norms/{i}" for b in blocks for i, layer in enumerate(("first", "second"))}
    assert batch_norm_pairs(model, X) == expected
    assert jax.tree.structure(nnx.state(folded)) == jax.tree.structure(nnx.state(model))
    norm = folded.blocks.layers[0].norms[0]
    np.testing.assert_array_equal(norm.scale[...] / np.sqrt(norm.var[...] + np.float32(norm.epsilon)), np.ones(4))


def test_a_residual_network_of_linen_is_folded():
    model = linen_models.CNN()
    variables = shaken(model.init(jax.random.key(0), X, train=False))

    folded = fold_batch_norms(model, variables, X, train=False)

    expected = model.apply(variables, X, train=False)
    np.testing.assert_allclose(model.apply(folded, X, train=False), expected, rtol=1e-4)
    assert jax.tree.structure(folded) == jax.tree.structure(variables)
    first = "ResidualBlock_0/Conv_0", "ResidualBlock_0/BatchNorm_0"
    assert first in batch_norm_pairs(model, variables, X, train=False).items()
    assert not np.array_equal(
        folded["params"]["ResidualBlock_0"]["Conv_0"]["kernel"],
        variables["params"]["ResidualBlock_0"]["Conv_0"]["kernel"],
    )


def test_only_what_is_a_pair_is_found_though_fresh_batch_norms_are_identities():
    model = Untidy(nnx.Rngs(0))

    assert batch_norm_pairs(model, jnp.ones((2, 4))) == {"layers/0": "norms/0"}


class Hidden(nnx.Module):
    """The output of `used` goes past its batch norm too, that of `pair` does not; a small gain shows neither."""

    def __init__(self, gain, rngs):
        self.pair, self.used = nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 4, rngs=rngs)
        self.norms = nnx.List([nnx.BatchNorm(4, rngs=rngs) for _ in range(2)])
        self.gain = nnx.Param(jnp.full(4, gain))

    def __call__(self, x):
        y = self.used(self.norms[0](self.pair(x)))
        return x + self.gain[...] * (y + self.norms[1](y))


@pytest.mark.parametrize("gain", [0.0, 1e-6, 1.0])
def test_a_gain_that_starts_at_zero_hides_no_second_use(gain):
    model, x = Hidden(gain, nnx.Rngs(0)), jnp.asarray(RNG.normal(size=(5, 4)), jnp.float32)

    assert batch_norm_pairs(model, x) == {"pair": "norms/0"}
    np.testing.assert_array_equal(model.gain[...], np.full(4, gain, np.float32))


def test_a_head_of_linen_that_starts_at_zero_hides_no_second_use():
    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            y = linen.Dense(4)(x)
            y = y + linen.BatchNorm(use_running_average=True)(y)
            return linen.Dense(3, kernel_init=linen.initializers.zeros)(y)

    variables = Model().init(jax.random.key(0), X)

    assert batch_norm_pairs(Model(), variables, X) == {}


def test_a_layer_and_its_batch_norm_may_be_called_twice():
    layer, norm = nnx.Linear(4, 4, rngs=nnx.Rngs(0)), norm_of(4)
    model, x = nnx.Sequential(layer, norm, jax.nn.relu, layer, norm), jnp.ones((2, 4))

    folded = fold_batch_norms(model, x)

    model.eval()
    np.testing.assert_allclose(folded(x), model(x), rtol=1e-5)
    assert (folded.layers[0].kernel[...] != layer.kernel[...]).all()


def test_what_is_no_pair_is_refused():
    model, x = Untidy(nnx.Rngs(0)), jnp.ones((2, 4))

    with pytest.raises(ValueError, match=r"'norms/1' cannot be folded into 'layers/1'.*Pairs found: \{'layers/0'"):
        fold_batch_norms(model, x, pairs={"layers/1": "norms/1"})
    with pytest.raises(ValueError, match="no batch norm can be folded"):
        fold_batch_norms(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), x)
    with pytest.raises(TypeError, match=r"an nnx.Module or linen.Module, got function"):
        fold_batch_norms(lambda x: x, x)
    with pytest.raises(ValueError, match=r"has \(4,\) output features on its last axis, but mean is \(3,\)"):
        fold_batch_norm(jnp.ones((2, 4)), None, None, None, jnp.ones(3), jnp.ones(4))
    with pytest.raises(TypeError, match="got Embed and BatchNorm"):
        FoldedBatchNorm(nnx.Embed(4, 4, rngs=nnx.Rngs(0)), norm_of(4))
    with pytest.raises(ValueError, match="axis -1 of one device, got 1"):
        FoldedBatchNorm(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), norm_of(4, axis=1))


def test_a_pair_that_is_asked_for_is_the_only_one():
    model = nnx_models.CNN(nnx.Rngs(0))
    nnx.update(model, shaken(nnx.state(model)))

    folded = fold_batch_norms(model, X, pairs={"blocks/layers/0/first": "blocks/layers/0/norms/0"})

    np.testing.assert_array_equal(folded.blocks.layers[0].second.kernel[...], model.blocks.layers[0].second.kernel[...])
    assert (folded.blocks.layers[0].first.kernel[...] != model.blocks.layers[0].first.kernel[...]).any()


def biased(layer):
    layer.bias[...] = jnp.linspace(-1, 1, layer.bias[...].size)
    return layer


LAYERS = {
    "linear": lambda: (biased(nnx.Linear(2, 8, rngs=nnx.Rngs(0))), norm_of(8)),
    "conv": lambda: (nnx.Conv(2, 8, (3, 3), use_bias=False, rngs=nnx.Rngs(0)), norm_of(8)),
    "biased": lambda: (biased(nnx.Conv(2, 8, (3, 3), strides=2, rngs=nnx.Rngs(0))), norm_of(8, use_scale=False)),
    "depthwise": lambda: (nnx.Conv(2, 8, (3, 3), feature_group_count=2, rngs=nnx.Rngs(0)), norm_of(8, use_bias=False)),
}


@pytest.mark.parametrize("weight", ["int4@channel", "int8,ema", "int4@channel,lsq"])
@pytest.mark.parametrize("kind", LAYERS)
def test_evaluation_is_the_deployed_layer_bit_for_bit(kind, weight):
    """After two steps of training: one layer with the folded bias, whose folded kernel is stored as codes."""
    layer, norm = LAYERS[kind]()
    module = FoldedBatchNorm(layer, norm, weight)
    module(X)
    module(2 * X)
    module.eval()

    kernel, bias = module.folded()
    axis = tuple(range(kernel.ndim - 1))
    stored = quantize(kernel, weight, axis=axis, **known_scales(weight, module.weight.state))
    deployed = nnx.clone(layer)
    deployed.kernel, deployed.bias, deployed.use_bias = nnx.Param(stored.dequantize()), nnx.Param(bias), True

    np.testing.assert_array_equal(module(X), deployed(X))
    jitted = nnx.jit(lambda module, x: module(x))
    np.testing.assert_array_equal(jitted(module, X), jitted(deployed, X))
    folded = fold_batch_norms(nnx.Sequential(layer, norm), X).layers[0].kernel[...]
    np.testing.assert_array_equal(folded, kernel)


def test_training_is_the_batch_norm_of_the_quantized_layer():
    """Quantized by the running deviation, normalized by the batch: in float64, of Krishnamoorthi's section 3.2.2."""
    layer, norm = LAYERS["linear"]()
    kernel, bias = np.asarray(layer.kernel[...], np.float64), np.asarray(layer.bias[...], np.float64)
    scale, offset = np.asarray(norm.scale[...], np.float64), np.asarray(norm.bias[...], np.float64)
    mean, var = np.asarray(norm.mean[...], np.float64), np.asarray(norm.var[...], np.float64)
    x = np.asarray(X, np.float64)
    module = FoldedBatchNorm(layer, norm, "int4@channel")

    out = module(X)

    y = x @ kernel + bias
    of_batch, running = np.sqrt(y.var((0, 1, 2)) + 1e-5), np.sqrt(var + 1e-5)
    quantized = np.asarray(fake_quantize(jnp.asarray(kernel * scale / running, jnp.float32), "int4@channel", axis=0))
    expected = (x @ quantized) * running / of_batch - scale * (x @ kernel).mean((0, 1, 2)) / of_batch + offset
    np.testing.assert_allclose(out, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(norm.mean[...], 0.99 * mean + 0.01 * y.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(norm.var[...], 0.99 * var + 0.01 * y.var((0, 1, 2)), rtol=1e-5)


@pytest.mark.parametrize("kind", LAYERS)
def test_without_rounding_training_is_that_of_flax(kind):
    """Output, gradients and statistics of the layer and the batch norm of Flax, as near as 16 bits are."""
    (layer, norm), (plain_layer, plain_norm) = LAYERS[kind](), LAYERS[kind]()
    module, plain = FoldedBatchNorm(layer, norm, "int16@channel"), nnx.Sequential(plain_layer, plain_norm)
    target = jnp.asarray(RNG.normal(size=plain(X).shape), jnp.float32)
    nnx.update(plain_norm, nnx.state(norm))  # As before that call.

    names = [n for n in ("scale", "bias") if getattr(norm, n) is not None]
    loss, ours = nnx.value_and_grad(lambda model: jnp.mean((model(X) - target) ** 2))(module)
    expected, theirs = nnx.value_and_grad(lambda model: jnp.mean((model(X) - target) ** 2))(plain)

    np.testing.assert_allclose(loss, expected, rtol=1e-3)
    np.testing.assert_allclose(ours["layer"]["kernel"][...], theirs["layers"][0]["kernel"][...], rtol=0.01, atol=1e-3)
    for name in names:
        np.testing.assert_allclose(ours["norm"][name][...], theirs["layers"][1][name][...], rtol=0.01, atol=1e-3)
    np.testing.assert_allclose(norm.mean[...], plain_norm.mean[...], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(norm.var[...], plain_norm.var[...], rtol=1e-4)


@pytest.mark.parametrize("kind", ["conv", "biased"])
def test_frozen_statistics_stay_and_training_is_evaluation(kind):
    layer, norm = LAYERS[kind]()
    module = FoldedBatchNorm(layer, norm, "int4@channel", freeze=2)
    step = nnx.jit(lambda module, x: module(x))
    for size in (1, 2, 3):
        before = norm.mean[...]
        trained = step(module, size * X)
        assert np.array_equal(before, norm.mean[...]) == (size == 3)

    module.eval()
    np.testing.assert_array_equal(trained, step(module, 3 * X))
    assert int(module.steps[...]) == 3


@pytest.mark.parametrize("kind", LAYERS)
def test_gradients_with_frozen_statistics_are_those_of_evaluation(kind):
    """That of the layer's bias was zero, though a fixed mean does not take it away again."""
    module = FoldedBatchNorm(*LAYERS[kind](), "int8@channel", freeze=0)
    target = jnp.asarray(RNG.normal(size=module(X).shape), jnp.float32)

    def gradients(model):
        return nnx.to_pure_dict(nnx.grad(lambda model: jnp.mean((model(X) - target) ** 2))(model))

    trained = gradients(module)
    module.eval()
    evaluated = gradients(module)

    assert jax.tree.structure(trained) == jax.tree.structure(evaluated)
    for ours, expected in zip(jax.tree.leaves(trained), jax.tree.leaves(evaluated), strict=True):
        np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-5)
        assert np.any(expected)


def test_linen_layers_in_a_row_are_folded():
    model = linen.Sequential(
        [linen.Dense(8, use_bias=False), linen.BatchNorm(use_running_average=True, epsilon=1e-3), linen.relu]
    )
    variables = shaken(model.init(jax.random.key(0), X))

    folded = fold_batch_norms(model, variables, X)

    np.testing.assert_allclose(model.apply(folded, X), model.apply(variables, X), rtol=1e-4, atol=1e-5)
    kernel, shift = fold_batch_norm(
        variables["params"]["layers_0"]["kernel"],
        None,
        *(variables["params"]["layers_1"][name] for name in ("scale", "bias")),
        *(variables["batch_stats"]["layers_1"][name] for name in ("mean", "var")),
        epsilon=1e-3,
    )
    np.testing.assert_array_equal(folded["params"]["layers_0"]["kernel"], kernel)
    np.testing.assert_array_equal(folded["params"]["layers_1"]["bias"], shift)
    assert not np.any(folded["batch_stats"]["layers_1"]["mean"])


def test_a_shift_without_a_bias_to_go_into_is_minus_the_mean():
    model = nnx.Sequential(
        nnx.Linear(2, 8, use_bias=False, rngs=nnx.Rngs(0)), nnx.BatchNorm(8, use_bias=False, rngs=nnx.Rngs(0))
    )
    model.layers[1].mean[...] = jnp.asarray(RNG.uniform(0.5, 2, 8), jnp.float32)
    model.eval()

    folded = fold_batch_norms(model, X)

    factor = 1 / np.sqrt(np.float64(1) + 1e-5)
    np.testing.assert_allclose(folded.layers[1].mean[...], model.layers[1].mean[...] * factor, rtol=1e-6)
    np.testing.assert_allclose(folded(X), model(X), rtol=1e-4, atol=1e-5)


def test_variables_that_are_not_given_first_are_asked_for():
    model = linen.Sequential([linen.Dense(8), linen.BatchNorm(use_running_average=True)])
    variables = model.init(jax.random.key(0), X)

    with pytest.raises(TypeError, match="called with its variables first, a mapping of collections; got"):
        fold_batch_norms(model, X, params=variables)


def test_partitioned_variables_of_linen_keep_their_names():
    init = linen.with_partitioning(linen.initializers.lecun_normal(), (None, "model"))
    model = linen.Sequential([linen.Dense(8, kernel_init=init), linen.BatchNorm(use_running_average=True)])
    variables = model.init(jax.random.key(0), X)
    variables = {**variables, "batch_stats": shaken(variables["batch_stats"])}

    folded = fold_batch_norms(model, variables, X)

    np.testing.assert_allclose(model.apply(folded, X), model.apply(variables, X), rtol=1e-4, atol=1e-5)
    assert folded["params"]["layers_0"]["kernel"].names == (None, "model")

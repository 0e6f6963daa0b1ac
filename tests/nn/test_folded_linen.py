"""The Linen twin of `FoldedBatchNorm`: the same numbers, and what it deploys to."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from precision_lab.nn import FoldedBatchNorm, LinenFoldedBatchNorm, fold_batch_norms
from precision_lab.quant import QuantizerState, known_scales, quantize

RNG = np.random.default_rng(3)
X = jnp.asarray(RNG.normal(size=(3, 8, 8, 2)).astype(np.float32))
MUTABLE = ["batch_stats", "quant_stats"]
LAYERS = {
    "dense": (linen.Dense(8), nnx.Linear, (2, 8), {}, {}),
    "conv": (linen.Conv(8, (3, 3), use_bias=False), nnx.Conv, (2, 8, (3, 3)), {"use_bias": False}, {}),
    "strided": (linen.Conv(8, (3, 3), strides=2), nnx.Conv, (2, 8, (3, 3)), {"strides": 2}, {"use_scale": False}),
    "grouped": (
        linen.Conv(8, (3, 3), feature_group_count=2),
        nnx.Conv,
        (2, 8, (3, 3)),
        {"feature_group_count": 2},
        {"use_bias": False, "momentum": 0.9, "epsilon": 1e-3},
    ),
}


def module_and_variables(kind, weight="int4@channel", **options):
    """Returns a module, and its variables with numbers of their own, so that no batch norm is an identity."""
    layer, _, _, _, of_norm = LAYERS[kind]
    module = LinenFoldedBatchNorm(layer, linen.BatchNorm(**of_norm), weight, **options)
    variables = module.init(jax.random.key(0), X, train=True)
    rng = np.random.default_rng(0)
    own = {name: tree for name, tree in variables["params"].items() if name != "fake_quant"}
    params, stats = (
        jax.tree.map(lambda w: jnp.asarray(rng.uniform(0.3, 1.5, w.shape), w.dtype), tree)
        for tree in (own, variables["batch_stats"])
    )
    return module, {**variables, "params": {**variables["params"], **params}, "batch_stats": stats}


def twin_of(kind, variables, weight="int4@channel", **options):
    """Returns the module of NNX with the same numbers."""
    _, cls, sizes, of_layer, of_norm = LAYERS[kind]
    layer, norm = cls(*sizes, **of_layer, rngs=nnx.Rngs(0)), nnx.BatchNorm(8, **of_norm, rngs=nnx.Rngs(0))
    stats = variables["batch_stats"]["norm"]
    for part, arrays in (
        (layer, variables["params"]["layer"]),
        (norm, {**variables["params"].get("norm", {}), **stats}),
    ):
        for name, array in arrays.items():
            getattr(part, name)[...] = array
    return FoldedBatchNorm(layer, norm, weight, **options)


@pytest.mark.parametrize("kind", LAYERS)
def test_two_steps_of_training_and_an_evaluation_are_those_of_the_twin(kind):
    module, variables = module_and_variables(kind, "int8,ema", freeze=1)
    twin = twin_of(kind, variables, "int8,ema", freeze=1)

    for batch in (X, 2 * X):
        out, changed = module.apply(variables, batch, train=True, mutable=MUTABLE)
        variables = {**variables, **changed}
        np.testing.assert_array_equal(out, twin(batch))
    twin.eval()

    np.testing.assert_array_equal(module.apply(variables, 3 * X, train=False), twin(3 * X))
    for name, array in variables["batch_stats"]["norm"].items():
        np.testing.assert_array_equal(array, getattr(twin.norm, name)[...])
    assert int(variables["quant_stats"]["steps"]) == int(twin.steps[...]) == 2


@pytest.mark.parametrize("kind", ["dense", "grouped"])
def test_gradients_are_those_of_the_twin(kind):
    module, variables = module_and_variables(kind)
    twin = twin_of(kind, variables)

    def loss(params):
        out, _ = module.apply({**variables, "params": params}, X, train=True, mutable=MUTABLE)
        return jnp.mean((out - 1) ** 2)

    ours = jax.jit(jax.grad(loss))(variables["params"])
    theirs = nnx.grad(lambda twin: jnp.mean((twin(X) - 1) ** 2))(twin)

    for part, arrays in ours.items():
        for name, array in arrays.items():
            np.testing.assert_allclose(array, theirs[part][name][...], rtol=1e-4, atol=1e-6)
            assert np.any(array != 0) or (part, name) == ("layer", "bias")  # the batch takes it away again


@pytest.mark.parametrize("weight", ["int4@channel", "int8,ema", "int4@channel,lsq"])
@pytest.mark.parametrize("kind", ["dense", "grouped"])
def test_evaluation_is_the_deployed_layer_bit_for_bit(kind, weight):
    """One Flax layer with the folded bias, whose folded kernel is stored as codes."""
    module, variables = module_and_variables(kind, weight)
    _, changed = module.apply(variables, X, train=True, mutable=MUTABLE)
    variables = {**variables, **changed}

    kernel, bias = module.apply(variables, method="folded")
    state = QuantizerState(
        variables["params"].get("fake_quant", {}), variables.get("quant_stats", {}).get("fake_quant", {})
    )
    stored = quantize(kernel, weight, axis=tuple(range(kernel.ndim - 1)), **known_scales(weight, state))
    deployed = {"params": {"kernel": stored.dequantize(), "bias": bias}}

    expected = LAYERS[kind][0].clone(use_bias=True).apply(deployed, X)
    np.testing.assert_array_equal(module.apply(variables, X, train=False), expected)


def test_the_folded_kernel_is_that_of_fold_batch_norms_and_training_needs_mutable_statistics():
    module, variables = module_and_variables("dense")
    pair = linen.Sequential([linen.Dense(8), linen.BatchNorm(use_running_average=True)])
    named = {"layers_0": variables["params"]["layer"]}, {"layers_1": variables["batch_stats"]["norm"]}
    given = {"params": {**named[0], "layers_1": variables["params"]["norm"]}, "batch_stats": named[1]}

    folded = fold_batch_norms(pair, given, X)["params"]["layers_0"]

    kernel, bias = module.apply(variables, method="folded")
    np.testing.assert_array_equal(folded["kernel"], kernel)
    np.testing.assert_array_equal(folded["bias"], bias)
    with pytest.raises(Exception, match="batch_stats"):
        module.apply(variables, X, train=True)


def test_it_is_a_part_of_a_model_like_any_other():
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x, train):
            options = {"running": True, "delay": 1}
            first = LinenFoldedBatchNorm(linen.Conv(4, (3, 3)), linen.BatchNorm(), "int8@channel", **options)
            return LinenFoldedBatchNorm(linen.Dense(3), linen.BatchNorm())(linen.relu(first(x, train)), train)

    variables = Net().init(jax.random.key(0), X, train=False)

    out, changed = jax.jit(lambda v: Net().apply(v, X, train=True, mutable=MUTABLE))(variables)

    assert out.shape == (3, 8, 8, 3)
    first = changed["quant_stats"]["LinenFoldedBatchNorm_0"]["fake_quant"]
    assert int(first["steps"]) == int(first["updates"]) == 1
    np.testing.assert_allclose(np.mean(out, (0, 1, 2)), 0, atol=0.02)  # normalized, beta being zero
    assert set(variables["params"]) == {"Conv_0", "BatchNorm_0", "Dense_0", "BatchNorm_1"}  # as without folding
    assert not np.array_equal(changed["batch_stats"]["BatchNorm_1"]["mean"], np.zeros(3))


def test_what_cannot_be_folded_is_refused():
    with pytest.raises(TypeError, match=r"expected a linen.Dense or linen.Conv and a linen.BatchNorm, got Embed and"):
        LinenFoldedBatchNorm(linen.Embed(4, 4), linen.BatchNorm()).init(jax.random.key(0), X, train=True)
    with pytest.raises(ValueError, match="axis -1 of one device, got 1, None"):
        LinenFoldedBatchNorm(linen.Dense(4), linen.BatchNorm(axis=1)).init(jax.random.key(0), X, train=True)

"""Means by channel before and after, and the formulas of clipped normal distributions against samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import precision_lab as pl
from precision_lab.ptq.bias_correction import correct_biases, expected_activation, expected_shift

RNG = np.random.default_rng(0)
W4 = "weight=int4@tensor"


class Net(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.relu(linen.Dense(32, name="a")(x))
        x = linen.relu(linen.Dense(24, name="b")(x))
        return linen.Dense(8, name="c")(x)


class Model(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.a, self.b, self.c = (nnx.Linear(i, o, rngs=rngs) for i, o in ((16, 32), (32, 24), (24, 8)))

    def __call__(self, x):
        return self.c(nnx.relu(self.b(nnx.relu(self.a(x)))))


def relu_inputs(*shape):
    return np.maximum(RNG.normal(size=shape), 0).astype(np.float32)


BATCHES = [relu_inputs(64, 16), relu_inputs(32, 16)]
SIDES = {"a": 32, "b": 24, "c": 8}
VARIABLES = Net().init(jax.random.key(0), BATCHES[0])


def sqnr_db(expected, out):
    return 10 * np.log10((expected**2).sum() / ((expected - out) ** 2).sum())


def dense(params, x):
    return x @ params["kernel"] + params["bias"]


def product(params, x):
    return x @ params["kernel"]


def four_bits(w):
    """Returns a weight on the symmetric four-bit grid of one scale, in float64."""
    scale = np.abs(w).max() / np.float32(7)
    return np.round(w / scale).astype(np.float64) * scale


def test_after_correction_no_output_channel_is_off_on_average():
    """Check 35 of notes/quantization.md: W4 after ReLU inputs."""
    x = relu_inputs(4096, 64)
    params = {"kernel": RNG.normal(size=(64, 32)).astype(np.float32), "bias": np.zeros(32, np.float32)}
    quantized = pl.apply_policy(dense, W4)
    found = correct_biases((dense, params), (quantized, params), [x])

    fn, corrected = found.model
    before = dense(params, x.astype(np.float64)) - np.float64(quantized(params, x))
    after = dense(params, x.astype(np.float64)) - np.float64(fn(corrected, x))

    by_hand = x.astype(np.float64) @ (params["kernel"] - four_bits(params["kernel"]))
    assert np.abs(before.mean(0)).mean() == pytest.approx(np.abs(by_hand.mean(0)).mean(), rel=1e-4)
    assert np.abs(before.mean(0)).mean() > 0.03
    assert np.abs(after.mean(0)).max() < 1e-6
    expected = dense(params, x.astype(np.float64))
    centred = by_hand - by_hand.mean(0)
    gained = sqnr_db(expected, expected - after) - sqnr_db(expected, expected - before)
    assert gained == pytest.approx(10 * np.log10((by_hand**2).sum() / (centred**2).sum()), abs=0.01)
    assert gained > 1


def beside_one_another(params, x):
    """Returns the outputs of several layers that get the same inputs, one after the other."""
    return jnp.concatenate([dense(layer, x) for layer in params.values()], axis=1)


@pytest.mark.parametrize("inputs", [16, 64])
def test_check_35_what_a_correction_gains_is_what_inputs_of_that_mean_can_gain(inputs):
    """W4 after ReLU inputs, 24 layers with weights of variance 2 / inputs: the notes' .065 and 17.2 to 19.4 dB.

    Errors e of weights are spread evenly over a step, so E[e^2] = step^2 / 12, and outputs have the SQNR of weights. A
    channel is off by E[x] sum(e) on average; without that, the energy of errors falls from E[x^2] sum(e^2) to that of
    Var[x]. The notes do not give their data: their numbers have to lie within two standard deviations of draws.
    """
    rng = np.random.default_rng(inputs)
    x = np.maximum(rng.normal(size=(4096, inputs)), 0).astype(np.float32)
    kernels = (rng.normal(size=(24, inputs, 32)) * np.sqrt(2 / inputs)).astype(np.float32)
    params = {f"{i:02}": {"kernel": kernel, "bias": np.zeros(32, np.float32)} for i, kernel in enumerate(kernels)}
    quantized = pl.apply_policy(beside_one_another, W4)
    fn, corrected = correct_biases((beside_one_another, params), (quantized, params), [x]).model

    exact = np.einsum("ni,lio->nlo", x, kernels, dtype=np.float64)
    before, after = (np.float64(y).reshape(exact.shape) for y in (quantized(params, x), fn(corrected, x)))
    off = np.abs((exact - before).mean(0)).mean(-1)
    db_before, db_after = (
        10 * np.log10((exact**2).sum((0, 2)) / ((exact - y) ** 2).sum((0, 2))) for y in (before, after)
    )

    step = np.abs(kernels).max((1, 2)) / 7
    mean, square = 1 / np.sqrt(2 * np.pi), 1 / 2  # of relu(x), x from N(0, 1)
    assert_mean(db_before, 10 * np.log10((2 / inputs) / (step**2 / 12)))
    assert_mean(db_after - db_before, 10 * np.log10(square / (square - mean**2)))  # 1.66
    assert_mean(off, mean * np.sqrt(2 / np.pi * inputs * step**2 / 12))
    assert np.abs((exact - after).mean(0)).max() < 1e-6
    for of_notes, drawn in ((17.2, db_before), (19.4, db_after), (2.2, db_after - db_before), (0.065, off)):
        assert abs(of_notes - drawn.mean()) < 2 * drawn.std(ddof=1)


def assert_mean(found, expected):
    """Checks a mean over draws against theory, by four standard errors."""
    difference = found - expected
    assert abs(difference.mean()) < 4 * difference.std(ddof=1) / np.sqrt(len(difference))


@pytest.mark.parametrize("activation", ["none", "relu", "relu6"])
def test_expected_activations_agree_with_samples(activation):
    """Check 36 of notes/quantization.md: 4e5 samples of N(beta, gamma)."""
    beta, gamma = RNG.normal(size=12) * 3, RNG.normal(size=12) * 2
    x = beta + gamma * RNG.normal(size=(400_000, 12))
    f = {"none": lambda x: x, "relu": lambda x: np.maximum(x, 0), "relu6": lambda x: np.clip(x, 0, 6)}[activation]

    error = np.asarray(expected_activation(beta, gamma, activation)) - f(x).mean(0)

    assert np.all(np.abs(error) < 4 * f(x).std(0) / np.sqrt(400_000) + 1e-6)  # four standard errors
    at_zero = expected_activation(np.float32([-1, 2, 7]), np.zeros(3), activation)
    np.testing.assert_array_equal(at_zero, f(np.float32([-1, 2, 7])))


def test_the_shift_of_a_layer_is_that_of_its_mean_input_of_a_grouped_convolution_too():
    x = RNG.normal(size=(6, 5, 5, 4)).astype(np.float32) + 1
    kernel = RNG.normal(size=(3, 3, 2, 8)).astype(np.float32)
    rough = kernel + 0.1 * RNG.normal(size=kernel.shape).astype(np.float32)
    constant = np.broadcast_to(x.mean((0, 1, 2)), (1, 5, 5, 4))

    shift = expected_shift(kernel, rough, x.mean((0, 1, 2)))

    def convolved(w):
        options = {"dimension_numbers": ("NHWC", "HWIO", "NHWC"), "feature_group_count": 2}
        return jax.lax.conv_general_dilated(constant, w, (1, 1), "VALID", **options)

    np.testing.assert_allclose(shift, convolved(kernel - rough)[0, 0, 0], rtol=1e-4, atol=1e-5)


def products(variables, x, weight=lambda w: w, biases=None):
    """Returns the outputs of the three layers before their biases, in float64."""
    outs, params = [], variables["params"]
    for name in "abc":
        outs.append(x @ weight(np.asarray(params[name]["kernel"])))
        bias = np.asarray((biases or params)[name]["bias"], np.float64)
        x = np.maximum(outs[-1] + bias, 0)
    return outs


def test_layers_are_corrected_in_order_each_behind_those_corrected_before():
    policy = W4
    found = correct_biases((Net(), VARIABLES), (pl.apply_policy(Net(), policy), VARIABLES), BATCHES)

    x = np.concatenate(BATCHES).astype(np.float64)
    exact, biases = products(VARIABLES, x), {name: {"bias": np.zeros(n)} for name, n in SIDES.items()}
    for i, name in enumerate("abc"):
        biases[name]["bias"] = exact[i].mean(0) - products(VARIABLES, x, four_bits, biases)[i].mean(0)
    for name in "abc":
        np.testing.assert_allclose(found.shifts[f"{name}/kernel"], biases[name]["bias"], atol=3e-5)
        assert np.abs(biases[name]["bias"]).max() > 1e-3
    module, variables = found.model
    out = np.concatenate([module.apply(variables, x) for x in BATCHES])
    expected = np.concatenate([Net().apply(VARIABLES, x) for x in BATCHES])
    assert np.abs((out - expected).mean(0)).max() < 1e-5


@pytest.mark.parametrize("inputs", ["quantized", "float"])
def test_a_converted_model_of_nnx_is_corrected_and_stays_packed(inputs):
    model = Model()
    packed = pl.convert(model, W4, BATCHES[0])

    found = correct_biases(model, packed, BATCHES, inputs=inputs)

    kernel = np.asarray(model.a.kernel[...])
    x = np.concatenate(BATCHES).astype(np.float64)
    by_hand = x.mean(0) @ (kernel - four_bits(kernel))
    np.testing.assert_allclose(found.shifts["a/kernel"], by_hand, atol=1e-5)
    assert set(found.shifts) == {"a/kernel", "b/kernel", "c/kernel"}
    assert isinstance(found.model.a.kernel.get_raw_value(), pl.QTensor)
    exact, before, after = (np.concatenate([m(x) for x in BATCHES]) for m in (model, packed, found.model))
    assert np.abs((after - exact).mean(0)).max() < (
        1e-5 if inputs == "quantized" else np.abs((before - exact).mean(0)).max()
    )
    assert not np.array_equal(packed.a.bias[...], found.model.a.bias[...])


def test_layers_of_a_scan_get_a_shift_each():
    kernels = RNG.normal(size=(3, 8, 8)).astype(np.float32) / 3
    params = {"layers": {"kernel": kernels, "bias": np.zeros((3, 8), np.float32)}}

    def net(params, x):
        def layer(h, p):
            return jax.nn.relu(h @ p["kernel"] + p["bias"]), None

        return jax.lax.scan(layer, x, params["layers"])[0]

    x = relu_inputs(128, 8)
    for inputs, quantized in (
        ("quantized", (pl.apply_policy(net, W4), params)),
        ("float", pl.convert(net, W4, x, params=params)),
    ):
        shifts = correct_biases((net, params), quantized, [x], inputs=inputs).shifts["layers/kernel"]

        h = hq = x.astype(np.float64)
        for w, shift in zip(kernels, shifts, strict=True):
            y = h @ w
            yq = (hq if inputs == "quantized" else h) @ four_bits(w)
            np.testing.assert_allclose(shift, y.mean(0) - yq.mean(0), atol=2e-5)
            h, hq = np.maximum(y, 0), np.maximum(yq + shift, 0)


def test_what_has_no_bias_is_named_and_what_cannot_be_corrected_refused():
    def bare(params, x):
        return (x @ params["one"]["kernel"] + params["one"]["bias"]) @ params["two"]["kernel"]

    params = {"one": {"kernel": np.eye(4, dtype=np.float32) * 0.9, "bias": np.zeros(4, np.float32)},
              "two": {"kernel": np.ones((4, 2), np.float32)}}  # fmt: skip
    x = relu_inputs(8, 4)
    quantized = (pl.apply_policy(bare, W4), params)

    assert correct_biases((bare, params), quantized, [x]).skipped == {"two/kernel": "no parameter 'two/bias'"}

    with pytest.raises(ValueError, match="inputs='both' must be 'quantized' or 'float'"):
        correct_biases((bare, params), quantized, [x], inputs="both")
    with pytest.raises(ValueError, match="was not seen: give the quantized model"):
        correct_biases((bare, params), (bare, params), [x])
    with pytest.raises(ValueError, match="needs weights that are stored quantized"):
        correct_biases((bare, params), quantized, [x], inputs="float")
    with pytest.raises(ValueError, match="there is no bias to correct \\('kernel': no parameter 'bias'\\)"):
        correct_biases((product, params["two"]), (pl.apply_policy(product, W4), params["two"]), [x])
    with pytest.raises(TypeError, match="expected an nnx"):
        correct_biases(bare, quantized, [x])
    with pytest.raises(ValueError, match="activation='gelu' must be one of none, relu, relu6"):
        expected_activation(jnp.zeros(2), jnp.ones(2), "gelu")


class ConvNet(nnx.Module):
    """As most are: convolutions without a bias, since the batch norm after them has one."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first, self.second = (nnx.Conv(i, 8, (3, 3), use_bias=False, rngs=rngs) for i in (3, 8))
        self.norms = nnx.List([nnx.BatchNorm(8, rngs=rngs) for _ in range(2)])
        self.head = nnx.Linear(8, 4, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norms[0](self.first(x)))
        return self.head(nnx.relu(self.norms[1](self.second(x))).mean((1, 2)))


class LinenConvNet(linen.Module):
    @linen.compact
    def __call__(self, x):
        for name in ("first", "second"):
            x = linen.Conv(8, (3, 3), use_bias=False, name=name)(x)
            x = linen.relu(linen.BatchNorm(use_running_average=True, name=f"norm_{name}")(x))
        return linen.Dense(4, name="head")(x.mean((1, 2)))


def folded_convnet(kind, x):
    """Returns a folded model, converted, and the paths of its biases by layer, in the forms of `correct_biases`."""
    if kind == "nnx":
        model = ConvNet()
        for norm in model.norms:
            norm.mean[...], norm.var[...] = (jnp.asarray(RNG.uniform(0.2, 1, 8), jnp.float32) for _ in range(2))
        model = pl.nn.fold_batch_norms(model, x)
        return model, pl.convert(model, W4, x), {"first": "norms/0/bias", "second": "norms/1/bias"}
    variables = LinenConvNet().init(jax.random.key(0), x)
    stats = jax.tree.map(lambda a: jnp.asarray(RNG.uniform(0.2, 1, a.shape), a.dtype), variables["batch_stats"])
    module, variables = LinenConvNet(), {**variables, "batch_stats": stats}
    folded = pl.nn.fold_batch_norms(module, variables, x)
    paths = {name: f"norm_{name}/bias" for name in ("first", "second")}
    return (module, folded), pl.convert(module, W4, x, params=folded), paths


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_the_bias_of_a_folded_convolution_is_that_of_its_batch_norm(kind):
    """These were skipped for want of a bias, in the networks that the paper is about."""
    x = relu_inputs(16, 6, 6, 3)
    model, packed, biases = folded_convnet(kind, x)

    corrected = correct_biases(model, packed, [x])

    assert set(corrected.shifts) == {"first/kernel", "second/kernel", "head/kernel"}
    assert corrected.skipped == {}
    exact, after = (dict(_named(each)) for each in (model, corrected.model))
    means = [_convolved(x, leaves, "first", biases).mean((0, 1, 2)) for leaves in (exact, after)]
    np.testing.assert_allclose(means[1], means[0], atol=1e-5)
    before = dict(_named(packed))
    assert np.abs(_convolved(x, before, "first", biases).mean((0, 1, 2)) - means[0]).max() > 1e-3
    outs = [_called(each, x).mean(0) for each in (model, packed, corrected.model)]
    np.testing.assert_allclose(outs[2], outs[0], atol=1e-5)
    assert np.abs(outs[1] - outs[0]).max() > 1e-3


def _named(model):
    tree = nnx.state(model, nnx.Param) if isinstance(model, nnx.Module) else model[1]["params"]
    is_leaf = lambda leaf: isinstance(leaf, pl.quant.QTensor)  # noqa: E731
    if isinstance(model, nnx.Module):
        return [("/".join(map(str, path)), variable.get_raw_value()) for path, variable in nnx.to_flat_state(tree)]
    leaves = jax.tree.leaves_with_path(tree, is_leaf=is_leaf)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]


def _convolved(x, leaves, layer, biases):
    """Returns a convolution and its bias, in float32."""
    kernel = leaves[f"{layer}/kernel"]
    kernel = kernel.dequantize() if isinstance(kernel, pl.quant.QTensor) else kernel
    numbers = ("NHWC", "HWIO", "NHWC")
    out = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)
    return np.asarray(out + leaves[biases[layer]], np.float64)


def _called(model, x):
    return np.asarray(model(x) if isinstance(model, nnx.Module) else model[0].apply(model[1], x), np.float64)

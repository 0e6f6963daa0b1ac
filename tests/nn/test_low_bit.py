"""Low-bit layers: bit for bit what a policy makes of plain layers, and the formulas of their papers."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import precision_lab as pl
from precision_lab.nn import keep_ends, low_bit_linen, low_bit_nnx
from precision_lab.nn.low_bit import XNOR_OF_WINDOWS
from precision_lab.policy import PRESETS

LOW_BIT = ["binary_connect", "binary_net", "bwn", "xnor", "twn", "bitnet", "bitnet_b158"]
RNG = np.random.default_rng(2)
X = jnp.asarray(RNG.normal(size=(4, 6, 8)), jnp.float32)
IMAGES = jnp.asarray(RNG.normal(size=(2, 9, 7, 5)), jnp.float32)
CONV = {"strides": (2, 1), "padding": "SAME"}


def rngs():
    return nnx.Rngs(0, binary=7)


def run(model, x):
    """Returns output and gradients, with respect to the model's parameters (by path) and to `x`, in one program."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def weighted(params, x):
        out = nnx.merge(graphdef, params, rest, copy=True)(x)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape))), out

    (_, out), grads = jax.jit(jax.value_and_grad(weighted, (0, 1), has_aux=True))(params, x)
    return [
        out,
        grads[1],
        *(leaf[...] for _, leaf in sorted(nnx.to_flat_state(grads[0]), key=lambda each: each[0][-1])),
    ]


def run_linen(module, params, x, **apply):
    """Returns the same of a Linen module."""

    def weighted(params, x):
        out = module.apply({"params": params}, x, **apply)
        return jnp.sum(out * jnp.cos(jnp.arange(out.size).reshape(out.shape))), out

    (_, out), grads = jax.jit(jax.value_and_grad(weighted, (0, 1), has_aux=True))(params, x)
    return [out, grads[1], *(leaf for _, leaf in sorted(grads[0].items()))]


def assert_same_bits(left, right):
    for a, b in zip(left, right, strict=True):
        np.testing.assert_array_equal(np.asarray(a).view(np.uint32), np.asarray(b).view(np.uint32))


def weights(layer):
    return {"kernel": layer.kernel[...], "bias": layer.bias[...]}


@pytest.mark.parametrize("policy", LOW_BIT)
def test_a_layer_is_a_plain_one_under_the_policy_bit_for_bit_and_so_is_its_twin(policy):
    """Outputs, and gradients of inputs and parameters."""
    layer = low_bit_nnx.LowBitLinear(8, 5, policy=policy, rngs=rngs())
    layer.kernel[...] *= 3  # some beyond 1, where gradients stop
    plain = nnx.Linear(8, 5, rngs=rngs())
    plain.kernel[...] *= 3

    expected = run(pl.apply_policy(plain, policy), X)

    assert_same_bits(run(layer, X), expected)
    assert_same_bits(run_linen(low_bit_linen.LowBitDense(5, policy=policy), weights(layer), X), expected)


@pytest.mark.parametrize("policy", ["xnor", "bitnet"])
def test_a_convolution_is_a_plain_one_under_the_policy_bit_for_bit_and_so_is_its_twin(policy):
    layer = low_bit_nnx.LowBitConv(5, 3, (3, 3), policy=policy, rngs=rngs(), **CONV)

    expected = run(pl.apply_policy(nnx.Conv(5, 3, (3, 3), rngs=rngs(), **CONV), policy), IMAGES)

    twin = low_bit_linen.LowBitConv(3, (3, 3), policy=policy, **CONV)
    assert_same_bits(run(layer, IMAGES), expected)
    assert_same_bits(run_linen(twin, weights(layer), IMAGES), expected)


@pytest.mark.parametrize(("policy", "norm"), [("bitnet", "LayerNorm"), ("bitnet_b158", "RMSNorm")])
def test_bit_linear_is_a_normalisation_and_a_plain_layer_under_the_policy(policy, norm):
    layer = low_bit_nnx.BitLinear(8, 5, policy=policy, rngs=rngs())
    plain = nnx.Sequential(getattr(nnx, norm)(8, rngs=rngs()), nnx.Linear(8, 5, rngs=rngs()))
    plain.layers[1].kernel[...] = layer.kernel[...]

    out = jax.jit(lambda x: layer(x))(X)

    under = pl.apply_policy(plain, policy)
    assert_same_bits([out], [jax.jit(lambda x: under(x))(X)])
    params = {**weights(layer), "norm": {k: v[...] for k, v in nnx.state(layer.norm, nnx.Param).items()}}
    twin = low_bit_linen.BitDense(5, policy=policy)
    assert jax.tree.structure(params) == jax.tree.structure(twin.init(jax.random.key(0), X)["params"])
    assert_same_bits([out], [jax.jit(twin.apply)({"params": params}, X)])


@pytest.mark.parametrize("policy", ["bitnet", "bitnet_b158"])
def test_bit_linear_is_the_formula_of_the_papers(policy):
    """In float64; outputs sum 8 products of int8 codes and signs, exact but for the scales and the normalisation."""
    layer = low_bit_nnx.BitLinear(8, 5, policy=policy, use_bias=False, rngs=rngs())
    w, x = np.asarray(layer.kernel[...], np.float64), np.asarray(X, np.float64)
    if policy == "bitnet":
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)
        wq = np.where(w > w.mean(), 1, -1) * np.abs(w).mean()
    else:
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
        wq = np.clip(np.round(w / np.abs(w).mean()), -1, 1) * np.abs(w).mean()
    gamma = np.abs(x).max(-1, keepdims=True)
    xq = np.clip(np.round(x * 127 / gamma), -128, 127) * gamma / 127

    np.testing.assert_allclose(layer(X), xq @ wq, atol=1e-5)


def test_xnor_linear_is_the_formula_of_the_paper():
    """Equation 9: the product of signs, times mean |x| of the row and mean |w| of the output."""
    layer = low_bit_nnx.XnorLinear(8, 5, use_bias=False, rngs=rngs())
    w, x = np.asarray(layer.kernel[...], np.float64), np.asarray(X, np.float64)
    expected = (np.sign(x) @ np.sign(w)) * np.abs(x).mean(-1, keepdims=True) * np.abs(w).mean(0)

    np.testing.assert_allclose(layer(X), expected, rtol=1e-5, atol=1e-6)
    twin = low_bit_linen.XnorDense(5, use_bias=False)
    assert_same_bits([layer(X)], [twin.apply({"params": {"kernel": layer.kernel[...]}}, X)])


def convolved(x, w):
    """Returns a valid convolution with strides (2, 1) in float64."""
    windows = np.lib.stride_tricks.sliding_window_view(x, w.shape[:2], (1, 2))[:, ::2]
    return np.einsum("bhwcij,ijco->bhwo", windows, w)


def test_xnor_conv_is_the_formula_of_the_paper():
    """Equation 11: the convolution of signs, times K of the window and alpha of the filter."""
    layer = low_bit_nnx.XnorConv(5, 3, (3, 2), strides=(2, 1), padding="VALID", use_bias=False, rngs=rngs())
    w, x = np.asarray(layer.kernel[...], np.float64), np.asarray(IMAGES, np.float64)
    k = convolved(np.abs(x).mean(-1, keepdims=True), np.full((3, 2, 1, 1), 1 / 6))
    expected = convolved(np.sign(x), np.sign(w)) * k * np.abs(w).mean((0, 1, 2))

    np.testing.assert_allclose(layer(IMAGES), expected, rtol=1e-5, atol=1e-5)
    twin = low_bit_linen.XnorConv(3, (3, 2), strides=(2, 1), padding="VALID", use_bias=False)
    assert_same_bits([layer(IMAGES)], [twin.apply({"params": {"kernel": layer.kernel[...]}}, IMAGES)])


def test_xnor_conv_has_the_gradient_of_the_sign_times_k_and_none_through_k():
    """One window of one pixel: out = K alpha sum(sign x sign w), so d out / d x = K alpha sign(w) 1[|x| <= 1]."""
    layer = low_bit_nnx.XnorConv(5, 1, (1, 1), use_bias=False, rngs=rngs())
    x = jnp.asarray([0.5, -0.9, 1.0, 1.5, -2.0]).reshape(1, 1, 1, 5)
    w = np.asarray(layer.kernel[...], np.float64).reshape(5)

    gradient = jax.grad(lambda x: layer(x).sum())(x).reshape(5)

    expected = np.abs(x).mean() * np.abs(w).mean() * np.sign(w) * [1, 1, 1, 0, 0]
    np.testing.assert_allclose(gradient, expected, rtol=1e-5)


def test_without_window_scales_an_xnor_conv_is_a_plain_one_under_a_policy():
    layer = low_bit_nnx.XnorConv(5, 3, (3, 3), window_scales=False, rngs=rngs(), **CONV)

    expected = run(pl.apply_policy(nnx.Conv(5, 3, (3, 3), rngs=rngs(), **CONV), XNOR_OF_WINDOWS), IMAGES)

    assert_same_bits(run(layer, IMAGES), expected)


def test_the_block_normalises_before_the_sign_and_pools_after_the_convolution():
    block = low_bit_nnx.XnorBlock(5, 3, (3, 3), pool=(2, 2), rngs=rngs())
    twin = low_bit_linen.XnorBlock(3, (3, 3), pool=(2, 2))
    shifted = IMAGES + 100  # all signs alike, had they not been normalised
    norm = {"bias": block.norm.bias[...], "scale": block.norm.scale[...]}
    conv = {name: block.conv.__dict__[name][...] for name in ("kernel", "bias")}

    out = block(shifted)

    by_hand = nnx.max_pool(block.conv((shifted - shifted.mean((0, 1, 2))) / shifted.std((0, 1, 2))), (2, 2), (2, 2))
    np.testing.assert_allclose(out, by_hand, atol=1e-2)
    assert float(out.std()) > 0.05
    variables = twin.init(jax.random.key(0), shifted)
    variables = {**variables, "params": {"norm": norm, "conv": conv}}
    np.testing.assert_allclose(out, twin.apply(variables, shifted, mutable=["batch_stats"])[0], atol=1e-5)


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_check_40_drawn_weights_are_signs_with_the_weight_as_their_mean(kind):
    """The identity shows the weights; 2000 calls, four standard errors."""
    w = jnp.asarray([[-1.5, -0.5, 0.0], [0.3, 0.9, 1.0]])
    if kind == "nnx":
        layer = low_bit_nnx.BinaryConnectLinear(2, 3, stochastic=True, use_bias=False, rngs=rngs())
        layer.kernel[...] = w
        graphdef, state = nnx.split(layer)

        def step(state, _):
            layer = nnx.merge(graphdef, state)
            out = layer(jnp.eye(2))
            return nnx.state(layer), out

        _, drawn = jax.lax.scan(step, state, length=2000)
    else:
        module = low_bit_linen.BinaryConnectDense(3, stochastic=True, use_bias=False)
        keys = jax.random.split(jax.random.key(0), 2000)
        drawn = jax.vmap(lambda key: module.apply({"params": {"kernel": w}}, jnp.eye(2), rngs={"binary": key}))(keys)

    drawn, mean = np.asarray(drawn), np.clip(w, -1, 1)
    assert set(np.unique(drawn)) == {-1.0, 1.0}
    assert np.all(np.abs(drawn.mean(0) - mean) <= 4 * np.sqrt((1 - mean**2) / 2000))


def test_a_stochastic_layer_multiplies_what_it_drew_in_both_passes_and_the_real_weights_in_evaluation():
    layer = low_bit_nnx.BinaryConnectLinear(8, 5, stochastic=True, use_bias=False, rngs=rngs())
    w = layer.kernel[...]
    copies = [nnx.clone(layer) for _ in range(2)]

    signs = copies[0](jnp.eye(8))
    out, dx, dw = run(copies[1], X)

    cotangent = np.cos(np.arange(out.size)).reshape(out.shape)
    np.testing.assert_allclose(out, X @ signs, atol=1e-5)
    np.testing.assert_allclose(dx, cotangent @ np.asarray(signs).T, atol=1e-5)
    np.testing.assert_allclose(dw, np.einsum("abi,abo->io", X, cotangent), atol=1e-4)
    assert np.any(layer(jnp.eye(8)) != layer(jnp.eye(8)))
    layer.eval()
    np.testing.assert_array_equal(layer(jnp.eye(8)), w)
    evaluated = low_bit_linen.BinaryConnectDense(5, stochastic=True, use_bias=False).clone(deterministic=True)
    np.testing.assert_array_equal(evaluated.apply({"params": {"kernel": w}}, jnp.eye(8)), w)


@pytest.mark.parametrize("stochastic", [False, True])
def test_binary_connect_convolutions_convolve_with_signs(stochastic):
    layer = low_bit_nnx.BinaryConnectConv(5, 3, (3, 3), stochastic=stochastic, rngs=rngs())
    twin = low_bit_linen.BinaryConnectConv(3, (3, 3), stochastic=stochastic)
    delta = jnp.zeros((1, 3, 3, 5)).at[0, 1, 1, 2].set(1)

    outs = [layer(delta), twin.apply({"params": weights(layer)}, delta, rngs={"binary": jax.random.key(0)})]

    for out in outs:
        assert set(np.unique(out)) == {-1.0, 1.0}
    flipped = np.asarray(outs[0][0])[::-1, ::-1]
    assert stochastic or np.array_equal(flipped, np.where(layer.kernel[...][:, :, 2] >= 0, 1, -1))


def test_a_policy_draws_by_the_bits_of_the_weights():
    """Equal weights equal draws; after any step all draws are new. The mean of 40,000 is that of the weights."""
    fn = pl.apply_policy(lambda w, x: x @ w, "weight=binary,unscaled,stochastic")
    w = jnp.asarray(RNG.uniform(-1, 1, (200, 200)), jnp.float32)

    first, again, other = (np.asarray(fn(each, jnp.eye(200))) for each in (w, w, w.at[0, 0].add(1e-6)))

    assert set(np.unique(first)) == {-1.0, 1.0}
    np.testing.assert_array_equal(first, again)
    assert 0.2 < np.mean(first[1:] != other[1:]) < 0.45  # 2 E[p (1 - p)] = 1/3
    assert np.mean(first * np.asarray(w)) == pytest.approx(1 / 3, abs=4 / 200)


@pytest.mark.parametrize("policy", ["binary_connect", "bwn", "twn"])
def test_what_is_stored_is_what_the_layer_multiplies_by(policy):
    layer = low_bit_nnx.LowBitLinear(40, 24, policy=policy, use_bias=False, rngs=rngs())
    stored = pl.quantize(layer.kernel[...], PRESETS[policy].policy.weight, axis=0)

    np.testing.assert_array_equal(layer(jnp.eye(40)), stored.dequantize())
    assert stored.nbytes == {"binary_connect": 120 + 4, "bwn": 120 + 4 * 24, "twn": 192 + 4}[policy]


def test_no_policy_around_a_layer_touches_it_in_either_pass():
    """A product in such a region that is differentiated by a rule was refused under a policy that quantizes."""
    module = low_bit_linen.BitDense(5)
    params = module.init(jax.random.key(0), X)["params"]
    model = nnx.Sequential(low_bit_nnx.BitLinear(8, 5, rngs=rngs()), nnx.Linear(5, 3, rngs=rngs()))
    w8a8 = pl.apply_policy(model, "w8a8")

    def gradient(module):
        return jax.jit(jax.grad(lambda p: module.apply({"params": p}, X).sum()))(params)

    plain = gradient(module)
    with pytest.warns(UserWarning, match="full_precision region"):
        under = gradient(pl.apply_policy(module, "w8a8"))

    assert_same_bits(jax.tree.leaves(under), jax.tree.leaves(plain))
    table = pl.sites(model, X, policy="w8a8")
    assert [bool(site.reason) for site in table] == [True, False]
    rest = pl.apply_policy(model.layers[1], "w8a8")
    assert_same_bits([jax.jit(lambda x: w8a8(x))(X)], [jax.jit(lambda x: rest(model.layers[0](x)))(X)])


def test_layers_of_one_policy_share_a_program_and_can_be_pickled():
    one, other = (low_bit_nnx.XnorLinear(8, 5, rngs=nnx.Rngs(seed)) for seed in (0, 1))

    assert nnx.split(one)[0] == nnx.split(other)[0]
    assert_same_bits([pickle.loads(pickle.dumps(one))(X)], [one(X)])


def test_layers_run_under_strict_dtype_promotion_and_in_16_bits():
    with jax.numpy_dtype_promotion("strict"):
        layer = low_bit_nnx.BitLinear(8, 5, dtype=jnp.bfloat16, rngs=rngs())
        conv = low_bit_nnx.XnorConv(5, 3, (3, 3), dtype=jnp.bfloat16, rngs=rngs())

        for model, x in ((layer, X), (conv, IMAGES)):
            gradient, out = jax.jit(jax.grad(lambda x: total(x, model), has_aux=True))(x)  # noqa: B023

            assert out.dtype == jnp.bfloat16
            assert np.isfinite(gradient).all()


def total(x, model):
    """Returns the sum of a model's output, and the output."""
    out = model(x)
    return out.astype(jnp.float32).sum(), out


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: low_bit_nnx.BitLinear(8, 5, precision="highest", rngs=rngs())(X),
            "its policy says what is multiplied",
        ),
        (lambda: low_bit_nnx.LowBitLinear(8, 5, policy="twn;a/**:weight=none", rngs=rngs()), "can have no rules"),
        (
            lambda: low_bit_nnx.LowBitLinear(8, 5, policy="bfloat16_pure", rngs=rngs()),
            "leave out params=, output= and ops=",
        ),
        (lambda: low_bit_linen.LowBitDense(5, policy="w8a8,ops=autocast"), "leave out params=, output= and ops="),
        (lambda: low_bit_nnx.XnorConv(5, 3, (3, 3), policy="xnor", rngs=rngs()), "or window_scales=False"),
        (lambda: low_bit_nnx.LowBitLinear(8, 5, policy="xnorr", rngs=rngs()), "did you mean 'xnor'"),
        (
            lambda: low_bit_nnx.XnorConv(5, 5, (3, 3), feature_group_count=5, rngs=rngs())(IMAGES),
            "convolutions without groups",
        ),
    ],
)
def test_what_cannot_be_honoured_is_refused_with_the_way_out(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def mlp():
    return nnx.Sequential(*(nnx.Linear(8, 8, rngs=nnx.Rngs(seed)) for seed in range(3)))


def test_the_ends_of_a_model_are_kept_by_rules_that_name_them():
    policy = keep_ends("xnor", mlp(), X)

    by_hand = "xnor;layers/0/kernel:weight=none,activation=none;layers/2/kernel:weight=none,activation=none"
    assert policy == pl.Policy.parse(by_hand)
    settings = [site.settings for site in pl.sites(mlp(), X, policy=policy)]
    assert [bool(each) for each in settings] == [False, True, False]
    first = keep_ends("w8a8,backward=original", mlp(), X, ends=("first",))
    assert [bool(site.settings) for site in pl.sites(mlp(), X, policy=first)] == [False, True, True]


def test_the_ends_of_a_linen_model_and_of_a_function_are_found_in_the_order_in_which_they_run():
    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            for name in "zma":
                x = linen.Dense(8, name=name)(x)
            return x

    variables = jax.eval_shape(Model().init, jax.random.key(0), X)

    policy = keep_ends("bwn", Model(), variables, X)
    of_function = keep_ends("bwn", lambda p, x: x @ p["b"] @ p["a"] @ p["c"], dict.fromkeys("abc", jnp.eye(8)), X)

    assert [rule.pattern for rule in policy.rules] == ["z/kernel", "a/kernel"]
    assert [rule.pattern for rule in of_function.rules] == ["b", "c"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: keep_ends("bfloat16_mixed", mlp(), X), "quantizes nothing"),
        (lambda: keep_ends("xnor", mlp(), X, ends=("middle",)), "ends must be of first, last, got"),
        (lambda: keep_ends("xnor", lambda p, x: x * 2, {}, X), "no product with a parameter"),
    ],
)
def test_ends_that_cannot_be_kept_are_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()

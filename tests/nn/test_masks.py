"""Weights with a mask are weights, whose zeros stay zero or are refused; flags are no numbers to take signs of."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import precision_lab as pl
from precision_lab.nn import storage
from precision_lab.quant import fake_quantize

RNG = np.random.default_rng(0)
X = RNG.standard_normal((2, 5, 5, 4)).astype(np.float32)
MASK = np.ones((3, 3, 4, 8), np.float32)
MASK[2, 1:], MASK[1, 2] = 0, 0  # as a causal convolution over pixels has it
ROWS = X.reshape(-1)[:192].reshape(12, 16)
W = {"w": RNG.standard_normal((16, 4)).astype(np.float32)}
MASKS = {"float": MASK, "jax": jnp.asarray(MASK), "bool": MASK > 0}


def nnx_conv(mask):
    conv = nnx.Conv(4, 8, (3, 3), mask=mask, use_bias=False, rngs=nnx.Rngs(0))
    return conv.kernel[...], lambda policy: pl.apply_policy(conv, policy)(X)


def linen_conv(mask):
    conv = linen.Conv(8, (3, 3), mask=mask, use_bias=False)
    variables = jax.jit(conv.init)(jax.random.key(0), X)
    return variables["params"]["kernel"], lambda policy: pl.apply_policy(conv, policy).apply(variables, X)


def convolved(kernel):
    numbers = ("NHWC", "HWIO", "NHWC")
    return jax.lax.conv_general_dilated(X, kernel, (1, 1), "SAME", dimension_numbers=numbers)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("conv", [nnx_conv, linen_conv])
@pytest.mark.parametrize("quantizer", ["int4@channel", "ternary@channel", "uint4@channel,affine"])
def test_a_weight_with_a_mask_is_quantized_and_its_zeros_stay(conv, mask, quantizer):
    kernel, under = conv(MASKS[mask])

    out = under(f"weight={quantizer}")

    expected = convolved(fake_quantize(kernel * MASK, quantizer, axis=(0, 1, 2)))
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    assert np.abs(out - under("float32")).max() > 0.01


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("conv", [nnx_conv, linen_conv])
@pytest.mark.parametrize("policy", ["bwn", "xnor", "binary_connect", "weight=binary"])
def test_signs_of_a_weight_with_a_mask_are_refused(conv, mask, policy):
    _, under = conv(MASKS[mask])

    with pytest.raises(ValueError, match=r"would make \+1: say weight=ternary, or leave it out"):
        under(policy)
    np.testing.assert_array_equal(under(f"{policy};kernel:weight=none,activation=none"), under("float32"))


def test_a_scale_of_constants_and_a_scalar_are_no_reason_to_refuse_other_formats():
    """A scalar is no mask, so signs of a weight with an equalized learning rate are its signs."""
    x = X.reshape(-1, 4)[:, :4]
    w = W["w"][:4]

    out = pl.apply_policy(lambda w, x: x @ (w * 0.5), "weight=binary@channel")(w, x)

    np.testing.assert_allclose(out, x @ fake_quantize(w * 0.5, "binary@channel", axis=0), rtol=1e-5, atol=1e-6)


def test_a_masked_convolution_is_converted_with_a_word_about_its_weight():
    """It is computed with before it is multiplied, so that it cannot be stored in codes."""
    conv = nnx.Sequential(nnx.Conv(4, 8, (3, 3), mask=MASK, rngs=nnx.Rngs(0)), nnx.Linear(8, 8, rngs=nnx.Rngs(1)))

    with pytest.warns(UserWarning, match="computed with before it is multiplied"):
        packed = pl.convert(conv, "weight=int4@channel", X)

    np.testing.assert_allclose(packed(X), pl.apply_policy(conv, "weight=int4@channel")(X), rtol=1e-5, atol=1e-5)
    assert [row.format for row in storage(packed) if "kernel" in row.path] == ["float32", "int4"]


def test_data_beside_a_model_are_no_constants():
    """A norm's gain times what a closure over a batch captured is data, not a weight."""

    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(4)(linen.LayerNorm()(x))

    x, net = X.reshape(-1, 4), Net()
    variables = net.init(jax.random.key(0), x)
    under = pl.apply_policy(net, "weight=int2@channel,activation=int8@token")

    given, captured = under.apply(variables, x), under.apply(variables, method=lambda module: module(x))

    np.testing.assert_array_equal(captured, given)


@pytest.mark.parametrize("policy", ["xnor", "binary_net", "weight=binary@channel,activation=binary"])
def test_rows_of_a_one_hot_product_are_the_rows_of_the_weight(policy):
    """As a lookup of these rows: before, every row was the sum of all."""

    def product(p, ids):
        return jax.nn.one_hot(ids, 16) @ p["w"]

    out = pl.apply_policy(product, policy)(W, jnp.arange(16))

    weight = pl.Policy.parse(policy).weight
    np.testing.assert_allclose(out, fake_quantize(W["w"], weight, axis=0), rtol=1e-6)
    [site] = pl.sites(product, W, jnp.arange(16), policy=policy)
    assert site.treatment.activation is None


def test_a_sum_over_flags_is_no_product_of_signs():
    def pooled(p, x, flags):
        return flags.astype(x.dtype) @ jnp.tanh(x @ p["w"])

    x, flags = RNG.standard_normal((5, 16)).astype(np.float32), np.tri(5, dtype=bool)

    out = pl.apply_policy(pooled, "attention=binary")(W, x, flags)

    np.testing.assert_allclose(out, flags @ np.tanh(x @ W["w"]), rtol=1e-5, atol=1e-5)
    eight = pl.apply_policy(pooled, "attention=int8@token")(W, x, flags)
    assert 0 < np.abs(eight - out).max() < 0.1


def relu_before(p, x):
    return jax.nn.relu(x @ p["w"]) @ p["v"]


@pytest.mark.parametrize(
    ("between", "warns"),
    [
        (jax.nn.relu, True),
        (lambda h: nnx.max_pool(jax.nn.relu(h)[:, :, None], (1, 1))[..., 0], True),
        (jax.nn.softmax, True),
        (lambda h: (jnp.abs(h) + jax.nn.sigmoid(h)) / 2, True),
        (jnp.tanh, False),
        (lambda h: jax.nn.relu(h) - h.mean(), False),
        (lambda h: jnp.maximum(h, -1.0), False),
        (jax.nn.gelu, False),
    ],
)
@pytest.mark.parametrize("policy", ["binary_net", "xnor", "attention=binary"])
def test_signs_of_what_is_never_negative_are_warned_of(between, warns, policy, recwarn):
    """A network with a ReLU before the sign learns nothing: every activation is +1, whatever the data."""

    def net(p, x):
        h = between(x @ p["w"])
        return h @ (h.T @ h) if policy.startswith("attention") else h @ p["v"]

    params = {**W, "v": W["w"].T[:, :3]}

    pl.apply_policy(net, policy)(params, ROWS)

    said = [str(one.message) for one in recwarn if "never negative" in str(one.message)]
    assert len(said) == (1 if warns else 0)
    assert all("whatever the data" in one for one in said)


@pytest.mark.parametrize("policy", ["bitnet_b158", "bwn", "weight=binary,activation=binary;v:activation=none", "twn"])
def test_policies_that_keep_the_data_of_a_relu_say_nothing(policy, recwarn):
    pl.apply_policy(relu_before, policy)({**W, "v": W["w"].T}, ROWS)

    assert not [one for one in recwarn if "never negative" in str(one.message)]


@pytest.mark.parametrize("rules", ["", ";w:compute=bfloat16"])
def test_flags_have_no_outliers(rules):
    """Before, the product ended with an AttributeError, or under any rule with a setting that nobody gave."""

    def product(p, ids):
        return jax.nn.one_hot(ids, 16) @ p["w"]

    policy = "weight=int8@channel,activation=binary,outliers=6.0" + rules
    out = pl.apply_policy(product, policy)(W, jnp.arange(16))

    expected = pl.apply_policy(product, "weight=int8@channel" + rules)(W, jnp.arange(16))
    np.testing.assert_array_equal(out, expected)

"""Products of quantized operands. Oracle: NumPy products, in float64, of operands quantized one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from precision_lab.policy import PRESETS, Policy
from precision_lab.quant import fake_quantize
from precision_lab.rewrite import apply_to_function, sites_of_function
from tests.jaxprs import equations, products

W8A8 = "weight=int8@channel,activation=int8@token"


def normal(shape, seed):
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def dense(w, x):
    return x @ w


def under(fn, spec):
    return apply_to_function(fn, Policy.parse(spec))


def value_and_grads(fn, *operands):
    """The value of `fn`, and the gradients of its sum weighted with fixed normal numbers."""
    out, pullback = jax.vjp(fn, *operands)
    return out, *pullback(jnp.asarray(normal(out.shape, 99)))


def q(x, spec, axis):
    return np.asarray(fake_quantize(x, spec, axis=axis), np.float64)


OPERANDS = normal((16, 8), 0), normal((4, 16), 1)


@pytest.mark.parametrize(
    ("weight", "activation"),
    [("int8@channel", "int8@token"), ("int4@group8", "int8"), ("nf4", None), ("mxfp4", "mxfp8"), ("int4,affine", None)],
)
def test_the_forward_product_is_that_of_the_quantized_operands_and_so_are_its_gradients(weight, activation):
    w, x = OPERANDS
    fn = under(dense, f"weight={weight},activation={activation or 'none'}")

    out, dw, dx = jax.jit(lambda w, x: value_and_grads(fn, w, x))(w, x)

    wq, xq = q(w, weight, 0), q(x, activation, 1) if activation else x.astype(np.float64)
    g = normal(out.shape, 99).astype(np.float64)
    # float32 sums of 16 terms of size 1.
    np.testing.assert_allclose(out, xq @ wq, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, g @ wq.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dw, xq.T @ g, rtol=1e-5, atol=1e-5)


WEIGHTS = {"bth,hd->btd": (8, 6), "btgh,ghd->btd": (2, 4, 6), "bth,dh->dbt": (6, 8), "thb,hd->tbd": (8, 6)}


@pytest.mark.parametrize("execution", ["auto", "simulated"])
@pytest.mark.parametrize("activation", ["int8@token", "int8@channel", "int8@tensor", "int8@group4", "float8_e4m3fn"])
@pytest.mark.parametrize("equation", WEIGHTS)
def test_operands_of_more_axes_are_quantized_as_the_matrices_that_they_are(equation, activation, execution):
    """Whether before they are brought into that shape or after is a question of speed: values and gradients agree."""
    weight = "float8_e4m3fn@channel" if activation.startswith("float") else "int8@channel"
    operands, result = equation.split("->")
    left = operands.split(",")[0]
    w = normal(WEIGHTS[equation], 0)
    x = normal([{"b": 3, "t": 5, "g": 2, "h": w.size // 6 // (2 if "g" in left else 1)}[axis] for axis in left], 1)
    rows = x.transpose([left.index(axis) for axis in "btgh" if axis in left]).reshape(15, -1)
    matrix = w.transpose(1, 0) if operands.endswith("dh") else w.reshape(-1, 6)
    policy = f"weight={weight},activation={activation},execution={execution}"

    out, dw, dx = value_and_grads(under(lambda w, x: jnp.einsum(equation, x, w), policy), w, x)

    expected, pullback = jax.vjp(under(dense, policy), jnp.asarray(matrix), jnp.asarray(rows))
    places = [result.index(axis) for axis in "btd"]
    # einsum may put the weight first, and the two scales are multiplied in that order.
    np.testing.assert_allclose(out.transpose(places).reshape(15, 6), expected, 1e-6, 1e-6)
    dmatrix, drows = pullback(jnp.asarray(normal(out.shape, 99)).transpose(places).reshape(15, 6))
    np.testing.assert_allclose(
        dw.transpose(1, 0) if operands.endswith("dh") else dw.reshape(-1, 6), dmatrix, 1e-5, 1e-5
    )
    places = [left.index(axis) for axis in "btgh" if axis in left]
    np.testing.assert_allclose(dx.transpose(places).reshape(15, -1), drows, 1e-5, 1e-5)


def test_an_offset_is_not_lost_in_a_product_of_codes():
    """The values of DoReFa's weights are multiples of a step less one, which a product with int8 codes left out."""
    w, x = OPERANDS

    out = under(dense, "weight=uint4@tensor,dorefa,activation=int8@token")(w, x)

    np.testing.assert_allclose(out, q(x, "int8@token", 1) @ q(w, "uint4,dorefa", 0), rtol=1e-5, atol=1e-5)


def test_original_takes_the_gradients_of_the_operands_before_quantization():
    """As Qwix and AQT do; check 13 of the notes on JAX quantization."""
    w, x = OPERANDS

    out, dw, dx = value_and_grads(under(dense, f"{W8A8},backward=original"), w, x)

    g = normal(out.shape, 99)
    np.testing.assert_allclose(out, q(x, "int8@token", 1) @ q(w, "int8@channel", 0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, g @ w.T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dw, x.T @ g, rtol=1e-5, atol=1e-5)


def test_with_a_gradient_quantizer_each_product_quantizes_its_operands_along_what_it_contracts():
    w, x = OPERANDS

    out, dw, dx = value_and_grads(under(dense, f"{W8A8},gradient=int8@token"), w, x)

    g = normal(out.shape, 99)
    np.testing.assert_allclose(dx, q(g, "int8@token", 1) @ q(w, "int8@channel", 1).T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dw, q(x, "int8@token", 0).T @ q(g, "int8@token", 0), rtol=1e-5, atol=1e-5)


def test_each_backward_product_can_be_left_in_a_format_of_its_own():
    """SwitchBack: the weight gradient in 16 bits; check: the other stays quantized."""
    import ml_dtypes

    w, x = OPERANDS

    out, dw, dx = value_and_grads(under(dense, f"{W8A8},gradient=int8@token,wgrad=bfloat16"), w, x)

    g = normal(out.shape, 99)
    low = [a.astype(ml_dtypes.bfloat16).astype(np.float64) for a in (x, g)]
    np.testing.assert_allclose(dw, low[0].T @ low[1], rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, q(g, "int8@token", 1) @ q(w, "int8@channel", 1).T, rtol=1e-5, atol=1e-5)


CONV = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
SITES = {
    "dense": (dense, (16, 8), (4, 16)),
    "heads": (lambda w, x: jnp.einsum("btd,dnh->bnth", x, w), (8, 2, 4), (2, 3, 8)),
    "output projection": (lambda w, x: jnp.einsum("btnh,nhd->btd", x, w), (2, 4, 8), (2, 3, 2, 4)),
    "attention scores": (lambda w, x: jnp.einsum("btnh,bsnh->bnts", x, x + w), (2, 3, 2, 4), (2, 3, 2, 4)),
    "convolution": (lambda w, x: lax.conv_general_dilated(x, w, **CONV), (3, 3, 2, 4), (2, 5, 5, 2)),
    "grouped": (lambda w, x: lax.conv_general_dilated(x, w, feature_group_count=2, **CONV), (3, 3, 2, 6), (2, 5, 5, 4)),
    "depthwise": (
        lambda w, x: lax.conv_general_dilated(x, w, feature_group_count=4, **CONV), (3, 3, 1, 4), (2, 5, 5, 4)
    ),
}  # fmt: skip
EXECUTED = [
    f"{W8A8},attention=int8@token",
    "weight=int4@channel,activation=int8,attention=int8",
    f"{W8A8},attention=int8@token,gradient=int8@token",
    "float8_hybrid,compute=float32,attention=float8_e4m3fn",
]


@pytest.mark.parametrize("spec", EXECUTED)
@pytest.mark.parametrize("site", SITES)
def test_native_equals_simulated_to_accumulation_order_in_all_three_products(site, spec):
    fn, w_shape, x_shape = SITES[site]
    w, x = normal(w_shape, 0), normal(x_shape, 1)

    runs = [
        jax.jit(lambda w, x, how=how: value_and_grads(under(fn, f"{spec},execution={how}"), w, x))(w, x)
        for how in ("native", "simulated")
    ]

    for native, simulated in zip(*runs, strict=True):
        # The same numbers summed in another order, and scaled after instead of before: some roundings of 2^-24.
        np.testing.assert_allclose(native, simulated, rtol=1e-5, atol=2e-5)


def test_native_products_multiply_int8_into_int32_and_float8_into_float32():
    w, x = OPERANDS

    assert products(under(dense, W8A8), w, x) == [("int8", "int8", "int32")]
    assert products(under(dense, "weight=int4@channel,activation=int8@token"), w, x) == [("int8", "int8", "int32")]
    every = products(jax.grad(lambda w: under(dense, f"{W8A8},gradient=int8@token")(w, x).sum()), w)
    assert set(every) == {("int8", "int8", "int32")}
    low = products(under(dense, "float8_hybrid,execution=native"), w, x)
    assert low == [("float8_e4m3fn", "float8_e4m3fn", "float32")]
    assert products(under(dense, f"{W8A8},execution=simulated"), w, x) == [("float32",) * 3]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("weight=int4@group8,activation=int8@token", "has several scales along the contracted axis"),
        ("weight=int8,activation=uint8,affine", "has a zero point"),
        ("weight=nf4,activation=int8", "has no array type of up to 8 bits"),
        ("weight=int8,activation=float8_e4m3fn", "are an integer and a float"),
        ("compute=tf32", "no array dtype holds compute=tf32"),
    ],
)
def test_native_execution_of_what_no_hardware_multiplies_is_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        under(dense, f"{spec},execution=native")(*OPERANDS)


@pytest.mark.parametrize("execution", ["simulated", "native"])
def test_operands_are_rounded_to_their_grid_and_to_nothing_else(execution):
    """Rounding to float32 changes nothing, but hid transposes from XLA: a simulated step took 1.45 times float32.

    Under native execution codes are rounded once for the forward product and the values that the backward ones take.
    """
    w, x = OPERANDS
    fn = under(dense, f"{W8A8},execution={execution}")

    def bit_casts(fn):
        return sum(eqn.primitive.name == "bitcast_convert_type" for eqn in equations(jax.make_jaxpr(fn)(w, x)))

    once = bit_casts(lambda w, x: (fake_quantize(w, "int8@channel", axis=0), fake_quantize(x, "int8@token", axis=1)))

    assert bit_casts(lambda w, x: value_and_grads(fn, w, x)) == once > 0


def test_weight_only_quantization_leaves_the_other_operand_in_the_compute_format():
    import ml_dtypes

    w, x = OPERANDS

    out = under(dense, "c=bfloat16,o=f32,weight=int4@group8")(w, x)

    wq = q(w, "int4@group8", 0).astype(ml_dtypes.bfloat16).astype(np.float64)
    np.testing.assert_allclose(out, x.astype(ml_dtypes.bfloat16).astype(np.float64) @ wq, rtol=1e-5, atol=1e-5)


def test_attention_is_left_alone_unless_its_own_setting_says_otherwise():
    fn, w, x = SITES["attention scores"][0], *(normal((2, 3, 2, 4), i) for i in range(2))

    assert products(under(fn, W8A8), w, x) == [("float32",) * 3]
    # Such a product is the author's own, derivative and all, as without a policy.
    assert not any(eqn.primitive.name == "custom_jvp_call" for eqn in equations(jax.make_jaxpr(under(fn, W8A8))(w, x)))
    assert products(under(fn, f"{W8A8},attention=int8@token"), w, x) == [("int8", "int8", "int32")]


@pytest.mark.parametrize(
    "derived",
    {
        "slice": lambda w: w[:, :4],
        "joined": lambda w: jnp.concatenate([w, 2 * w], 1),
        "product": lambda w: w * jnp.exp(w),
        "masked": lambda w: jnp.where(np.tri(16, 8, dtype=bool), w, 0),
        "tied": lambda w: w @ w.T,
        "normalised": lambda w: w / jnp.linalg.norm(w, axis=0),
    }.items(),
    ids=lambda item: item[0],
)
def test_what_is_computed_from_weights_alone_is_a_weight(derived):
    """Check 19 of the notes on JAX quantization: the relative error of int3 is 0.15 to 0.35, and eager equals jit."""
    w, x = normal((16, 8), 0), normal((64, 16), 1)

    def fn(w, x):
        return x @ derived[1](w)

    eager, jitted = under(fn, "weight=int3@channel")(w, x), jax.jit(under(fn, "weight=int3@channel"))(w, x)

    exact = fn(w, x)
    assert 0.1 < jnp.linalg.norm(eager - exact) / jnp.linalg.norm(exact) < 0.4
    np.testing.assert_allclose(eager, jitted, rtol=1e-5, atol=1e-5)


def test_stochastic_gradients_differ_between_arrays_and_are_right_on_average():
    """The key is made of the array's bits, so 4096 cotangents that differ in their last bit are 4096 draws."""
    w = jnp.eye(2)
    fn = under(dense, "weight=int8,activation=int8,gradient=int4,stochastic")
    scales = 1 + jnp.arange(4096) * 2.0**-23

    def input_gradient(scale):
        return jax.vjp(fn, w, jnp.ones((1, 2)))[1](jnp.array([[0.3, 1.0]]) * scale)[1][0, 0]

    drawn = jax.jit(jax.vmap(input_gradient))(scales)

    # 0.3 is 2.1 steps of 1/7: 2/7 or 3/7, the latter one time in ten; identity weights are exact.
    steps = np.round(np.asarray(drawn) * 7)
    assert set(steps) == {2.0, 3.0}
    # Four standard errors of a share of 0.1 among 4096.
    assert abs((steps == 3).mean() - 0.1) < 4 * np.sqrt(0.09 / 4096)


def test_quantizers_are_refused_where_a_hand_written_rule_could_not_follow():
    @jax.custom_vjp
    def product(x, w):
        return x @ w

    product.defvjp(lambda x, w: (x @ w, (x, w)), lambda kept, g: (g @ kept[1].T, kept[0].T @ g))
    fn = under(lambda w, x: jnp.sum(product(x, w)), W8A8)

    with pytest.raises(ValueError, match=r"multiplies inside a custom derivative.*Leave it out by a rule"):
        jax.grad(fn)(*OPERANDS)


@pytest.mark.parametrize("name", [name for name, preset in PRESETS.items() if preset.policy.quantizes])
def test_every_preset_trains_a_layer_forward_and_backward(name):
    w, x = normal((64, 32), 0), normal((8, 64), 1)

    out, dw, dx = jax.jit(lambda w, x: value_and_grads(under(dense, name), w, x))(w, x)

    exact = value_and_grads(dense, w, x)
    # On normal numbers b1.58 has a relative error of 0.51. Signs: scaled 0.60, bare ones 0.64, products of two bare
    # ones sqrt(2 - 4 / pi) = 0.85, and 0.77 where gradients stop beyond 1.
    limit = 0.95 if PRESETS[name].policy.weight.format.name == "binary" else 0.6
    for ours, theirs in zip((out, dw, dx), exact, strict=True):
        assert np.linalg.norm(ours - theirs) < limit * np.linalg.norm(theirs)
        assert bool(jnp.all(jnp.isfinite(ours)))


def test_settings_by_site_reach_quantizers_and_accumulators():
    def fn(params, x):
        return (x @ params["up"]) @ params["head"]

    params = {"up": normal((16, 16), 0), "head": normal((16, 4), 1)}
    policy = Policy.parse(f"{W8A8};head:weight=none,activation=none,accum=float16@step4")

    table = sites_of_function(fn, policy, params, [OPERANDS[1]], {})

    assert [str(site.treatment.weight) for site in table] == ["int8@channel", "None"]
    assert [str(site.accum) for site in table] == ["float32", "float16@step4"]
    assert table.to_dicts()[0]["weight"] == "int8@channel"


def test_a_float16_accumulator_stalls_at_2048_and_promotion_saves_it():
    """Sum of 4096 ones; DeepSeek-V3, section 3.3.2, promotes every 128."""
    ones = np.ones((4096, 1), np.float32)

    def total(accum):
        return float(under(dense, f"c=bfloat16,o=f32,accum={accum}")(ones, ones.T)[0, 0])

    assert total("float16") == 2048
    assert total("bfloat16") == 256
    assert total("float16@step4@promote128") == 4096
    assert total("float32") == 4096


def test_gradients_accumulate_as_the_policy_says_too():
    """A weight gradient sums over the batch: 4096 examples in float16 stop at 2048."""
    w, x = jnp.ones((1, 1)), jnp.ones((4096, 1))
    fn = under(dense, "c=bfloat16,o=f32,accum=float16")

    assert jax.grad(lambda w: fn(w, x).sum())(w)[0, 0] == 2048

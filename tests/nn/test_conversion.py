"""Converted models compute what their policies promised, from packed parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import precision_lab as pl
from precision_lab import models
from precision_lab.models import DataSpec
from precision_lab.models.config import ConvNetConfig, TransformerConfig
from precision_lab.quant import QTensor

TOKENS = jax.random.randint(jax.random.key(0), (2, 8), 0, 32)
POLICIES = [
    "w4a16",
    "w8a8",
    "w4a8",
    "nf4",
    "mxfp4",
    "nvfp4",
    "bitnet_b158",
    "weight=float8_e4m3fn@channel,activation=float8_e4m3fn@token",
    "weight=nf4@group64,double",
    "weight=int4@group16,affine,activation=int8@tensor",
    "weight=int4@channel,embedding=int4@channel,attention=int8@token",
]


def transformer():
    return models.build(TransformerConfig(depth=1, width=32, heads=2), DataSpec("language_model", (8,), 32), 0)


def packed_leaves(tree):
    return {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree.leaves_with_path(tree, is_leaf=lambda leaf: isinstance(leaf, QTensor))
        if isinstance(leaf, QTensor)
    }


def nbytes(tree):
    return sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(tree))


def attention(params, tokens):
    """A lookup, products with parameters that are transposed or contract two axes, and one without."""
    x = jnp.take(params["table"], tokens, axis=0)
    heads = jnp.einsum("btd,dhk->bthk", x, params["heads"])
    scores = jnp.einsum("bthk,bshk->bhts", heads, heads)
    mixed = jnp.einsum("bhts,bshk,hkd->btd", jax.nn.softmax(scores), heads, params["out"])
    return mixed @ params["head"].T


@pytest.mark.parametrize("policy", POLICIES)
def test_what_is_converted_computes_to_accumulation_order_what_its_policy_promised(policy):
    """XLA may sum in another order in another program; op by op, the whole models below are equal bit for bit."""
    shapes = {"table": (32, 64), "heads": (64, 2, 64), "out": (2, 64, 64), "head": (8, 64)}
    keys = jax.random.split(jax.random.key(0), len(shapes))
    params = {name: jax.random.normal(key, shape) for key, (name, shape) in zip(keys, shapes.items(), strict=True)}

    run, stored = pl.convert(attention, policy, TOKENS, params=params)

    expected = jax.jit(pl.apply_policy(attention, policy))(params, TOKENS)
    np.testing.assert_allclose(jax.jit(run)(stored, TOKENS), expected, rtol=0, atol=2e-6 * jnp.max(jnp.abs(expected)))
    assert set(packed_leaves(stored)) >= {"['heads']", "['out']", "['head']"}


@pytest.mark.parametrize("policy", ["w4a16", "weight=int8@channel,activation=int8@token,attention=int8@token"])
def test_a_converted_model_computes_bit_for_bit_what_its_policy_promised(policy):
    model = transformer()

    packed = pl.convert(model, policy, TOKENS)

    assert_equal(packed(TOKENS), pl.apply_policy(model, policy)(TOKENS))
    assert len(packed_leaves(nnx.state(packed))) == 7


def test_bytes_are_those_of_the_codes_and_scales():
    model = transformer()

    packed = pl.convert(model, "weight=int4@group32", TOKENS)

    kernel = packed.blocks[0].up.kernel.get_raw_value()
    assert kernel.nbytes == 32 * 128 // 2 + 4 * 128  # half a byte each; one float32 for 32 rows of 128 columns
    assert nbytes(kernel) == kernel.nbytes
    assert packed.blocks[0].up.kernel.get_raw_value().shape == (32, 128)


def test_the_model_that_is_converted_does_not_change_and_paths_stay():
    model = transformer()
    before = nnx.state(model)

    packed = pl.convert(model, "w8a8", TOKENS)

    assert_equal(nnx.state(model), before)
    paths = [path for path, _ in nnx.to_flat_state(before)]
    assert [path for path, _ in nnx.to_flat_state(nnx.state(packed))] == paths


def test_a_converted_model_runs_under_nnx_jit_and_survives_split_and_merge():
    packed = pl.convert(transformer(), "w4a8", TOKENS)
    expected = packed(TOKENS)

    merged = nnx.merge(*nnx.split(packed))

    np.testing.assert_allclose(nnx.jit(lambda model, x: model(x))(packed, TOKENS), expected, atol=1e-5)
    assert_equal(merged(TOKENS), expected)


def test_convolutions_grouped_and_depthwise_are_stored_too():
    class Net(nnx.Module):
        def __init__(self, rngs):
            self.plain = nnx.Conv(3, 8, (3, 3), rngs=rngs)
            self.grouped = nnx.Conv(8, 8, (3, 3), feature_group_count=2, rngs=rngs)
            self.depthwise = nnx.Conv(8, 8, (3, 3), feature_group_count=8, rngs=rngs)

        def __call__(self, x):
            return self.depthwise(self.grouped(self.plain(x)))

    x = jax.random.normal(jax.random.key(0), (2, 6, 6, 3))
    model = Net(nnx.Rngs(0))

    packed = pl.convert(model, "weight=int8@channel,activation=int8@tensor", x)

    assert len(packed_leaves(nnx.state(packed))) == 3
    assert_equal(packed(x), pl.apply_policy(model, "weight=int8@channel,activation=int8@tensor")(x))


def test_native_products_of_codes_equal_simulated_ones_to_accumulation_order():
    model, policy = transformer(), "weight=int8@channel,activation=int8@token,attention=int8@token"

    native = pl.convert(model, policy, TOKENS)(TOKENS)
    simulated = pl.convert(model, policy + ",execution=simulated", TOKENS)(TOKENS)

    np.testing.assert_allclose(native, simulated, rtol=0, atol=1e-5 * float(jnp.max(jnp.abs(simulated))))


def test_int8_products_are_of_int8_arrays():
    packed = pl.convert(transformer(), "w8a8", TOKENS)
    graphdef, state = nnx.split(packed)

    text = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x)).lower(state, TOKENS).as_text()

    assert text.count("xi8>, tensor<") >= 7


class Scanned(linen.Module):
    @linen.compact
    def __call__(self, x):
        class Block(linen.Module):
            @linen.compact
            def __call__(self, x, _):
                return jnp.tanh(linen.Dense(16)(x)), None

        layers = linen.scan(linen.remat(Block), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
        return linen.Dense(4, use_bias=False)(layers()(x, None)[0])


@pytest.mark.parametrize("policy", ["w8a8", "weight=int4@group8", "nf4", "nvfp4", "weight=nf4@group64,double"])
def test_stacked_parameters_of_a_linen_scan_are_stored_layer_by_layer(policy):
    x = jax.random.normal(jax.random.key(1), (2, 16))
    module = Scanned()
    variables = module.init(jax.random.key(0), x)

    packed, stored = pl.convert(module, policy, x, params=variables)

    expected = pl.apply_policy(module, policy).apply(variables, x)
    np.testing.assert_allclose(packed.apply(stored, x), expected, rtol=0, atol=2e-6)
    assert len(packed_leaves(stored)) == 2


def test_a_function_gets_back_a_function_and_params():
    params = {"table": jnp.linspace(-1, 1, 64).reshape(8, 8), "w": jnp.ones((8, 3)), "scale": jnp.ones(3)}

    def fn(params, tokens):
        return jnp.take(params["table"], tokens, axis=0) @ params["w"] * params["scale"]

    tokens, policy = jnp.asarray([1, 3, 7]), "weight=int8@channel,embedding=int8@channel"
    run, stored = pl.convert(fn, policy, tokens, params=params)

    assert set(packed_leaves(stored)) == {"['table']", "['w']"}
    assert_equal(run(stored, tokens), pl.apply_policy(fn, policy)(params, tokens))


@pytest.mark.parametrize("format", ["int8", "int4", "nf4", "int3", "ternary"])
@pytest.mark.parametrize("granularity", ["channel", "group4", "tensor"])
def test_rows_of_a_stored_table_are_those_of_the_table_also_beyond_its_ends(format, granularity):
    table, tokens = jax.random.normal(jax.random.key(0), (6, 8)), jnp.asarray([[0, 5, -1], [6, 100, 2]])
    policy = f"embedding={format}@{granularity}"

    def fn(params, tokens):
        return jnp.take(params["table"], tokens, axis=0)

    run, stored = pl.convert(fn, policy, tokens, params={"table": table})

    whole = pl.fake_quantize(table, f"{format}@{granularity}", axis=1)
    assert_equal(run(stored, tokens), jnp.take(whole, tokens, axis=0))
    assert_equal(pl.apply_policy(fn, policy)({"table": table}, tokens), jnp.take(whole, tokens, axis=0))


def test_a_tied_table_is_stored_if_lookup_and_product_quantize_it_alike():
    def fn(params, tokens):
        return jnp.take(params["table"], tokens, axis=0) @ params["table"].T

    params, tokens = {"table": jax.random.normal(jax.random.key(0), (6, 8))}, jnp.asarray([1, 4])
    alike, different = "weight=int8@channel,embedding=int8@channel", "weight=int8@channel"

    run, stored = pl.convert(fn, alike, tokens, params=params)

    assert list(packed_leaves(stored)) == ["['table']"]
    assert_equal(run(stored, tokens), pl.apply_policy(fn, alike)(params, tokens))
    with pytest.raises(ValueError, match="'table' cannot be stored: it is used in more than one way"):
        pl.convert(fn, different, tokens, params=params)


def test_a_parameter_with_two_uses_stays_and_is_named():
    def fn(params, x):
        return x @ params["w"] @ params["v"] + jnp.sum(params["w"])

    params = {"w": jnp.eye(4), "v": jnp.eye(4)}

    with pytest.warns(UserWarning, match="'w' is quantized in every call, not stored: it is used in more than one way"):
        run, stored = pl.convert(fn, "w8a8", jnp.ones((1, 4)), params=params)

    assert list(packed_leaves(stored)) == ["['v']"]
    assert_equal(run(stored, jnp.ones((1, 4))), pl.apply_policy(fn, "w8a8")(params, jnp.ones((1, 4))))


def test_a_weight_that_is_computed_with_before_it_is_multiplied_stays_and_is_named():
    params = {name: jnp.eye(32) for name in "wv"}

    with pytest.warns(UserWarning, match="'w' is quantized in every call, not stored: it is computed with before"):
        _, stored = pl.convert(lambda p, x: x @ (p["w"] * 2) + x @ p["v"], "w4a16", jnp.ones((1, 32)), params=params)

    assert list(packed_leaves(stored)) == ["['v']"]


def test_what_cannot_be_converted_is_refused():
    model = transformer()

    with pytest.raises(ValueError, match="quantizes no parameter of this model that can be stored"):
        pl.convert(model, "bfloat16_mixed", TOKENS)
    with pytest.raises(TypeError, match="convert needs a policy and an example"):
        pl.convert(model, "w8a8")
    with pytest.raises(TypeError, match="has its own parameters; leave out params"):
        pl.convert(model, "w8a8", TOKENS, params={})
    with pytest.raises(TypeError, match="params= is missing: the variables of a Linen model"):
        pl.convert(Scanned(), "w8a8", jnp.ones((1, 16)))


def test_a_convnet_with_batch_norm_is_converted_in_evaluation():
    model = models.build(ConvNetConfig(channels=(4, 8), norm="batch"), DataSpec("classification", (8, 8, 3), 10), 0)
    model.eval()
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 3))

    packed = pl.convert(model, "w8a8", x)

    assert_equal(packed(x), pl.apply_policy(model, "w8a8")(x))


@pytest.mark.parametrize("weight", ["int4@group32", "nf4@group64", "nf4@group64,double", "int3@channel", "int8@tensor"])
def test_a_large_weight_is_widened_in_blocks_and_gives_the_same_product_and_gradient(monkeypatch, weight):
    params = {"w": jax.random.normal(jax.random.key(0), (256, 24))}
    x, policy = jax.random.normal(jax.random.key(1), (3, 256)), f"weight={weight},compute=bfloat16"

    def fn(params, x):
        return x @ params["w"]

    run, stored = pl.convert(fn, policy, x, params=params)
    whole, by_whole = jax.value_and_grad(lambda x: jnp.sum(jnp.sin(run(stored, x))))(x)
    monkeypatch.setattr("precision_lab.rewrite.packed.SIZE", 1)
    monkeypatch.setattr("precision_lab.rewrite.packed._ROWS", 64)
    blocks, by_blocks = jax.value_and_grad(lambda x: jnp.sum(jnp.sin(run(stored, x))))(x)

    np.testing.assert_allclose(blocks, whole, rtol=1e-4)
    # Sums in another order put some cotangents on the other side of a bfloat16 rounding, 2^-8 of them.
    np.testing.assert_allclose(by_blocks, by_whole, rtol=0, atol=2**-7 * float(jnp.max(jnp.abs(by_whole))))
    text = str(jax.make_jaxpr(lambda x: run(stored, x))(x))
    assert "scan" in text
    assert "256,24]" not in text.replace("u8[", "")


@pytest.mark.parametrize("through", [jnp.bfloat16, jnp.float8_e4m3fn])
def test_a_weight_that_is_cast_twice_is_quantized_from_what_the_first_cast_left(through):
    def fn(params, x):
        return x @ params["w"].astype(through).astype(jnp.float32) + x @ params["v"]

    params = {name: jax.random.normal(jax.random.key(i), (64, 8)) for i, name in enumerate("wv")}
    x = jax.random.normal(jax.random.key(2), (4, 64))

    run, stored = pl.convert(fn, "w4a16", x, params=params)

    assert_equal(run(stored, x), pl.apply_policy(fn, "w4a16")(params, x))


def test_a_parameter_that_is_returned_is_an_array_and_stays_one():
    def fn(params, x):
        return x @ params["w"], params["w"], x @ params["v"]

    params = {name: jnp.eye(32) for name in "wv"}

    with pytest.warns(UserWarning, match="'w' is quantized in every call"):
        run, stored = pl.convert(fn, "w4a16", jnp.ones((1, 32)), params=params)

    assert list(packed_leaves(stored)) == ["['v']"]
    assert_equal(run(stored, jnp.ones((1, 32)))[1], params["w"])


def test_a_simulated_accumulator_reaches_across_the_blocks_of_a_large_weight(monkeypatch):
    params, x = {"w": jax.random.normal(jax.random.key(0), (256, 8))}, jax.random.normal(jax.random.key(1), (3, 256))
    policy = "weight=int8@channel,accum=bfloat16"
    monkeypatch.setattr("precision_lab.rewrite.packed.SIZE", 1)
    monkeypatch.setattr("precision_lab.rewrite.packed._ROWS", 64)

    run, stored = pl.convert(lambda params, x: x @ params["w"], policy, x, params=params)

    assert_equal(run(stored, x), pl.apply_policy(lambda params, x: x @ params["w"], policy)(params, x))


def test_a_rule_for_products_that_matches_only_a_lookup_is_refused():
    policy = pl.Policy.parse("float32").with_rule("e", weight="int2@tensor")

    with pytest.raises(
        ValueError,
        match="acts on none of the 1 sites that it matches: 'e:gather#0' is a lookup of parameters: say embedding=",
    ):
        pl.apply_policy(lambda params, i: params["e"][i], policy)({"e": jnp.eye(4)}, jnp.asarray([1]))


def test_rows_of_a_table_whose_scales_are_quantized_together_do_not_depend_on_the_others():
    params = {"e": jax.random.normal(jax.random.key(0), (32, 64)) * jnp.arange(1, 33)[:, None]}
    under = pl.apply_policy(lambda params, i: jnp.take(params["e"], i, axis=0), "embedding=nf4@group16,double")

    assert_equal(under(params, jnp.asarray([3]))[0], under(params, jnp.asarray([3, 31]))[0])


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)

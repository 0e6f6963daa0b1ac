"""Policies on Flax models that know nothing of them, NNX and Linen."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx
from flax.training import train_state

from precision_lab.nn import apply_policy, sites
from tests.jaxprs import assert_same_bits, products, result_of

LOW = ("bfloat16", "bfloat16", "float32")
TOKENS = np.random.default_rng(0).integers(0, 17, (2, 6))


class NnxAttention(nnx.Module):
    def __init__(self, width, heads, rngs):
        self.heads = heads
        self.query, self.key, self.value, self.out = (nnx.Linear(width, width, rngs=rngs) for _ in range(4))

    def __call__(self, x):
        q, k, v = (project(x).reshape(*x.shape[:2], self.heads, -1) for project in (self.query, self.key, self.value))
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k))
        return self.out(jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape))


class NnxBlock(nnx.Module):
    def __init__(self, width, heads, rngs):
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.attention = NnxAttention(width, heads, rngs)
        self.up = nnx.Linear(width, 2 * width, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.down = nnx.Linear(2 * width, width, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm(x))
        return x + self.down(self.dropout(jax.nn.gelu(self.up(x))))


class NnxTransformer(nnx.Module):
    """A tied-embedding decoder with remat, as someone else would write it."""

    def __init__(self, vocabulary=17, width=8, heads=2, depth=2, *, rngs):
        self.embed = nnx.Embed(vocabulary, width, rngs=rngs)
        self.blocks = nnx.List([NnxBlock(width, heads, rngs) for _ in range(depth)])

    def __call__(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = nnx.remat(lambda block, x: block(x))(block, x)
        return self.embed.attend(x)


class LinenBlock(linen.Module):
    @linen.compact
    def __call__(self, x, train):
        x = x + linen.MultiHeadDotProductAttention(num_heads=2)(linen.LayerNorm()(x))
        return x + linen.Dense(x.shape[-1])(
            linen.Dropout(0.1, deterministic=not train)(jax.nn.gelu(linen.Dense(16)(x)))
        )


class LinenTransformer(linen.Module):
    @linen.compact
    def __call__(self, tokens, train=False):
        x = linen.Embed(17, 8)(tokens)
        for _ in range(2):
            x = linen.remat(LinenBlock, static_argnums=(2,))()(x, train)
        return linen.Dense(17, name="head")(x)


class ConvNet(nnx.Module):
    def __init__(self, *, rngs):
        self.conv = nnx.Conv(3, 4, (3, 3), rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(jax.nn.relu(self.norm(self.conv(x))).mean((1, 2)))


def cross_entropy(logits):
    return -jax.nn.log_softmax(logits)[..., 0].mean()


def nnx_value_and_grad(model: nnx.Module, x: Any) -> Callable:
    """Returns the pure function params -> (loss, gradients), and the params."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params):
        return cross_entropy(nnx.merge(graphdef, params, rest, copy=True)(x))

    return jax.value_and_grad(loss), nnx.to_pure_dict(params), params


def nnx_products(model: nnx.Module, x: Any) -> list[tuple[str, str, str]]:
    """Returns the products of the forward pass."""
    graphdef, state = nnx.split(model)
    return products(lambda state: nnx.merge(graphdef, state)(x), state)


@nnx.jit
def call(model, *args):
    """Calls a model; what the call changes is changed outside as well."""
    return model(*args)


def initial(model):
    """Returns the variables that a Linen model makes."""
    return result_of(model.init, jax.random.key(0), TOKENS)


def linen_value_and_grad(model, variables, **kwargs):
    def loss(variables):
        return cross_entropy(model.apply(variables, TOKENS, **kwargs))

    return jax.value_and_grad(loss), variables


def plain_arrays(tree):
    return nnx.to_pure_dict(tree) if isinstance(tree, nnx.State) else tree


def test_float32_leaves_an_nnx_transformer_bit_identical():
    model = NnxTransformer(rngs=nnx.Rngs(0))
    under = apply_policy(model, "float32")

    fn, _, params = nnx_value_and_grad(model, TOKENS)
    fn_under, _, params_under = nnx_value_and_grad(under, TOKENS)

    plain, policed = result_of(fn, params), result_of(fn_under, params_under)
    assert_same_bits(plain_arrays(policed[1]), plain_arrays(plain[1]))
    assert_same_bits(policed[0], plain[0])
    assert_same_bits(call(under, TOKENS), call(NnxTransformer(rngs=nnx.Rngs(0)), TOKENS))


@pytest.mark.parametrize("train", [False, True])
def test_float32_leaves_a_linen_transformer_bit_identical(train):
    model = LinenTransformer()
    under = apply_policy(model, "float32")
    kwargs = {"train": train, "rngs": {"dropout": jax.random.key(1)}}
    variables = initial(model)

    fn, _ = linen_value_and_grad(model, variables, **kwargs)
    fn_under, _ = linen_value_and_grad(under, variables, **kwargs)

    assert_same_bits(result_of(fn_under, variables), result_of(fn, variables))
    assert_same_bits(initial(under), variables)


def test_bfloat16_mixed_reaches_every_product_of_an_nnx_transformer():
    fn, _, params = nnx_value_and_grad(apply_policy(NnxTransformer(rngs=nnx.Rngs(0)), "bfloat16_mixed"), TOKENS)

    found = products(fn, params)
    _, grads = result_of(fn, params)

    assert set(found) == {LOW}
    # Forward: 8 products in each of 2 blocks and the tied head, each with two gradients; remat repeats the blocks.
    assert len(found) >= 3 * (2 * 8 + 1)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


def test_bfloat16_mixed_reaches_every_product_of_a_linen_transformer():
    model = apply_policy(LinenTransformer(), "bfloat16_mixed")
    fn, variables = linen_value_and_grad(model, initial(model))

    found = products(fn, variables)
    _, grads = result_of(fn, variables)

    assert set(found) == {LOW}
    assert len(found) >= 3 * (2 * 8 + 1)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_bfloat16_gradients_are_close_to_float32_ones(kind):
    def grads(policy):
        if kind == "nnx":
            fn, _, params = nnx_value_and_grad(apply_policy(NnxTransformer(rngs=nnx.Rngs(0)), policy), TOKENS)
        else:
            model = apply_policy(LinenTransformer(), policy)
            fn, params = linen_value_and_grad(model, initial(model))
        return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(result_of(fn, params)[1])])

    exact, low = grads("float32"), grads("bfloat16_mixed")

    # Products of operands rounded by at most 2^-9 each, a dozen layers deep: well under 2 per cent.
    assert 0 < np.linalg.norm(low - exact) < 0.02 * np.linalg.norm(exact)


@pytest.mark.parametrize("policy", ["float32", "bfloat16_mixed", "bfloat16_pure"])
def test_an_nnx_model_keeps_its_variables_paths_and_class(policy):
    model = ConvNet(rngs=nnx.Rngs(0))

    under = apply_policy(model, policy)

    assert isinstance(under, ConvNet)
    assert isinstance(under.conv, nnx.Conv)
    before, after = (dict(nnx.to_flat_state(nnx.state(m))) for m in (model, under))
    assert list(before) == list(after)
    assert [type(v) for v in before.values()] == [type(v) for v in after.values()]
    stored = {str(v.get_value().dtype) for v in after.values() if isinstance(v, nnx.Param)}
    assert stored == {"bfloat16" if policy == "bfloat16_pure" else "float32"}
    assert {str(v.get_value().dtype) for v in after.values() if isinstance(v, nnx.BatchStat)} == {"float32"}
    assert under(jnp.ones((1, 4, 4, 3))).dtype == ("bfloat16" if policy == "bfloat16_pure" else "float32")


def test_the_original_model_is_not_touched():
    model = ConvNet(rngs=nnx.Rngs(0))
    mean = model.norm.mean.get_value()

    apply_policy(model, "float16_pure")(jnp.ones((1, 4, 4, 3)))

    assert type(model) is ConvNet
    assert type(model.conv) is nnx.Conv
    assert model.conv.kernel.get_value().dtype == jnp.float32
    assert model.norm.mean.get_value() is mean


def test_batch_statistics_and_random_streams_move_as_without_a_policy():
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 4, 4, 3), dtype=np.float32))
    model, twin = ConvNet(rngs=nnx.Rngs(0)), apply_policy(ConvNet(rngs=nnx.Rngs(0)), "float32")
    decoder, decoder_twin = NnxTransformer(rngs=nnx.Rngs(0)), apply_policy(NnxTransformer(rngs=nnx.Rngs(0)), "float32")

    assert_same_bits(twin(x), model(x))
    assert_same_bits(twin.norm.mean.get_value(), model.norm.mean.get_value())
    assert not np.array_equal(np.asarray(model.norm.mean.get_value()), np.zeros(4))
    for _ in range(2):
        assert_same_bits(call(decoder_twin, TOKENS), call(decoder, TOKENS))
    assert int(decoder_twin.blocks[0].dropout.rngs.count.get_value()) == 2


def test_a_train_step_with_nnx_optimizer_compiles_once_and_learns():
    model = apply_policy(NnxTransformer(rngs=nnx.Rngs(0)), "bfloat16_mixed")
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    traces = []

    @nnx.jit
    def step(model, optimizer):
        traces.append(1)
        loss, grads = nnx.value_and_grad(lambda m: cross_entropy(m(TOKENS)))(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(model, optimizer)) for _ in range(5)]

    assert losses[-1] < losses[0]
    assert len(traces) == 1
    again = apply_policy(NnxTransformer(rngs=nnx.Rngs(0)), "bfloat16_mixed")
    assert type(again) is type(model)


def test_split_and_merge_keep_the_policy():
    model = apply_policy(NnxTransformer(rngs=nnx.Rngs(0)), "bfloat16_mixed")

    again = nnx.merge(*nnx.split(model))

    assert str(again.precision_policy) == "params=float32,compute=bfloat16,output=float32"
    assert set(nnx_products(again, TOKENS)) == {LOW}


def test_a_second_policy_replaces_the_first():
    once = apply_policy(NnxTransformer(rngs=nnx.Rngs(0)), "float16_mixed")

    twice = apply_policy(once, "bfloat16_mixed")

    assert set(nnx_products(twice, TOKENS)) == {LOW}
    assert type(twice).__mro__[1] is NnxTransformer
    linen_twice = apply_policy(apply_policy(LinenTransformer(), "float16_mixed"), "bfloat16_mixed")
    variables = jax.eval_shape(linen_twice.init, jax.random.key(0), TOKENS)
    assert set(products(lambda v: linen_twice.apply(v, TOKENS), variables)) == {LOW}


def test_intermediates_sown_under_a_policy_arrive():
    class Sowing(nnx.Module):
        def __init__(self, rngs):
            self.layer = nnx.Linear(2, 2, rngs=rngs)

        def __call__(self, x):
            y = self.layer(x)
            self.sow(nnx.Intermediate, "hidden", y)
            return y

    model = apply_policy(Sowing(nnx.Rngs(0)), "float32")

    with pytest.warns(DeprecationWarning, match="sow"):
        out = model(jnp.ones((1, 2)))

    assert_same_bits(nnx.pop(model, nnx.Intermediate)["hidden"].get_value()[0], out)


def test_modules_passed_as_arguments_are_updated():
    class Noisy(nnx.Module):
        def __init__(self, rngs):
            self.layer = nnx.Linear(2, 2, rngs=rngs)

        def __call__(self, x, *, rngs):
            return self.layer(x) + rngs.noise.normal(x.shape)

    rngs, twin = nnx.Rngs(noise=0), nnx.Rngs(noise=0)
    model = Noisy(nnx.Rngs(0))
    under = apply_policy(model, "float32")

    outs = [under(jnp.ones((1, 2)), rngs=rngs) for _ in range(2)]

    assert_same_bits(outs, [model(jnp.ones((1, 2)), rngs=twin) for _ in range(2)])
    assert int(rngs.noise.count.get_value()) == 2


def test_sites_of_an_nnx_model_go_by_module_paths_also_without_parameters():
    table = sites(NnxTransformer(rngs=nnx.Rngs(0)), TOKENS, policy="bfloat16_mixed")

    names = [site.name for site in table]
    block = ["query/kernel", "key/kernel", "value/kernel"]
    first = [f"blocks/0/attention/{name}" for name in block]
    first += ["blocks/0/attention:dot_general#0", "blocks/0/attention:dot_general#1", "blocks/0/attention/out/kernel"]
    first += ["blocks/0/up/kernel", "blocks/0/down/kernel"]
    second = [name.replace("blocks/0", "blocks/1") for name in first]
    assert names == ["embed/embedding:gather#0", *first, *second, "embed/embedding"]
    assert table[1].flops == 2 * TOKENS.size * 8 * 8
    assert "blocks/0/attention:dot_general#1" in str(table)
    assert {row["compute"] for row in table.to_dicts()} == {"bfloat16"}


def test_sites_need_shapes_only():
    model = NnxTransformer(rngs=nnx.Rngs(0))
    tokens = jax.ShapeDtypeStruct(TOKENS.shape, TOKENS.dtype)

    assert sites(model, tokens, policy="bfloat16_mixed") == sites(model, TOKENS, policy="bfloat16_mixed")
    assert sites(lambda p, x: x @ p, jnp.ones((2, 2), int), jnp.ones((2, 2), int))[0].reason == "int32 operand"


def test_sites_of_a_linen_model_go_by_module_paths():
    model = LinenTransformer()
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), TOKENS))

    names = [site.name for site in sites(model, variables, TOKENS)]

    assert "CheckpointLinenBlock_0/MultiHeadDotProductAttention_0/query/kernel" in names
    assert "CheckpointLinenBlock_1/MultiHeadDotProductAttention_0:dot_general#1" in names
    assert names[-1] == "head/kernel"


def test_rules_reach_their_sites_in_both_kinds_of_model():
    nnx_model = apply_policy(NnxTransformer(rngs=nnx.Rngs(0)), "c=bf16,o=f32;blocks/*/attention:*:compute=float32")
    linen_model = apply_policy(LinenTransformer(), "c=bf16,o=f32;**/head/**:compute=float32")
    variables = jax.eval_shape(linen_model.init, jax.random.key(0), TOKENS)

    assert [lhs for lhs, _, _ in nnx_products(nnx_model, TOKENS)].count("float32") == 4
    assert [lhs for lhs, _, _ in products(lambda v: linen_model.apply(v, TOKENS), variables)].count("float32") == 1


def test_a_rule_that_matches_nothing_is_an_error_on_the_first_call():
    model = apply_policy(NnxTransformer(rngs=nnx.Rngs(0)), "c=bf16,o=f32;blocks/*/atention/**:compute=float32")

    with pytest.raises(
        ValueError, match=r"matched no site: 'blocks/\*/atention/\*\*'. Nearest site: 'blocks/./attention"
    ):
        model(TOKENS)


def test_a_rule_that_matches_no_module_type_is_told_the_nearest_one():
    model = apply_policy(NnxTransformer(rngs=nnx.Rngs(0)), "bfloat16_mixed;@NnxAtention:compute=float32")

    with pytest.raises(ValueError, match=r"'@NnxAtention'\. Nearest module type around a site: '@NnxAttention'"):
        model(TOKENS)


def test_linen_params_are_stored_in_the_policys_dtype_and_other_collections_are_not_cast():
    class Normed(linen.Module):
        @linen.compact
        def __call__(self, x, train=True):
            return linen.BatchNorm(use_running_average=not train)(linen.Dense(3)(x))

    model = apply_policy(Normed(), "float16_pure")
    variables = model.init(jax.random.key(0), jnp.ones((2, 4)))

    out, mutated = model.apply(variables, jnp.ones((2, 4)), mutable=["batch_stats"])

    assert {leaf.dtype for leaf in jax.tree.leaves(variables["params"])} == {jnp.dtype("float16")}
    assert {leaf.dtype for leaf in jax.tree.leaves((variables["batch_stats"], mutated))} == {jnp.dtype("float32")}
    assert out.dtype == jnp.float16


def test_linen_init_with_output_runs_with_collections_that_change():
    class Normed(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.BatchNorm(use_running_average=False)(linen.Dense(3)(x))

    x = jnp.arange(8.0).reshape(2, 4)
    out, variables = apply_policy(Normed(), "float32").init_with_output(jax.random.key(0), x)

    expected, expected_variables = Normed().init_with_output(jax.random.key(0), x)
    assert_same_bits(out, expected)
    assert_same_bits(variables["params"], expected_variables["params"])


def test_an_abstract_model_gets_abstract_parameters_in_the_policys_dtype():
    model = apply_policy(nnx.eval_shape(lambda: NnxTransformer(rngs=nnx.Rngs(0))), "bfloat16_pure")

    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))} == {jnp.dtype("bfloat16")}


def test_linen_works_with_train_state_and_init_with_output():
    model = apply_policy(LinenTransformer(), "bfloat16_mixed")

    @jax.jit
    def initialised(key):
        out, variables = model.init_with_output(key, TOKENS)
        return out, variables, model.apply(variables, TOKENS)

    out, variables, applied = initialised(jax.random.key(0))
    state = train_state.TrainState.create(apply_fn=model.apply, params=variables["params"], tx=optax.sgd(0.1))

    grads = jax.jit(jax.grad(lambda p: cross_entropy(state.apply_fn({"params": p}, TOKENS))))(state.params)
    state = state.apply_gradients(grads=grads)

    assert_same_bits(out, applied)
    assert jax.tree.structure(state.params) == jax.tree.structure(variables["params"])


def test_a_linen_policy_where_it_could_not_act_is_refused():
    class Outer(linen.Module):
        inner: linen.Module

        @linen.compact
        def __call__(self, tokens):
            return self.inner(tokens)

    under = apply_policy(LinenTransformer(), "bfloat16_mixed")

    with pytest.raises(ValueError, match="LinenTransformer under a policy cannot be a part of Outer"):
        Outer(under).init(jax.random.key(0), TOKENS)
    with pytest.raises(ValueError, match="has no bind"):
        under.bind({"params": {}})
    with pytest.raises(ValueError, match="is bound to a parent or a scope"):
        apply_policy(LinenTransformer().bind({"params": {}}), "bfloat16_mixed")


@pytest.mark.parametrize(("target", "message"), [(NnxTransformer, "the class NnxTransformer"), (3, "got int")])
def test_what_is_neither_model_nor_function_is_refused(target, message):
    with pytest.raises(TypeError, match=message):
        apply_policy(target, "float32")


def test_a_function_has_sites_only_where_it_is_called():
    with pytest.raises(TypeError, match="give its params first"):
        sites(jnp.dot, policy="bfloat16_mixed")


def test_a_container_without_a_call_is_refused():
    with pytest.raises(TypeError, match="List has no __call__"):
        apply_policy(nnx.List([nnx.Linear(2, 2, rngs=nnx.Rngs(0))]), "bfloat16_mixed")

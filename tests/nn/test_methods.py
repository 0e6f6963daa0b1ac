"""What else is done with models under a policy: other methods, plain attributes, copies, pickles, threaded dtypes."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

from precision_lab.nn import apply_policy, sites
from precision_lab.policy import Policy
from tests.jaxprs import assert_same_bits, products
from tests.zoo import linen_models, nnx_models
from tests.zoo.zoo import FEATURES

LOW = ("bfloat16", "bfloat16", "float32")
X = jnp.asarray(FEATURES)


class Counting(nnx.Module):
    """Keeps what it saw in plain attributes."""

    def __init__(self, rngs):
        self.layer = nnx.Linear(6, 3, rngs=rngs)
        self.calls, self.seen = 0, jnp.zeros((3,))

    def __call__(self, x):
        self.calls += 1
        y = self.layer(x)
        self.seen = y[0]
        return y

    def first_layer(self):
        return self.layer


def nnx_products(model, method, *args):
    """Returns the products of a method of a model, called on a copy inside the trace."""
    return products(lambda *args: getattr(nnx.clone(model), method)(*args), *args)


def test_every_public_method_of_an_nnx_model_follows_the_policy():
    model = nnx_models.VAE(nnx.Rngs(0, noise=1))
    under = apply_policy(model, "bfloat16_mixed")

    assert nnx_products(under, "encode", X) == [LOW] * 3
    assert nnx_products(under, "generate", jnp.ones((2, 4))) == [LOW] * 2
    # A method that calls others is one call: no product is cast twice.
    assert nnx_products(under, "__call__", X) == [LOW] * 5
    assert_same_bits(apply_policy(model, "float32").encode(X), model.encode(X))


def test_rules_of_another_part_are_no_error_in_a_method():
    under = apply_policy(nnx_models.VAE(nnx.Rngs(0, noise=1)), "c=bf16,o=f32;decoder/**:compute=float32")

    assert nnx_products(under, "encode", X) == [LOW] * 3
    assert nnx_products(under, "generate", jnp.ones((2, 4))) == [("float32",) * 3] * 2


def test_plain_attributes_that_a_call_changes_are_kept_and_parts_stay_parts():
    model, under = Counting(nnx.Rngs(0)), apply_policy(Counting(nnx.Rngs(0)), "float32")

    for one in (model, under):
        one(X)
        one(X)

    assert under.calls == model.calls == 2
    assert_same_bits(under.seen, model.seen)
    assert under.first_layer() is under.layer


def test_a_cache_made_by_a_method_is_the_models():
    under, model = (apply_policy(nnx_models.Translator(nnx.Rngs(0)), p) for p in ("bfloat16_mixed", "float32"))
    for one in (under, model):
        one.init_cache(1, 4)
    source = np.asarray([[1, 2, 3]])
    encoded = [nnx.jit(lambda one: one.encode(source))(one) for one in (under, model)]

    steps = [
        [one.decode(e, source, np.asarray([[token]]), decode=True) for token in (1, 2)]
        for one, e in zip((under, model), encoded, strict=True)
    ]

    assert int(under.decoder[0].attention.cache_index[...]) == 2
    np.testing.assert_allclose(steps[0], steps[1], rtol=0.05, atol=0.05)
    # A cached step sees what the whole sequence at once sees.
    whole = nnx.jit(lambda one: one(source, np.asarray([[1, 2]])))(nnx_models.Translator(nnx.Rngs(0)))
    np.testing.assert_allclose(np.concatenate(steps[1], axis=1), whole, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), nnx.clone])
def test_copies_and_pickles_of_an_nnx_model_keep_its_policy(copied):
    under = apply_policy(nnx_models.MLP(nnx.Rngs(0)), "c=bf16,o=f32;layers/1/**:compute=float32")

    again = copied(under)

    assert type(again) is type(under)
    assert_same_bits(again(X), under(X))
    assert again.precision_policy == under.precision_policy
    assert [site.module for site in sites(again, X)] == ["MLP/Linear"] * 3
    assert again.layers[0].kernel[...] is not under.layers[0].kernel or copied is nnx.clone


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), lambda m: m.clone()])
def test_copies_and_pickles_of_a_linen_model_keep_its_policy(copied):
    under = apply_policy(linen_models.MLP(), "bfloat16_mixed")

    again = copied(under)

    assert type(again) is type(under)
    variables = jax.eval_shape(again.init, jax.random.key(0), X)
    ones = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), variables)
    assert products(lambda v: again.apply(v, X), ones) == [LOW] * 3


def test_linen_lazy_init_and_tabulate_work_and_what_would_lose_the_policy_is_refused():
    model = linen_models.MLP()
    under = apply_policy(model, "params=bfloat16,output=float32")

    variables = under.lazy_init(jax.random.key(0), jax.ShapeDtypeStruct(X.shape, X.dtype))

    assert {str(leaf.dtype) for leaf in jax.tree.leaves(variables)} == {"bfloat16"}
    assert under.tabulate(jax.random.key(0), X) == model.tabulate(jax.random.key(0), X)
    with pytest.raises(ValueError, match=r"MLP under a policy cannot be bound to a scope.*method=fn"):
        linen.apply(lambda module, x: module(x), under)(variables, X)
    with pytest.raises(ValueError, match=r"has no bind.*method=fn"):
        under.bind(variables)
    out = under.apply(variables, X, method=lambda module, x: 2 * module(x))
    assert_same_bits(out, 2 * under.apply(variables, X))


def test_sites_name_the_types_of_the_modules_around_them():
    model = linen_models.GPT()
    variables = jax.eval_shape(
        model.init, {"params": jax.random.key(0), "dropout": jax.random.key(0)}, jnp.ones((1, 4), int)
    )
    rngs = {"dropout": jax.random.key(0)}

    linen_types = {s.module for s in sites(model, variables, jnp.ones((1, 4), int), rngs=rngs)}
    nnx_types = {s.module for s in sites(nnx_models.ViT(nnx.Rngs(0)), jnp.ones((1, 8, 8, 2)))}

    attention = "GPT/GPTBlock/MultiHeadDotProductAttention"
    assert linen_types == {attention, f"{attention}/DenseGeneral", "GPT/GPTBlock/Dense", "GPT/Embed"}
    block = "ViT/EncoderBlock"
    inside = {f"{block}/MultiHeadAttention", f"{block}/MultiHeadAttention/LinearGeneral", f"{block}/Linear"}
    assert nnx_types == {"ViT/Conv", "ViT/Linear", *inside}


def test_a_policy_gives_constructors_their_dtypes_by_site():
    policy = Policy.parse("params=float16,compute=bfloat16,output=float32;head/kernel:compute=float32")

    assert policy.kwargs("body/kernel") == {"dtype": jnp.dtype("bfloat16"), "param_dtype": jnp.dtype("float16")}
    assert policy.kwargs() == policy.kwargs("body/kernel")
    layer = nnx.Linear(6, 3, **policy.kwargs("head/kernel"), rngs=nnx.Rngs(0))
    assert (layer(X).dtype, layer.kernel.dtype) == (jnp.float32, jnp.float16)
    dense = linen.Dense(3, **policy.kwargs("body/kernel"))
    assert jax.eval_shape(lambda: dense.init_with_output(jax.random.key(0), X))[0].dtype == jnp.bfloat16
    with pytest.raises(ValueError, match="compute=tf32 cannot store"):
        Policy.parse("c=tf32,o=f32").kwargs("body/kernel")

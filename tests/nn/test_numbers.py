"""A policy apart: its structure under its numbers is the policy itself; policies that differ in numbers are alike."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from precision_lab.nn import apply_policy
from precision_lab.nn.numbers import apart
from precision_lab.policy import Policy

RNG = np.random.default_rng(0)
X = RNG.standard_normal((8, 16), np.float32)
TOKENS = RNG.integers(0, 20, 8)


class Model(nnx.Module):
    """An embedding, products of a weight and of activations alone, under three names."""

    def __init__(self, rngs):
        self.table = nnx.Embed(20, 16, rngs=rngs)
        self.up = nnx.Linear(16, 24, rngs=rngs)
        self.head = nnx.Linear(24, 4, rngs=rngs)

    def __call__(self, x, tokens):
        hidden = jax.nn.relu(self.up(x + self.table(tokens)))
        return self.head((hidden @ hidden.T) @ hidden)


def value_and_gradients(model):
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, rest):
        return jnp.mean(nnx.merge(graphdef, params, rest)(X, TOKENS) ** 2)

    return jax.jit(jax.value_and_grad(loss))(params, rest)


WHOLE = [
    "weight=int4@channel",
    "weight=int3@group8,affine,clip=0.9",
    "weight=e3m2@channel",
    "weight=float4_e2m1fn@channel,activation=float6_e3m2fn@token,execution=simulated",
    "weight=int2@channel,ewgs=0.01",
    "weight=int3@channel,activation=int7@token",
    "weight=int4@channel,activation=uint4@tensor,attention=int5@token",
    "weight=int8@channel,activation=int3@token,embedding=int4@channel;**/head/**:weight=int6@channel;**/up/**:activation=none",
    "compute=bfloat16,weight=int4@channel,mse",
    "weight=int12@channel,activation=int8@token",
    "compute=e5m3",
    "compute=tf32;**/head/**:compute=float32",
    "compute=float8_e4m3fn;**/head/**:compute=e6m9;**/up/**:embedding=none",
    "compute=float8_e5m2,accum=float16@step4,round=bfloat16",
    "compute=bfloat16,execution=simulated",
    "compute=float32;**/head/**:compute=e4m7",
]


@pytest.mark.parametrize("policy", WHOLE)
def test_the_structure_with_its_numbers_is_the_policy_bit_for_bit(policy):
    model, parts = Model(nnx.Rngs(0)), apart(Policy.parse(policy))
    assert parts.numbers
    assert not parts.reasons

    found = value_and_gradients(apply_policy(model, parts.policy, numbers=parts.numbers))

    expected = value_and_gradients(apply_policy(model, policy))
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize("policy", WHOLE)
def test_taking_apart_twice_changes_nothing(policy):
    once = apart(Policy.parse(policy))

    assert apart(once.policy).policy == once.policy
    assert apart(once.policy).numbers.keys() == once.numbers.keys()


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("weight=int2@channel", "weight=int8@channel,clip=0.9"),
        ("weight=e5m2@channel", "weight=float4_e2m1fn@channel"),
        ("weight=int2@channel,activation=int8@token", "weight=int8@channel,activation=int3@token"),
        ("weight=int4;**/head/**:weight=int8", "weight=int3;**/head/**:weight=int2"),
        ("weight=int4@channel,ewgs=0.1", "weight=int4@channel,ewgs=0.01"),
        ("compute=e5m3", "compute=tf32"),
        ("compute=float8_e4m3fn;**/head/**:compute=e6m9", "compute=e6m9;**/head/**:compute=float8_e5m2"),
    ],
)
def test_policies_that_differ_in_numbers_have_one_structure(a, b):
    a, b = (apart(Policy.parse(policy)) for policy in (a, b))

    assert a.policy == b.policy
    assert jax.tree.structure(a.numbers) == jax.tree.structure(b.numbers)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ("weight=int4@channel", "weight=int4@tensor"),
        ("weight=int4@channel", "weight=int4@channel,affine"),
        ("weight=int4@channel", "weight=int4@channel,mse"),
        ("weight=int4@channel", "weight=e4m3@channel"),
        ("weight=int4@channel", "activation=int4@channel"),
        ("weight=int9@channel,activation=int8@token", "weight=int8@channel,activation=int8@token"),
        ("weight=int4", "weight=int4;**/head/**:weight=none"),
        ("compute=e5m3", "compute=bfloat16"),
        ("compute=bfloat16", "compute=bfloat16,execution=simulated"),
        ("compute=e5m3", "compute=e5m3,accum=float16"),
        ("compute=e5m3", "compute=e5m3;**/head/**:compute=float32"),
    ],
)
def test_policies_that_differ_in_structure_have_two(a, b):
    a, b = (apart(Policy.parse(policy)) for policy in (a, b))

    assert a.policy != b.policy or jax.tree.structure(a.numbers) != jax.tree.structure(b.numbers)


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        ("weight=nf4", "no scaled scalar format"),
        ("weight=int4,kl", "'kl'"),
        ("int8_training", "quantize their operands again"),
        ("weight=int8@channel,backward=original", "quantize their operands again"),
        ("w8a8,execution=native", "execution=native"),
        ("weight=int4,lsq", "has a state"),
        ("weight=float8_e4m3fn@channel,activation=float8_e4m3fn@token", "multiplied in a type of their own"),
    ],
)
def test_what_stays_structure_says_why(policy, reason):
    parts = apart(Policy.parse(policy))

    assert parts.policy == Policy.parse(policy)
    assert not parts.numbers
    assert reason in parts.reasons["weight"]


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        ("compute=e5m3,weight=int4@channel", "products have other formats beside it"),
        ("compute=e5m3,wgrad=bfloat16", "products have other formats beside it"),
        ("compute=float8_e5m2,execution=native", "execution=native"),
        ("compute=e5m3,ops=autocast", "operations follow it too"),
        ("compute=e5m3;**:op=float32", "operations follow it too"),
        ("compute=e5m3;**/head/**:execution=simulated", "or a rule says execution="),
    ],
)
def test_a_compute_format_that_stays_structure_says_why(policy, reason):
    parts = apart(Policy.parse(policy))

    assert parts.policy.compute == Policy.parse(policy).compute
    assert "compute" not in parts.numbers
    assert reason in parts.reasons["compute"]


def test_codes_are_multiplied_as_integers_under_any_numbers():
    model, parts = Model(nnx.Rngs(0)), apart(Policy.parse("weight=int3@channel,activation=int8@token"))

    text = str(jax.make_jaxpr(apply_policy(model, parts.policy, numbers=parts.numbers))(X, TOKENS))

    assert "preferred_element_type=int32" in text


def test_numbers_of_a_rule_reach_its_sites_alone():
    model = Model(nnx.Rngs(0))
    policy = "weight=int8@channel;**/head/**:weight=int8@channel"
    numbers = {"**/head/**:weight": apart(Policy.parse("weight=int2@channel")).numbers["weight"]}

    found = apply_policy(model, policy, numbers=numbers)(X, TOKENS)

    expected = apply_policy(model, policy.replace("head/**:weight=int8", "head/**:weight=int2"))(X, TOKENS)
    np.testing.assert_array_equal(found, expected)
    assert np.any(found != apply_policy(model, policy)(X, TOKENS))


def test_a_model_under_numbers_has_the_parameters_of_the_model():
    model = Model(nnx.Rngs(0))
    parts = apart(Policy.parse("weight=int4@channel"))

    under = apply_policy(model, parts.policy, numbers=parts.numbers)

    assert nnx.to_flat_state(nnx.state(under, nnx.Param)).paths == nnx.to_flat_state(nnx.state(model, nnx.Param)).paths

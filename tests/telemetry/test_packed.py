"""Observing and comparing models whose parameters are stored quantized, against their values taken out by hand."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import precision_lab as pl
from precision_lab.quant import QTensor
from precision_lab.telemetry import observed

TOKENS = jax.random.randint(jax.random.key(0), (2, 5), 0, 16)
INT4 = "weight=int4@group4,embedding=int4@group4"


class NNXNet(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.table = nnx.Embed(16, 8, rngs=rngs)
        self.up = nnx.Linear(8, 16, rngs=rngs)
        self.down = nnx.Linear(16, 4, rngs=rngs)

    def __call__(self, tokens):
        return self.down(nnx.relu(self.up(self.table(tokens))))


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, tokens):
        x = linen.Embed(16, 8, name="table")(tokens)
        return linen.Dense(4, name="down")(linen.relu(linen.Dense(16, name="up")(x)))


def function(params, tokens):
    x = params["table"]["embedding"][tokens]
    return jax.nn.relu(x @ params["up"]["kernel"]) @ params["down"]["kernel"]


def float_and_packed(kind, policy):
    """Returns (target, leading arguments) twice, and what `compare` takes for the second."""
    if kind == "nnx":
        packed = pl.convert(NNXNet(), policy, TOKENS)
        return (NNXNet(), []), (packed, []), packed
    variables = LinenNet().init(jax.random.key(0), TOKENS)
    target, params = (LinenNet(), variables) if kind == "linen" else (function, variables["params"])
    packed = pl.convert(target, policy, TOKENS, params=params)
    return (target, [params]), (packed[0], [packed[1]]), packed


def dequantized(tree):
    """Returns a tree of parameters with the values of its QTensors in their place."""
    if isinstance(tree, nnx.Module):
        graphdef, state = nnx.split(tree)
        return nnx.merge(graphdef, dequantized(state))
    is_packed = lambda leaf: isinstance(leaf, QTensor)  # noqa: E731
    return jax.tree.map(lambda leaf: leaf.dequantize() if is_packed(leaf) else leaf, tree, is_leaf=is_packed)


@pytest.mark.parametrize(("kind", "policy"), [("nnx", "w8a8"), ("linen", INT4), ("function", "w8a8")])
def test_what_is_observed_in_a_packed_model_is_what_it_computes_with(kind, policy):
    """As it is, under its own policy: operands before their cast, stored ones as their values."""
    _, (packed, given), _ = float_and_packed(kind, policy)

    seen = pl.observe(packed, *given, TOKENS, roles=["rhs", "output"], rounding=False)

    out = packed(*given, TOKENS) if kind != "linen" else packed.apply(*given, TOKENS)
    up, down = [site for site in seen.sites if "up" in site or "down" in site]
    params = packed if kind == "nnx" else given[0].get("params", given[0])
    stored = params.up.kernel.get_raw_value() if kind == "nnx" else params["up"]["kernel"]
    assert isinstance(stored, QTensor)
    values = np.asarray(stored.dequantize(), np.float64)
    assert seen[up, "rhs"].amax == np.abs(values).max()
    assert seen[up, "rhs"].rms == pytest.approx(np.sqrt((values**2).mean()), rel=1e-5)
    if kind == "function":
        assert seen[down, "output"].amax == pytest.approx(np.abs(out).max(), rel=1e-5)
    assert seen[down, "output"].rms == pytest.approx(np.sqrt((np.asarray(out) ** 2).mean()), rel=1e-4)


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_under_another_policy_a_packed_model_is_one_of_its_values(kind):
    _, (packed, given), _ = float_and_packed(kind, INT4)
    plain = pl.apply_policy(dequantized(packed) if kind == "nnx" else packed, "float32")
    values = [dequantized(tree) for tree in given]

    options = {"policy": "compute=float8_e4m3fn", "roles": ["lhs", "rhs", "output"], "rounding": False}
    seen = pl.observe(packed, *given, TOKENS, **options)
    expected = pl.observe(plain, *values, TOKENS, **options)

    assert len(seen) == 6
    assert seen.marks == expected.marks
    for (_, reading), (_, other) in zip(seen, expected, strict=True):  # sums may be in another order
        got, want = reading.to_dict(), other.to_dict()
        assert [got.pop("sqnr_db"), want.pop("sqnr_db")] == pytest.approx([math.nan] * 2, nan_ok=True)
        assert got == pytest.approx(want, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("kind", "policy"), [("nnx", INT4), ("linen", "w8a8"), ("function", INT4)])
def test_a_packed_model_is_as_far_from_its_original_as_its_policy_promised(kind, policy):
    (target, given), _, packed = float_and_packed(kind, policy)

    found = pl.compare(target, ["float32", packed, policy], *given, TOKENS)

    for site in found.sites:
        promised, stored = found.at(site, policy), found.at(site, "model 1")
        assert stored.cumulative.sqnr_db == pytest.approx(promised.cumulative.sqnr_db, abs=0.01)
        assert 10 < stored.cumulative.sqnr_db < 60
        assert stored.local is None
        assert (promised.local is None) == site.startswith("output")


def test_static_ranges_are_part_of_a_model_as_it_is():
    """Of a tenth of the range, they clip activations; only the model as it is shows that."""
    model = NNXNet()
    small = NNXNet()
    small.table.embedding[...] = small.table.embedding[...] / 10
    ranges = pl.calibrate(small, "w8a8", [TOKENS])
    clipped = pl.convert(dataclasses.replace(ranges, target=model))

    found = pl.compare(model, ["float32", "w8a8", clipped], TOKENS)

    expected = np.asarray(clipped(TOKENS))
    error = np.asarray(model(TOKENS)) - expected
    assert found.at("output", "model 2").cumulative.max_abs == pytest.approx(np.abs(error).max(), rel=1e-3)
    assert found.at("output", "model 2").cumulative.sqnr_db < 10 < found.at("output", "w8a8").cumulative.sqnr_db


def test_the_reference_can_be_packed_too():
    _, (packed, _), _ = float_and_packed("nnx", "w8a8")

    found = pl.compare(packed, [packed, "w8a8", packed], TOKENS)

    assert found.at("output", "model 2").cumulative.max_abs == 0
    assert found.at("up/kernel", "w8a8").cumulative.max_abs < 1e-6


def test_gradients_of_a_packed_model_are_those_of_what_it_holds_beside_its_codes():
    _, (packed, _), _ = float_and_packed("nnx", "w8a8")

    seen = pl.observe(packed, TOKENS, loss=lambda out: (out**2).sum() / 2, rounding=False)

    largest = float(np.abs(packed(TOKENS)).max())  # what flows back, which is rounded to bfloat16 as an operand
    assert seen["down/kernel", "output_cotangent"].amax == pytest.approx(largest, rel=2**-8)
    with pytest.raises(KeyError):
        seen["down/kernel", "rhs_cotangent"]


def test_params_that_are_stored_quantized_are_arguments_of_an_observed_function_like_any_other():
    _, (packed, [variables]), _ = float_and_packed("linen", "w8a8")

    out, seen = jax.jit(observed(packed.apply, limit=None))(variables, TOKENS)

    np.testing.assert_allclose(out, packed.apply(variables, TOKENS), rtol=1e-6, atol=1e-6)
    product = out - variables["params"]["down"]["bias"]
    assert seen["down/kernel", "output"].amax == pytest.approx(float(np.abs(product).max()), rel=1e-5)


@pytest.mark.parametrize("kind", ["nnx", "linen"])
def test_the_sites_of_a_packed_model_are_those_of_its_policy(kind):
    (target, given), (packed, stored), _ = float_and_packed(kind, "w8a8")

    assert pl.sites(packed, *stored, TOKENS).to_dicts() == pl.sites(target, *given, TOKENS, policy="w8a8").to_dicts()


def test_what_cannot_be_compared_is_refused():
    (target, given), (packed, stored), both = float_and_packed("function", "w8a8")

    with pytest.raises(ValueError, match="is seen as it is, without a policy; for policy 'float32' give the function"):
        pl.observe(packed, *stored, TOKENS, policy="float32")
    with pytest.raises(ValueError, match="'up/kernel' is no site of 'model 1': give a model of the same code"):
        pl.compare(target, ["float32", (lambda params, tokens: params[tokens], jnp.ones((16, 4)))], *given, TOKENS)
    assert len(pl.compare(target, ["float32", both], *given, TOKENS)) == 3


def test_layers_that_are_scanned_over_are_observed_as_they_are_stored():
    weights = np.asarray(
        jax.random.normal(jax.random.key(0), (3, 8, 8)) * np.array([1, 2, 4])[:, None, None], np.float32
    )

    def deep(params, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, params["w"])[0]

    run, stored = pl.convert(deep, "weight=int8@channel", jnp.ones((2, 8)), params={"w": jnp.asarray(weights)})
    seen = pl.observe(run, stored, jnp.ones((2, 8)), roles=["rhs"], rounding=False, per_layer=True)

    # The largest of a channel is a code of its own, so it comes back but for the rounding of its scale.
    expected = [np.abs(one).max() for one in weights]
    assert [layer.amax for layer in seen["w", "rhs"].layers] == pytest.approx(expected, rel=2**-22)


def test_ranges_can_be_trained_around_weights_that_are_stored_quantized():
    """As for adapters on a packed base; the start and a step had JAX's own error."""
    packed = pl.convert(NNXNet(), "weight=int8@channel", TOKENS)

    model = pl.prepare_qat(packed, "weight=int8@channel,activation=int8,ema", TOKENS)
    first = model(TOKENS)

    np.testing.assert_allclose(first, pl.apply_policy(packed, "activation=int8")(TOKENS), atol=1e-6)

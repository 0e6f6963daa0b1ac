"""Scores against one model at a time under a policy with rules, and against products quantized by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import precision_lab as pl
from precision_lab.ptq.scores import Score, Sensitivity

W4 = "weight=int4@tensor"
RNG = np.random.default_rng(0)
PARAMS = {"a": RNG.normal(size=(8, 16)).astype(np.float32), "b": RNG.normal(size=(16, 4)).astype(np.float32)}
BATCHES = [RNG.normal(size=(32, 8)).astype(np.float32) for _ in range(2)]


def two_layers(params, x):
    return jnp.tanh(x @ params["a"]) @ params["b"]


def by_hand(w):
    """Returns a weight on the symmetric four-bit grid of one scale, in float64."""
    scale = np.abs(w).max() / np.float32(7)
    return np.round(w / scale).astype(np.float64) * scale


def relative_error(out, expected):
    return sum(((o - e) ** 2).sum() for o, e in zip(out, expected, strict=True)) / sum((e**2).sum() for e in expected)


def test_one_on_and_one_off_are_those_of_products_quantized_by_hand():
    found = pl.sensitivity(two_layers, [W4], BATCHES, params=PARAMS)

    def outputs(a, b):
        return [np.tanh(x.astype(np.float64) @ a) @ b for x in BATCHES]

    a, b = PARAMS["a"], PARAMS["b"]
    exact, only_a, only_b = outputs(a, b), outputs(by_hand(a), b), outputs(a, by_hand(b))
    of_a, of_b = relative_error(only_a, exact), relative_error(only_b, exact)
    first, second = found.at("a", W4), found.at("b", W4)
    assert [first.one_on_error, first.one_off_error] == pytest.approx([of_a, of_b], rel=1e-4)
    assert [second.one_on_error, second.one_off_error] == pytest.approx([of_b, of_a], rel=1e-4)
    assert first.one_on_db == pytest.approx(-10 * math.log10(of_a), abs=1e-3)
    hidden = [x.astype(np.float64) @ a for x in BATCHES]
    assert first.local_error == pytest.approx(relative_error([x @ by_hand(a) for x in BATCHES], hidden), rel=1e-4)
    assert second.local_error == pytest.approx(of_b, rel=1e-4)  # the last product is the output
    both = relative_error(outputs(by_hand(a), by_hand(b)), exact)
    assert found.whole[1][0] == pytest.approx(both, rel=1e-4)
    assert found.whole[0][0] == 0


@pytest.mark.parametrize("outlier", ["a", "b"])
def test_the_layer_with_an_outlier_ranks_first(outlier):
    """Check 34 of notes/jax_quantization.md: the outlier spoils the scale of all other weights; no data reaches it."""
    params = {name: w.copy() for name, w in PARAMS.items()}
    params["a"][:, 0] = 0  # so nothing flows through the first hidden unit
    params[outlier][0, 0] = 40
    batches = [x * (np.arange(8) > 0) for x in BATCHES]

    found = pl.sensitivity(two_layers, [W4, "weight=int8@tensor"], batches, params=params)

    assert found.ranking()[0] == outlier
    assert found.ranking(W4)[0] == outlier


def test_losses_are_means_over_batches_of_inputs_and_labels():
    labels = [RNG.normal(size=(32, 4)).astype(np.float32) for _ in BATCHES]

    def squared(out, label):
        return ((out - label) ** 2).mean()

    pairs = list(zip(BATCHES, labels, strict=True))
    found = pl.sensitivity(two_layers, [W4], pairs, params=PARAMS, loss=squared)

    def mean_loss(a, b):
        return np.mean([((np.tanh(x.astype(np.float64) @ a) @ b - y) ** 2).mean() for x, y in pairs])

    a, b = PARAMS["a"], PARAMS["b"]
    assert found.whole[0][1] == pytest.approx(mean_loss(a, b), rel=1e-5)
    assert found.at("a", W4).one_on_loss == pytest.approx(mean_loss(by_hand(a), b), rel=1e-4)
    assert found.at("a", W4).one_off_loss == pytest.approx(mean_loss(a, by_hand(b)), rel=1e-4)
    assert "one-on loss" in str(found)


def test_a_model_is_traced_as_often_for_many_sites_as_for_one():
    def traces(depth, batches):
        calls = []

        def fn(params, x):
            calls.append(1)
            for w in params:
                x = jnp.tanh(x @ w)
            return x

        weights = [np.eye(8, dtype=np.float32) + 0.1 * i for i in range(depth)]
        assert len(pl.sensitivity(fn, [W4, "weight=int8@tensor"], batches, params=weights)) == 2 * depth
        return len(calls)

    assert traces(6, BATCHES) == traces(1, BATCHES[:1])


def test_nnx_and_linen_models_and_functions_score_alike():
    class Net(linen.Module):
        @linen.compact
        def __call__(self, x):
            return linen.Dense(4, use_bias=False, name="b")(jnp.tanh(linen.Dense(16, use_bias=False, name="a")(x)))

    class Model(nnx.Module):
        def __init__(self):
            self.a = nnx.Linear(8, 16, use_bias=False, rngs=nnx.Rngs(0))
            self.b = nnx.Linear(16, 4, use_bias=False, rngs=nnx.Rngs(0))
            self.a.kernel[...], self.b.kernel[...] = jnp.asarray(PARAMS["a"]), jnp.asarray(PARAMS["b"])

        def __call__(self, x):
            return self.b(jnp.tanh(self.a(x)))

    variables = {"params": {name: {"kernel": w} for name, w in PARAMS.items()}}
    expected = pl.sensitivity(two_layers, [W4], BATCHES, params=PARAMS)

    for found in (
        pl.sensitivity(Net(), [W4], BATCHES, params=variables),
        pl.sensitivity(Model(), [W4], [{"x": x} for x in BATCHES]),
    ):
        assert found.sites == ["a/kernel", "b/kernel"]
        assert [cost.nbytes for cost in found.costs] == [cost.nbytes for cost in expected.costs]
        for row, same in zip(found, expected, strict=True):
            assert row.one_on_error == pytest.approx(same.one_on_error, rel=1e-4)
            assert row.local_error == pytest.approx(same.local_error, rel=1e-4)


def test_keyword_batches_of_a_function_are_each_their_own():
    found = pl.sensitivity(two_layers, [W4], [{"x": x} for x in BATCHES], params=PARAMS)

    expected = pl.sensitivity(two_layers, [W4], BATCHES, params=PARAMS)
    assert found.rows == expected.rows


def test_what_overflows_is_infinitely_wrong_and_what_stays_is_exact():
    params = {"a": PARAMS["a"] * 1e6, "b": PARAMS["b"]}

    found = pl.sensitivity(two_layers, ["compute=float16;b:compute=float32"], BATCHES, params=params)

    assert found.sites == ["a"]
    assert found.at("a", "compute=float16;b:compute=float32").local_db == -math.inf
    found = pl.sensitivity(two_layers, ["weight=int8@tensor;b:weight=none", W4], BATCHES, params=PARAMS)
    assert found.at("b", "weight=int8@tensor;b:weight=none").one_on_db == math.inf


def test_lookups_have_local_errors_too_and_layers_of_a_scan_are_one_site():
    params = {"table": PARAMS["a"], "stack": np.stack([np.eye(16, dtype=np.float32) * 0.9 + 0.01] * 3)}

    def fn(params, tokens):
        x = jnp.take(params["table"], tokens, axis=0)
        return jax.lax.scan(lambda h, w: (h @ w, None), x, params["stack"])[0]

    tokens = np.arange(8)
    found = pl.sensitivity(fn, ["weight=int4@tensor,embedding=int4@tensor"], [tokens], params=params)

    assert found.sites == ["table:gather#0", "stack"]
    of_table = ((by_hand(params["table"]) - params["table"]) ** 2).sum() / (params["table"] ** 2).sum()
    assert found[0].local_error == pytest.approx(of_table, rel=1e-4)
    # Three layers quantized alike: each sees the exact input of its own layer.
    w, x, noise, signal = params["stack"][0].astype(np.float64), params["table"].astype(np.float64), 0.0, 0.0
    for _ in range(3):
        noise += ((x @ (by_hand(params["stack"][0]) - w)) ** 2).sum()
        x = x @ w
        signal += (x**2).sum()
    assert found[1].local_error == pytest.approx(noise / signal, rel=1e-3)


def test_the_heat_map_names_every_site_and_policy_and_writes_every_number():
    found = pl.sensitivity(two_layers, [W4, "weight=int8@tensor;b:weight=none"], BATCHES, params=PARAMS)

    axes = found.heat_map().axes[0]

    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    names = [label.get_text().replace("\n", "") for label in axes.get_xticklabels()]
    assert names == [W4, "weight=int8@tensor;b:weight=none"]
    cells = [text.get_text() for text in axes.texts]
    assert cells == [*(f"{row.one_on_db:.1f}" for row in found[:3]), "="]
    with pytest.raises(ValueError, match="show='one_on_loss' must be one of one_on_db, one_off_db, local_db"):
        found.heat_map("one_on_loss")
    assert found.to_dicts()[0]["one_on_db"] == found[0].one_on_db


def test_what_cannot_be_scored_is_refused():
    with pytest.raises(ValueError, match="needs a reference and other policies, each once, got float32"):
        pl.sensitivity(two_layers, [], BATCHES, params=PARAMS)
    with pytest.raises(ValueError, match="got no batches"):
        pl.sensitivity(two_layers, [W4], [], params=PARAMS)
    with pytest.raises(ValueError, match="differ at no site"):
        pl.sensitivity(two_layers, ["attention=int8@token"], BATCHES, params=PARAMS)
    with pytest.raises(TypeError, match="a pair \\(inputs, labels\\), got ndarray"):
        pl.sensitivity(two_layers, [W4], BATCHES, params=PARAMS, loss=lambda out, label: 0.0)
    with pytest.raises(TypeError, match="params= is missing"):
        pl.sensitivity(two_layers, [W4], BATCHES)
    found = pl.sensitivity(two_layers, [W4], BATCHES[:1], params=PARAMS)
    with pytest.raises(KeyError, match=r"no site 'c' under policy.*policies, as they were given, "):
        found.at("c", W4)


def test_each_error_has_its_own_decibels_and_a_ranking_adds_up_policies():
    rows = [
        Score("a", "p", 0.1, 0.01, 0.001),
        Score("a", "q", 0.2, 0.0, math.inf),
        Score("b", "p", 0.16, 1.0, 1.0),
        Score("b", "q", 0.16, 1.0, 1.0),
    ]
    table = Sensitivity(tuple(rows), ("float32", "p", "q"), (), ((0.0, None),), (), ())

    assert [round(rows[0].one_on_db, 6), round(rows[0].one_off_db, 6), round(rows[0].local_db, 6)] == [10, 20, 30]
    assert (rows[1].one_off_db, rows[1].local_db) == (math.inf, -math.inf)
    assert table.ranking() == ["b", "a"]  # 0.32 against 0.3, though the largest is 0.2 of a
    assert table.ranking("q") == ["a", "b"]
    assert table.ranking("p") == ["b", "a"]

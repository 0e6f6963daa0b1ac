"""Probes: what they measure, and that they run, are judged and are reported like trainings."""

from typing import ClassVar, Literal

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from precision_lab import runner
from precision_lab.runner.known import metric_names
from precision_lab.training import ProbeRun, train
from precision_lab.training.probes import (
    DotProductConfig,
    LeastSquaresConfig,
    ProbeConfig,
    least_squares,
    register_probe,
)
from precision_lab.training.probes.dot_product import measure, operands
from tests.training.runs import BASE, MemorySink


def in_bfloat16(left, right):
    """Dot products of rows by NumPy, every sum rounded to bfloat16."""
    total = np.zeros(len(left), ml_dtypes.bfloat16)
    for k in range(left.shape[1]):
        total = (total.astype(np.float32) + left[:, k] * right[:, k]).astype(ml_dtypes.bfloat16)
    return total.astype(np.float64)


def student(config, seed, dtype):
    """The weights after SGD in NumPy, every step computed in float64 and rounded to `dtype` once."""
    _, inputs, targets = (np.asarray(x, np.float64) for x in least_squares.data(config, seed))
    weights = np.zeros(config.dimension, dtype)
    for x, y in zip(inputs, targets, strict=True):
        wide = weights.astype(np.float64)
        weights = (wide - config.lr * x.T @ (x @ wide - y) / config.batch).astype(dtype)
    return weights.astype(np.float64)


@pytest.mark.parametrize(
    ("update", "dtype", "tol"), [("float32", np.float64, 1e-4), ("nearest", ml_dtypes.bfloat16, 1e-3)]
)
def test_least_squares_ends_where_a_numpy_loop_does(update, dtype, tol):
    config = LeastSquaresConfig(update=update, steps=300)
    teacher = np.asarray(least_squares.data(config, 2)[0], np.float64)

    measured = least_squares.measure(config, 2)

    expected = np.sum((student(config, 2, dtype) - teacher) ** 2)
    assert measured["error"] == pytest.approx(expected, rel=tol)


def test_float32_least_squares_has_the_error_that_theory_gives():
    """SGD on half the mean squared error settles at lr * noise**2 * d / (2 * batch), for small lr; two errors."""
    config = LeastSquaresConfig(update="float32", dimension=50, steps=3000, batch=16)

    errors = [least_squares.measure(config, seed)["error"] for seed in range(4)]

    assert np.mean(errors) == pytest.approx(0.01 * 0.25 * 50 / 32, rel=0.2)


def test_weights_in_16_bits_end_at_the_teacher_unless_rounded_to_nearest():
    """What is stored is off by half an ulp at most: for weights below 128 in bfloat16, 1/4 each."""
    errors = {
        update: least_squares.measure(LeastSquaresConfig(update=update), 0)
        for update in ("master", "kahan", "stochastic", "nearest")
    }

    assert errors["master"]["error"] < 10 * 0.25**2
    assert errors["kahan"]["error"] < 10 * 0.25**2
    assert errors["nearest"]["error"] > 50 * errors["stochastic"]["error"]
    assert all(0.5 < one["unchanged_fraction"] < 1 for one in errors.values())


@pytest.mark.parametrize("distribution", ["zero_mean", "positive"])
def test_errors_are_those_of_a_numpy_loop(distribution):
    config = DotProductConfig(length=300, count=16, distribution=distribution, accum="bfloat16")
    left, right = (np.asarray(x) for x in operands(config, 3))
    exact = np.sum(left.astype(np.float64) * right, axis=1)
    error = (in_bfloat16(left, right) - exact) / np.sqrt(np.mean(exact**2))

    measured = measure(config, 3)

    assert measured["error"] == pytest.approx(np.mean(np.abs(error)), rel=1e-12)
    assert measured["max_error"] == pytest.approx(np.max(np.abs(error)), rel=1e-12)
    assert measured["bias"] == pytest.approx(np.mean(error), rel=1e-9)


def test_an_accumulator_that_holds_every_sum_makes_no_error():
    """Sums of 64 products of E2M1 are multiples of 1/4 up to 2304."""
    for accum in ("float32", "e8m13", "e8m13@step32@toward_zero", "e8m13@stochastic"):
        config = DotProductConfig(length=64, inputs="float4_e2m1fn", accum=accum)
        assert set(measure(config, 0).values()) == {0.0}


def test_operands_lie_on_the_grid_and_depend_on_the_seed_alone():
    config = DotProductConfig(length=50, count=8, distribution="positive")

    left, right = operands(config, 1)

    assert (left >= 0).all()
    assert (right >= 0).all()
    np.testing.assert_array_equal(left, left.astype(jnp.float8_e4m3fn).astype(jnp.float32))
    assert not np.array_equal(left, right)
    assert not np.array_equal(left, operands(config, 2)[0])
    other = config.model_copy(update={"accum": "float16"})
    np.testing.assert_array_equal(left, operands(other, 1)[0])


def test_truncation_is_biased_towards_zero_and_nearest_swamps():
    errors = {
        accum: measure(DotProductConfig(length=2048, count=64, distribution="positive", accum=accum), 0)
        for accum in ("e8m13@toward_zero", "e8m13@stochastic", "bfloat16", "bfloat16@promote64")
    }

    assert errors["e8m13@toward_zero"]["bias"] == -errors["e8m13@toward_zero"]["error"]
    assert abs(errors["e8m13@stochastic"]["bias"]) < errors["e8m13@stochastic"]["error"]
    assert errors["bfloat16"]["error"] > 20 * errors["bfloat16@promote64"]["error"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"accum": "float64"}, "float64 is what errors are measured against"),
        ({"accum": "bfloat16@chunk64"}, "'@chunk64' is none of"),
        ({"inputs": "float32"}, "up to 11 mantissa bits"),
        ({"accum": 5}, "expected an accumulator such as"),
        ({"inputs": 5}, "expected a float format"),
        ({"inputs": "int8"}, "expected a float format"),
        ({"length": 0}, "greater than or equal to 1"),
        ({"distribution": "cauchy"}, "zero_mean"),
        ({"lenght": 4}, "Extra inputs"),
    ],
)
def test_what_cannot_be_measured_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        ProbeRun.model_validate({"probe": {"kind": "dot_product", **change}})


def test_a_probe_is_one_row_with_the_metrics_that_were_promised():
    run = ProbeRun.model_validate({"probe": {"kind": "dot_product", "length": 64, "count": 4, "accum": "bfloat16"}})
    sink, steps = MemorySink(), []

    result = train(run, checkpoint_dir=None, sink=sink, on_step=lambda step, loss: steps.append(step))

    assert (result.status, result.step, steps) == ("done", run.total_steps, [run.total_steps])
    assert set(result.metrics) == metric_names(run)
    (row,) = sink.rows
    assert {f"probe/{name}": row[name] for name in run.probe.measures} == result.metrics


class CountConfig(ProbeConfig):
    measures: ClassVar[tuple[str, ...]] = ("count",)
    kind: Literal["count_for_test"] = "count_for_test"
    start: int = 0


register_probe("count_for_test", CountConfig, lambda config, seed: {"count": float(config.start + seed)})


def experiment(**changes):
    """One arm measures, the other trains."""
    return {
        "name": "probed",
        **BASE,
        "arms": {"trained": {}, "counted": {"probe": {"kind": "count_for_test", "start": 5}}},
        "seeds": [0, 2],
        "claims": [{"kind": "above", "a": "counted", "metric": "probe/count", "value": 4}],
        **changes,
    }


def test_a_probe_is_run_once_judged_and_reported(tmp_path):
    only = experiment(arms={"a": {"probe": {"start": 5}}, "b": {}}, probe="count_for_test", claims=[], baseline="b")
    only = {key: value for key, value in only.items() if key not in BASE}
    said = []

    results = runner.run(only, out=tmp_path, say=said.append)
    again = runner.run(only, out=tmp_path, say=said.append)

    assert results.experiment.columns == ("probe/count",)
    assert [(one.arm, one.seed, one.value("probe/count")) for one in again.trials] == [
        ("a", 0, 5.0), ("a", 2, 7.0), ("b", 0, 0.0), ("b", 2, 2.0),
    ]  # fmt: skip
    assert said == ["4 of 4 runs are finished already and are reused."]
    assert again.trials[0].run_id.startswith("count_for_test-s0-")
    assert "probe.start=5" in (results.folder / "report.md").read_text()
    assert runner.rundir.RunDir(results.trials[0].path).config() == results.trials[0].config


def test_an_arm_may_be_a_probe_beside_arms_that_train():
    loaded = runner.load(experiment(metrics=["eval/loss", "probe/count"]))

    assert isinstance(loaded.runs["counted"][2], ProbeRun)
    assert loaded.runs["trained"][0].total_steps == BASE["train"]["steps"]
    assert loaded.known_metrics(["counted"]) == {"probe/count"}
    with pytest.raises(ValueError, match="no metric 'probe/counts'; did you mean 'probe/count'"):
        runner.load(experiment(metrics=["probe/counts"]))


def test_a_column_stays_empty_for_arms_that_do_not_log_it(tmp_path):
    arms = {"dot": {"probe": {"kind": "dot_product", "length": 8, "count": 2}}, "counted": {"probe": "count_for_test"}}
    config = {"name": "two", "arms": arms, "seeds": [3], "metrics": ["probe/count", "probe/error"]}

    results = runner.run(config, out=tmp_path)

    cells = [{name: cell.mean and cell.mean.mean for name, cell in row.cells.items()} for row in results.rows]
    assert cells == [{"probe/count": None, "probe/error": 0.0}, {"probe/count": 3.0, "probe/error": None}]
    assert "probe/count" in str(results)


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({"probe": {"kind": "count_for_test", "strat": 1}}, r"arms\.counted\.probe\.strat: unknown key.*start"),
        ({"probe": {"kind": "count"}}, r"counted\.probe\.kind: unknown probe kind 'count'.*dot_product"),
        ({"probe": {"kind": "count_for_test"}, "policy": "float32"}, r"policy: unknown key"),
    ],
)
def test_mistakes_in_a_probe_are_named_at_their_place(arm, message):
    with pytest.raises(ValueError, match=message):
        runner.load(experiment(arms={"trained": {}, "counted": arm}))

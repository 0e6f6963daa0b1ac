"""The loop: which rows come when, what a finished or interrupted run does when called again, divergence."""

from typing import Literal

import numpy as np
import pytest

from precision_lab import data, training
from precision_lab.data import DATASETS, DataConfig, Dataset, TextSplit
from precision_lab.models import DataSpec
from precision_lab.training import loop, train
from precision_lab.training.program import program_for
from precision_lab.training.rows import evaluates_at, logs_at
from tests.training.runs import HALF, MemorySink, config, run


class StoppedError(Exception):
    """Raised by a test to end a run in its middle."""


def stop_at(step):
    def on_step(done, loss):
        if done == step:
            raise StoppedError

    return on_step


def test_rows_come_where_the_config_says():
    result, sink = run(train={"steps": 23, "log_every": 5, "eval_every": 10})

    assert sink.restarts == [-1]
    assert sorted(sink.of("train")) == [5, 10, 15, 20, 23]
    assert sorted(sink.of("eval")) == sorted(sink.of("eval_train")) == [0, 10, 20, 23]
    assert len({(row["step"], row["split"]) for row in sink.rows}) == len(sink.rows)
    assert (result.status, result.step) == ("done", 23)


@pytest.mark.parametrize(
    "train",
    [
        {"steps": 7, "log_every": 3, "eval_every": 2},
        {"steps": 6, "log_every": 3, "eval_every": None, "eval_at": [0, 4]},
        {"steps": 0},
    ],
)
def test_which_steps_have_rows_is_known_before_the_run(train):
    result, sink = run(train={**train, "eval_examples": 10})
    steps = range(-1, result.step + 9)

    asked = config(train=train).train
    assert [*sink.of("train")] == [step for step in steps if logs_at(asked, step)]
    assert [*sink.of("eval")] == [step for step in steps if evaluates_at(asked, step)]


def test_the_result_holds_the_latest_value_of_every_metric():
    result, sink = run()

    expected = {
        f"{split}/{name}": value
        for split in ("train", "eval", "eval_train")
        for name, value in sink.of(split)[20].items()
        if name not in ("step", "split")
    }
    assert result.metrics == expected
    assert set(sink.of("train")[20]) == {
        *("step", "split", "loss", "grad_norm", "zero_grad_fraction", "unchanged_fraction"),
        *("loss_scale", "skipped_steps"),
    }
    assert set(sink.of("eval")[20]) == {"step", "split", "loss", "accuracy", "nonfinite_fraction"}


def test_training_learns_the_digits():
    result, _ = run(train={"steps": 300, "log_every": 100, "eval_every": None, "eval_examples": None})

    assert result.metrics["eval/accuracy"] > 0.9


def test_a_run_is_a_function_of_its_config():
    first, _ = run()
    again, _ = run()
    other, _ = run(seed=1)

    assert first == again
    assert other.metrics["eval/loss"] != first.metrics["eval/loss"]


def test_how_often_to_look_changes_no_number():
    often, _ = run(train={"steps": 20, "log_every": 1, "eval_every": 1, "eval_examples": 100})
    seldom, _ = run(train={"steps": 20, "log_every": 20, "eval_every": None, "eval_examples": 100})

    assert often.metrics == seldom.metrics


def test_a_float32_run_with_a_loss_shift_has_the_same_metrics():
    plain, _ = run()
    shifted, _ = run(train={"loss_shift": 20})

    assert shifted.metrics == plain.metrics


def test_on_step_sees_every_step_and_the_latest_loss():
    seen = []
    _, sink = run(on_step=lambda step, loss: seen.append((step, loss)))

    assert [step for step, _ in seen] == list(range(1, 21))
    assert np.isnan(seen[0][1])
    assert seen[6][1] == sink.of("train")[5]["loss"]
    assert seen[-1][1] == sink.of("train")[20]["loss"]


MASTER = {"master_weights": True}
LOW_BIT = {
    "model": {"kind": "mlp", "hidden": [64]},
    "optim": {"kind": "adam", "lr": 1e-3, "state": "dynamic8@group256"},
    "master_weights": True,
}


@pytest.mark.parametrize(
    ("stop", "how"),
    [
        *((stop, MASTER) for stop in (1, 7, 8, 14, 19)),
        (8, {"update": "stochastic"}),
        (8, {"update": "kahan"}),
        (8, LOW_BIT),
    ],
)
def test_an_interrupted_run_ends_like_one_that_was_not(tmp_path, stop, how):
    changes = {
        "policy": HALF,
        **how,
        "loss_scale": {"kind": "dynamic", "interval": 3},
        "train": {"checkpoint_every": 7},
    }
    whole, whole_sink = run(**changes)
    sink = MemorySink()
    with pytest.raises(StoppedError):
        run(folder=tmp_path, sink=sink, on_step=stop_at(stop), **changes)

    result, _ = run(folder=tmp_path, sink=sink, **changes)

    assert sink.restarts == [-1, stop // 7 * 7 or -1]
    assert result == whole
    assert sorted(map(str, sink.rows)) == sorted(map(str, whole_sink.rows))


def test_a_finished_run_returns_its_result_and_trains_nothing(tmp_path, monkeypatch):
    result, sink = run(folder=tmp_path)
    rows = list(sink.rows)
    monkeypatch.setattr(data, "batches", lambda *_: {})

    again, _ = run(folder=tmp_path, sink=sink)

    assert again == result
    assert sink.rows == rows
    assert sink.restarts == [-1, 20]


def test_a_diverged_run_stops_there_and_says_so_again(tmp_path):
    changes = {"optim": {"kind": "sgd", "lr": 1e30}, "train": {"steps": 50, "log_every": 5}}
    result, sink = run(folder=tmp_path, **changes)

    again, _ = run(folder=tmp_path, sink=sink, **changes)

    assert result.status == "diverged"
    assert 2 <= result.step <= 5
    assert max(row["step"] for row in sink.rows) == 5
    assert np.isnan(result.metrics["train/loss"])
    assert (again.status, again.step, again.metrics.keys()) == (result.status, result.step, result.metrics.keys())
    assert sink.restarts == [-1, 5]


def test_a_diverged_run_goes_on_if_told_so():
    train_on = {"steps": 12, "log_every": 5, "on_nonfinite": "continue"}
    result, sink = run(optim={"kind": "sgd", "lr": 1e30}, train=train_on)

    assert (result.status, result.step) == ("done", 12)
    assert np.isnan(sink.of("train")[10]["loss"])


def test_a_run_that_skips_every_step_has_not_diverged():
    scale = {"kind": "static", "scale": 2.0**100}
    result, _ = run(policy="float16_mixed", loss_scale=scale)

    assert result.status == "done"
    assert result.metrics["train/skipped_steps"] == 20
    assert result.metrics["train/unchanged_fraction"] == 1.0


def test_evaluation_is_the_mean_over_the_examples_however_they_are_cut():
    one = config()
    dataset = data.load(one.data)
    program = program_for(one, dataset.spec)
    state = program.init(0, loop.hyper(one))
    sizes = [(batch, limit) for limit in (None, 1, 100) for batch in (7, 100, 512)]

    values = {pair: loop.evaluate(program, state, dataset.eval, *pair) for pair in sizes}

    for batch, limit in sizes:
        np.testing.assert_allclose(values[batch, limit]["loss"], values[512, limit]["loss"], rtol=1e-6)
        assert values[batch, limit]["accuracy"] == values[512, limit]["accuracy"]
    assert values[512, 1]["accuracy"] in (0.0, 1.0)


def test_a_batch_larger_than_the_data_is_refused_by_check():
    with pytest.raises(ValueError, match=r"data\.batch is 100000, but digits has only 1437 training examples"):
        training.check(config(data={"batch": 100_000}))


def test_a_run_that_cannot_start_is_refused_by_check():
    training.check(config())
    with pytest.raises(ValueError, match="nowhere"):
        training.check(
            config(policy="bfloat16_mixed".replace("bfloat16_mixed", "compute=bfloat16;**/nowhere/**:compute=float32"))
        )


def test_a_batch_larger_than_the_data_is_refused_before_anything_is_written(tmp_path):
    sink = MemorySink()

    with pytest.raises(ValueError, match="only 1437 training examples"):
        run(folder=tmp_path / "new", sink=sink, data={"kind": "digits", "batch": 1438})

    assert sink.rows == []


class CountingTextConfig(DataConfig):
    """A text that counts upwards: the next token is the last one plus one."""

    kind: Literal["counting_text"] = "counting_text"


@pytest.fixture
def counting_text():
    def load(config):
        tokens = (np.arange(2000) % 11).astype(np.uint8)
        split = TextSplit(tokens, 8)
        return Dataset(DataSpec("language_model", (8,), 11), split, TextSplit(tokens, 8, 8), TextSplit(tokens, 8, 8))

    data.register_data("counting_text", CountingTextConfig, load)
    yield
    del DATASETS._entries["counting_text"]
    loop._dataset.cache_clear()


def test_a_transformer_learns_data_of_ones_own(counting_text):
    model = {"kind": "transformer", "depth": 1, "width": 16, "heads": 2}
    one = config(
        model=model,
        data={"kind": "counting_text", "batch": 16},
        optim={"kind": "adam", "lr": 1e-2},
        policy="bfloat16_mixed",
        train={"steps": 60, "log_every": 20, "eval_every": None, "eval_examples": 20},
    )
    sink = MemorySink()

    training.check(one)
    result = train(one, checkpoint_dir=None, sink=sink)

    assert sink.of("eval")[0]["loss"] == pytest.approx(np.log(11), rel=0.05)
    assert result.metrics["eval/accuracy"] > 0.9


@pytest.mark.parametrize("stop", [8, 9, 16, 17])
def test_a_diverging_run_that_was_interrupted_stops_where_one_that_was_not_does(tmp_path, stop):
    """The loss is not finite from the third step on, but only the row of step 20 tells."""
    changes = {
        "optim": {"kind": "sgd", "lr": 1e30},
        "train": {"steps": 60, "log_every": 20, "eval_every": None, "checkpoint_every": 8},
    }
    whole, whole_sink = run(**changes)
    sink = MemorySink()
    with pytest.raises(StoppedError):
        run(folder=tmp_path, sink=sink, on_step=stop_at(stop), **changes)

    result, _ = run(folder=tmp_path, sink=sink, **changes)
    again, _ = run(folder=tmp_path, sink=sink, **changes)

    assert whole.status == "diverged"
    assert whole.step < 8
    assert repr(result) == repr(again) == repr(whole)
    assert list(map(str, sink.rows)) == list(map(str, whole_sink.rows))


def test_a_run_stopped_by_an_evaluation_says_the_same_again(tmp_path):
    changes = {"optim": {"kind": "sgd", "lr": 1e30}, "train": {"steps": 50, "log_every": 50, "eval_every": 5}}
    result, sink = run(folder=tmp_path, **changes)

    again, _ = run(folder=tmp_path, sink=sink, **changes)

    assert (result.status, result.step) == ("diverged", 5)
    assert repr(again) == repr(result)

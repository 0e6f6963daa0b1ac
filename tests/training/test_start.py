"""Runs that begin where another ended, that train nothing, and that are evaluated under several policies."""

import jax
import numpy as np
import pytest
from flax import nnx

import precision_lab as pl
from precision_lab import data, models
from precision_lab.nn import apply_policy
from precision_lab.runner.identity import run_id
from precision_lab.runner.known import metric_names
from precision_lab.training import RunConfig, check, train
from precision_lab.training.beginning import beginning
from precision_lab.training.program import program_for
from tests.training.runs import BASE, HALF, MemorySink, config, run


def child(parent, folder, **changes):
    """Returns (result, sink) of a run that begins from the checkpoints in a folder."""
    sink = MemorySink()
    begun = config(**changes, start={"run": parent})
    return train(begun, checkpoint_dir=None, sink=sink, start_from=folder), sink


def test_a_run_of_no_steps_evaluates_what_another_ended_with(tmp_path):
    parent, _ = run(folder=tmp_path)

    result, sink = child(config(), tmp_path, train={"steps": 0, "eval_every": None})

    assert (result.status, result.step) == ("done", 0)
    assert sink.of("eval")[0]["loss"] == parent.metrics["eval/loss"]
    assert sink.of("eval_train")[0]["loss"] == parent.metrics["eval_train/loss"]
    assert sink.of("train") == {}


def test_a_run_of_no_steps_may_keep_the_schedule_of_the_run_before(tmp_path):
    schedule = {"kind": "sgd", "lr": 0.1, "schedule": {"kind": "warmup_cosine", "warmup": 5}}
    run(folder=tmp_path, optim=schedule)

    result, _ = child(config(optim=schedule), tmp_path, optim=schedule, train={"steps": 0})

    assert result.status == "done"


def test_a_run_begins_from_masters_where_there_are_any_and_with_a_fresh_optimizer(tmp_path):
    changes = {"policy": HALF, "master_weights": True}
    run(folder=tmp_path, **changes)
    begun = config(start={"run": config(**changes)})
    program = program_for(begun, begun.data.spec())

    state, _ = beginning(begun, program, begun.data.spec(), tmp_path)

    leaves = jax.tree.leaves(state.params)
    # SGD's updates are not multiples of float16's last place, so masters lie between its numbers.
    assert any(np.any(np.asarray(x) != np.asarray(x).astype(np.float16)) for x in leaves)
    assert int(state.step) == 0
    assert all(not np.any(x) for x in jax.tree.leaves(state.opt_state) if np.shape(x))


def test_a_run_stopped_before_its_end_is_no_start(tmp_path):
    run(folder=tmp_path, train={"steps": 10})

    with pytest.raises(ValueError, match="belong to a run with another config: train differ"):
        child(config(), tmp_path)
    with pytest.raises(
        ValueError, match=r"has no checkpoint in '.*none', and not its last, of step \d+\. Delete that run's folder"
    ):
        child(config(), tmp_path / "none")


def test_a_start_without_its_run_or_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match="names arm 'x', which only an experiment can look up"):
        train(config(start={"arm": "x"}), checkpoint_dir=None, sink=MemorySink())
    with pytest.raises(ValueError, match="give their folder as start_from"):
        train(config(start={"run": config()}), checkpoint_dir=None, sink=MemorySink())


@pytest.mark.parametrize(
    ("parent", "start", "message"),
    [
        ({"lora": {"rank": 2}}, {}, r"start\.run.*ends with adapters beside its weights: merge: true adds them"),
        ({}, {"merge": True}, r"start\.merge.*ends with no adapters to merge"),
        ({"model": {"kind": "mlp", "hidden": [3]}}, {}, r"start\.run.*trains another model"),
        ({"train": {"steps": 0}}, {}, r"start\.run.*trains nothing and saves nothing"),
    ],
)
def test_a_run_that_this_one_cannot_begin_from_is_refused_with_its_config(parent, start, message):
    with pytest.raises(ValueError, match=rf"(?s){message}"):
        config(start={"run": config(**parent), **start})


def test_evals_are_the_same_parameters_under_other_policies(tmp_path):
    evals = {"int3": "weight=int3@channel", "float32": "float32"}

    result, sink = run(evals=evals)

    assert sorted(sink.of("eval_int3")) == sorted(sink.of("eval"))
    assert {**sink.of("eval_float32")[20], "split": "eval"} == {**sink.of("eval")[20], "excess": 0.0}
    trained = run(policy="weight=int3@channel", train={"steps": 0})[1].of("eval")[0]["loss"]
    assert sink.of("eval_int3")[0]["loss"] == trained  # before the first step both hold the same parameters
    assert result.metrics["eval_int3/loss"] != result.metrics["eval/loss"]


def test_an_evaluation_under_another_policy_is_that_of_the_model_under_it():
    result, _ = run(train={"steps": 0}, evals={"half": HALF})
    begun = config()
    dataset = data.load(begun.data)
    batch = dataset.eval.take(np.arange(100))
    model = apply_policy(models.build(begun.model, dataset.spec, 0), HALF)
    assert all(x.dtype == np.float16 for x in jax.tree.leaves(nnx.state(model, nnx.Param)))
    logits = np.asarray(model(batch["inputs"]), np.float64)
    shifted = logits - logits.max(axis=1, keepdims=True)
    losses = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(100), batch["targets"]]

    assert result.metrics["eval_half/loss"] == pytest.approx(losses.mean(), rel=1e-5)


def test_a_rule_of_a_further_policy_that_matches_nothing_is_refused_before_the_run():
    with pytest.raises(ValueError, match=r"evals\.lost: .*matched no site"):
        check(config(evals={"lost": "float32;**/nowhere/**:compute=bfloat16"}))


def test_evaluations_come_at_the_steps_asked_for():
    _, sink = run(train={"eval_at": [3, 7], "eval_every": None})

    assert sorted(sink.of("eval")) == [0, 3, 7, 20]


def test_an_evaluation_past_the_end_is_refused():
    with pytest.raises(ValueError, match="eval_at asks for step 21, the run has 20"):
        config(train={"eval_at": [21]})


def test_losses_that_are_not_finite_are_counted():
    # One step of this size leaves weights far past float16's largest number.
    huge = {"train": {"steps": 1, "on_nonfinite": "continue"}, "optim": {"kind": "sgd", "lr": 1e30}}
    result, _ = run(**huge, evals={"half": HALF})

    assert result.metrics["eval_half/nonfinite_fraction"] == 1.0


def test_names_of_arms_are_no_part_of_what_a_run_is():
    a, b = (RunConfig.model_validate({**BASE, "start": {"arm": arm, "run": config()}}) for arm in "ab")

    assert run_id(a) == run_id(b) != run_id(config())


def test_an_evaluation_tells_what_it_costs_and_what_quantizers_lose_of_the_weights():
    evals = {"int3": "weight=int3@channel", "half": HALF}

    result, sink = run(train={"steps": 0}, evals=evals, policy="weight=int8@channel")

    assert result.metrics["eval_int3/excess"] == result.metrics["eval_int3/loss"] - result.metrics["eval/loss"]
    model = models.build(config().model, config().data.spec(), 0)
    for split, quantizer in {"weights": "int8@channel", "weights_int3": "int3@channel"}.items():
        kernels = [np.float64(layer.kernel.get_raw_value()) for layer in (model.layers[0], model.head)]
        lost = [np.float64(pl.fake_quantize(np.float32(one), quantizer, axis=0)) - one for one in kernels]
        expected = sum(np.sum(one**2) for one in lost) / sum(np.sum(one**2) for one in kernels)
        assert sink.of(split)[0]["relative_mse"] == pytest.approx(expected, rel=1e-5)
    assert sink.of("weights_half") == {}
    logged = {name for name in result.metrics if not name.startswith("train/")}
    assert logged == metric_names(config(train={"steps": 0}, evals=evals, policy="weight=int8@channel"))


def test_what_quantizers_lose_is_told_of_the_weights_as_the_further_policy_stores_them():
    evals = {"half": "params=float16,weight=int8@channel"}

    _, sink = run(train={"steps": 0}, evals=evals, model={"kind": "mlp", "hidden": [16]})

    model = models.build(config().model, config().data.spec(), 0)
    kernels = [np.float16(layer.kernel.get_raw_value()) for layer in (model.layers[0], model.head)]
    lost = [np.float64(pl.fake_quantize(np.float32(one), "int8@channel", axis=0)) - one for one in kernels]
    expected = sum(np.sum(one**2) for one in lost) / sum(np.sum(np.float64(one) ** 2) for one in kernels)
    assert sink.of("weights_half")[0]["relative_mse"] == pytest.approx(expected, rel=1e-6)

"""Runs that train adapters beside frozen weights, and runs that begin with the two added."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import precision_lab as pl
from precision_lab.training import check, train
from precision_lab.training.beginning import beginning
from precision_lab.training.checkpointing import Checkpoints
from precision_lab.training.program import program_for
from tests.training.runs import MemorySink, config, run

LORA = {"rank": 2}
SPEC = config().data.spec()


def started(run_config, folder=None):
    return beginning(run_config, program_for(run_config, SPEC), SPEC, folder).state


def restored(run_config, folder):
    with Checkpoints(folder, run_config) as checkpoints:
        return checkpoints.restore(program_for(run_config, SPEC).state_shapes).state


def named(tree):
    return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in jax.tree.leaves_with_path(tree)}


def test_a_run_with_adapters_begins_where_one_without_them_does():
    bare, _ = run(train={"steps": 0})

    adapted, _ = run(train={"steps": 0}, lora=LORA)

    assert adapted.metrics["eval/loss"] == pytest.approx(bare.metrics["eval/loss"], rel=1e-6)


def test_adapters_train_and_weights_stay(tmp_path):
    result, sink = run(folder=tmp_path, lora=LORA)

    before, after = started(config(lora=LORA)), restored(config(lora=LORA), tmp_path)
    assert {path.rpartition("/")[2] for path in named(after.params)} == {"a", "b"}
    assert sum(x.size for x in jax.tree.leaves(after.params)) == 2 * (64 + 16) + 2 * (16 + 10)
    assert all(np.any(x != y) for x, y in zip(*map(jax.tree.leaves, (before.params, after.params)), strict=True))
    for path, x in named(before.model_state).items():
        np.testing.assert_array_equal(x, named(after.model_state)[path])
    assert result.metrics["eval_train/loss"] < sink.of("eval_train")[0]["loss"]


def test_the_first_adapters_depend_on_the_seed():
    first = [jax.tree.leaves(started(config(lora=LORA, seed=seed)).params)[0] for seed in (0, 0, 1)]

    np.testing.assert_array_equal(first[0], first[1])
    assert np.any(first[0] != first[2])


@pytest.mark.parametrize("policy", ["float32", "weight=int4@channel"])
def test_merged_weights_are_those_that_were_multiplied_plus_the_adapters(tmp_path, policy):
    parent = config(lora={"rank": 2, "alpha": 3.0}, policy=policy)
    train(parent, checkpoint_dir=tmp_path, sink=MemorySink())

    merged = started(config(start={"run": parent, "merge": True}), tmp_path).params

    end = restored(parent, tmp_path)
    for path in ("layers/0/kernel", "head/kernel"):
        weight = jnp.asarray(named(end.model_state)[path])
        used = weight if policy == "float32" else pl.fake_quantize(weight, "int4@channel", axis=0)
        pair = end.params["lora_adapters"][path]
        expected = np.float64(used) + 3.0 / 2 * np.float64(pair["a"]) @ np.float64(pair["b"])
        np.testing.assert_allclose(named(merged)[path], expected, rtol=1e-5, atol=1e-6)


def test_a_merged_run_computes_what_the_adapted_one_did(tmp_path):
    parent = config(lora=LORA, policy="weight=int4@channel")
    ended = train(parent, checkpoint_dir=tmp_path, sink=MemorySink())

    begun = config(start={"run": parent, "merge": True}, train={"steps": 0}, evals={"again": "weight=int4@channel"})
    merged = train(begun, checkpoint_dir=None, sink=MemorySink(), start_from=tmp_path)

    assert merged.metrics["eval/loss"] == pytest.approx(ended.metrics["eval/loss"], rel=1e-5)
    assert merged.metrics["eval_again/excess"] != 0


def test_evaluations_of_a_run_with_adapters_know_them_and_the_errors_of_its_weights():
    _, sink = run(lora=LORA, policy="weight=int4@channel", evals={"float32": "float32"})

    weights = [sink.of("weights")[step]["relative_mse"] for step in (0, 20)]
    assert weights[0] == weights[1] > 0
    assert sink.of("eval_float32")[20]["loss"] != sink.of("eval_float32")[0]["loss"]


def test_a_killed_run_with_adapters_goes_on_as_if_it_had_not_been(tmp_path):
    whole, _ = run(lora=LORA, train={"checkpoint_every": 5})

    class KilledError(Exception):
        pass

    def at_twelve(step, loss):
        if step == 12:
            raise KilledError

    with pytest.raises(KilledError):
        run(folder=tmp_path, lora=LORA, train={"checkpoint_every": 5}, on_step=at_twelve)
    again, _ = run(folder=tmp_path, lora=LORA, train={"checkpoint_every": 5})

    assert again.metrics == whole.metrics


def test_adapters_beside_16_bit_weights_are_refused():
    with pytest.raises(ValueError, match="lora trains float32 adapters, but policy"):
        config(lora=LORA, policy="bfloat16_pure")
    with pytest.raises(ValueError, match="lora trains float32 adapters, but policy"):
        config(lora=LORA, evals={"half": "float16"})


def test_paths_that_match_no_weight_are_refused_before_the_run():
    with pytest.raises(ValueError, match="matches no weight that can have an adapter"):
        check(config(lora={"rank": 2, "paths": "nowhere/**"}))

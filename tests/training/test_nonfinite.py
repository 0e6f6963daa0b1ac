"""A loss that is not finite, injected at a known step: stop, skip or continue (check 31)."""

from typing import Literal

import jax
import numpy as np
import pytest

from precision_lab import data
from precision_lab.data import DATASETS, ArraySplit, DataConfig, Dataset
from precision_lab.models import DataSpec
from precision_lab.training import loop
from precision_lab.training.checkpointing import Checkpoints
from precision_lab.training.program import program_for
from tests.training.runs import MemorySink, config, run

BATCH, STEPS = 8, 16


class OneBadConfig(DataConfig):
    """Random images, of which the last training one is NaN: each epoch of eight steps meets it once."""

    kind: Literal["one_bad"] = "one_bad"


def load(config):
    rng = np.random.default_rng(0)
    images = rng.normal(size=(64, 4, 4, 1)).astype(np.float32)
    labels = (images[:, 0, 0, 0] > 0).astype(np.int32)
    clean = ArraySplit(images.copy(), labels)
    images[-1] = np.nan
    return Dataset(DataSpec("classification", (4, 4, 1), 2), ArraySplit(images, labels), clean, clean)


@pytest.fixture
def bad_step():
    """Registers the data, and gives the first step whose batch has the bad image, as the pipeline orders it."""
    data.register_data("one_bad", OneBadConfig, load)
    one = OneBadConfig(batch=BATCH)
    batches = data.batches(load(one), one, 0)
    yield next(step + 1 for step in range(STEPS) if np.isnan(batches[step]["inputs"]).any())
    del DATASETS._entries["one_bad"]
    loop._dataset.cache_clear()


def changes(on_nonfinite, **more):
    train = {"steps": STEPS, "log_every": 1, "eval_every": None, "checkpoint_every": 1, "on_nonfinite": on_nonfinite}
    return {"data": {"kind": "one_bad", "batch": BATCH}, "train": {**train, **more}}


def restored(folder, step, **train):
    """Returns the parameters saved at a step."""
    one = config(**changes("stop", **train))
    program = program_for(one, load(None).spec)
    with Checkpoints(folder, one) as checkpoints:
        return checkpoints.restore(program.state_shapes, step).state.params


def test_stop_ends_at_the_bad_step_and_keeps_the_last_finite_checkpoint(tmp_path, bad_step):
    result, sink = run(folder=tmp_path, **changes("stop", log_every=STEPS))
    early, _ = run(**changes("stop"))

    assert (early.status, early.step) == (result.status, result.step) == ("diverged", bad_step)
    assert max(row["step"] for row in sink.rows) == STEPS  # where it was noticed
    assert result.last_finite == bad_step - 1
    kept = sorted(int(path.name) for path in tmp_path.iterdir())
    assert kept == [bad_step - 1, STEPS - 1, STEPS]
    leaves = jax.tree.leaves(restored(tmp_path, bad_step - 1, log_every=STEPS))
    assert all(np.isfinite(leaf).all() for leaf in leaves)


@pytest.mark.parametrize("loss_scale", ["none", {"kind": "static", "scale": 8.0}], ids=["no scale", "scale"])
def test_skip_applies_every_step_but_the_bad_ones_and_counts_them(bad_step, loss_scale):
    result, sink = run(**changes("skip"), loss_scale=loss_scale if loss_scale != "none" else {"kind": "none"})

    rows = sink.of("train")
    bad = [step for step, row in rows.items() if np.isnan(row["loss"])]
    assert bad[0] == bad_step
    assert len(bad) == STEPS * BATCH // 64
    assert [step for step, row in rows.items() if row["unchanged_fraction"] == 1] == bad
    assert [row["skipped_steps"] for row in rows.values()] == list(np.cumsum([step in bad for step in rows]))
    assert (result.status, result.step) == ("done", STEPS)
    assert np.isfinite(result.metrics["eval/loss"])


def test_a_run_without_bad_steps_has_the_same_numbers_whatever_the_policy():
    stop, skip, go_on = (run(train={"on_nonfinite": policy})[0].metrics for policy in ("stop", "skip", "continue"))

    assert stop == go_on
    # Skipping is another program, whose float32 sums XLA may order otherwise; 20 steps with momentum carry that on.
    assert skip == pytest.approx(stop, rel=1e-5)


def test_continue_records_it_and_goes_on(bad_step):
    result, sink = run(**changes("continue"))

    losses = [row["loss"] for row in sink.of("train").values()]
    assert np.isfinite(losses[: bad_step - 1]).all()
    assert np.isnan(losses[bad_step - 1 :]).all()
    assert (result.status, result.step) == ("done", STEPS)


@pytest.mark.parametrize("log_every", [1, STEPS])
def test_continue_tells_the_first_bad_step_whatever_the_rows_and_though_it_was_killed(tmp_path, bad_step, log_every):
    """The only row in 16 steps is the last one."""

    def kill(step, loss):
        if step == bad_step + 1:
            raise KeyboardInterrupt

    kept = {"folder": tmp_path, **changes("continue", log_every=log_every)}
    with pytest.raises(KeyboardInterrupt):
        run(**kept, on_step=kill)
    result, _ = run(**kept)
    again, _ = run(**kept)

    assert result.first_nonfinite == again.first_nonfinite == bad_step
    assert run(**changes("skip"))[0].first_nonfinite is None
    assert run(train={"on_nonfinite": "continue"})[0].first_nonfinite is None


def test_a_run_asked_to_stop_saves_and_ends_like_one_that_was_not(tmp_path):
    changes = {"train": {"checkpoint_every": None}, "loss_scale": {"kind": "dynamic", "interval": 3}}
    whole, whole_sink = run(**changes)
    sink, asked = MemorySink(), []

    def should_stop():
        asked.append(None)
        return len(asked) in (7, 8, 14)

    ends = []
    while not ends or ends[-1].status == "stopped":
        from precision_lab.training import train

        ends.append(train(config(**changes), checkpoint_dir=tmp_path, sink=sink, should_stop=should_stop))

    assert [end.step for end in ends] == [7, 8, 14, 20]
    assert ends[-1] == whole
    assert sink.rows == whole_sink.rows

"""A group of runs at once: each is the run that it is alone, to rounding."""

import math
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import jax
import numpy as np
import pytest

from precision_lab.training import loop
from precision_lab.training.checkpointing import Checkpoints
from precision_lab.training.lockstep import Lockstep, _vmapped
from precision_lab.training.program import _build, program_for
from precision_lab.training.structure import structural_differences
from tests.training.runs import MemorySink, config, run


def group(changes, *, folders=None, sinks=None, on_step=None):
    """Returns (results or errors, sinks) of small runs at once, each in a lane of its own."""
    lockstep, sinks = Lockstep(len(changes)), sinks or [MemorySink() for _ in changes]
    folders = folders or [None] * len(changes)

    def go(lane):
        told = None if on_step is None else partial(on_step, lane)
        try:
            with lockstep.lane(lane):
                return loop.train(config(**changes[lane]), checkpoint_dir=folders[lane], sink=sinks[lane], on_step=told)
        except Exception as error:
            return error

    with ThreadPoolExecutor(len(changes)) as threads:
        return list(threads.map(go, range(len(changes)))), sinks


def assert_close(sink, alone, **tolerance):
    """Compares all rows of two runs."""
    assert [(row["step"], row["split"]) for row in sink.rows] == [(row["step"], row["split"]) for row in alone.rows]
    for row, other in zip(sink.rows, alone.rows, strict=True):
        for name in row:
            if name in ("loss", "grad_norm"):
                np.testing.assert_allclose(row[name], other[name], err_msg=f"{row}", **tolerance)


def test_check_19_runs_at_once_are_those_alone_to_rounding():
    """Twenty steps of Adam: sums in another order differ in their last bits, and an update by no more than that."""
    lrs = {2: 1e-3, 4: 3e-3, 8: 1e-2}
    changes = [
        {"policy": f"weight=int{bits}@channel", "optim": {"kind": "adam", "lr": lr}, "seed": bits}
        for bits, lr in lrs.items()
    ]

    results, sinks = group(changes)

    for each, result, sink in zip(changes, results, sinks, strict=True):
        expected, alone = run(**each)
        assert (result.status, result.step) == (expected.status, expected.step)
        assert_close(sink, alone, rtol=1e-3, atol=1e-5)
        first = sink.of("eval")[0], alone.of("eval")[0]
        assert first[0]["loss"] == first[1]["loss"], "before the first step nothing is stacked"
    one = config(**changes[0])
    assert _vmapped(loop.program_for(one, loop._dataset(one.data).spec).step)._cache_size() == 1


def test_runs_of_different_length_and_rows_keep_their_own_steps():
    changes = [{"train": {"steps": 20}}, {"train": {"steps": 7, "eval_every": 3}, "seed": 1}]

    results, sinks = group(changes)

    assert [result.step for result in results] == [20, 7]
    for each, sink in zip(changes, sinks, strict=True):
        assert_close(sink, run(**each)[1], rtol=1e-4, atol=1e-6)


def test_a_run_that_diverges_leaves_the_others_as_they_are():
    changes = [{}, {"optim": {"kind": "sgd", "lr": 1e30, "momentum": 0.9}}]

    (first, second), sinks = group(changes)

    assert (first.status, second.status) == ("done", "diverged")
    assert second.step == run(**changes[1])[0].step
    assert_close(sinks[0], run()[1], rtol=1e-4, atol=1e-6)
    assert all(math.isfinite(row["loss"]) for row in sinks[0].rows)


class FailingSink(MemorySink):
    def write(self, row):
        if row["step"] >= 10:
            raise OSError("no space")
        super().write(row)


def test_a_run_that_fails_hands_back_its_error_and_the_others_end():
    (failed, done), sinks = group([{"seed": 0}, {"seed": 1}], sinks=[FailingSink(), MemorySink()])

    assert isinstance(failed, OSError)
    assert done.status == "done"
    assert_close(sinks[1], run(seed=1)[1], rtol=1e-4, atol=1e-6)


def test_an_error_of_the_common_step_reaches_every_run(monkeypatch):
    def broken(step):
        def raises(*_):
            raise MemoryError("too large")

        return raises

    monkeypatch.setattr("precision_lab.training.lockstep._vmapped", broken)

    results, _ = group([{"seed": 0}, {"seed": 1}])

    assert [type(result) for result in results] == [MemoryError, MemoryError]


def test_a_group_that_does_not_fit_says_the_way_out(monkeypatch):
    def full(step):
        def raises(*_):
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes.")

        return raises

    monkeypatch.setattr("precision_lab.training.lockstep._vmapped", full)

    results, _ = group([{"seed": 0}, {"seed": 1}])

    for result in results:
        assert "Out of memory allocating 9 bytes" in str(result)
        assert str(result).startswith("2 runs at once do not fit: make fewer at once, --jobs N.")


class StopError(Exception):
    """Stands for a kill."""


def test_a_group_that_was_stopped_goes_on_from_the_checkpoints_of_each_run(tmp_path):
    """The second is stopped at another step than the first, and both give what they give at once without a stop."""
    changes = [{"train": {"checkpoint_every": 4}}, {"train": {"checkpoint_every": 6}, "seed": 1}]
    folders = [tmp_path / "0", tmp_path / "1"]

    def stop(number, step, loss):
        if step == (9, 14)[number]:
            raise StopError

    stopped, first = group(changes, folders=folders, on_step=stop)
    results, again = group(changes, folders=folders)

    whole, expected = group(changes)
    assert [type(result) for result in stopped] == [StopError, StopError]
    assert [sink.restarts for sink in again] == [[8], [12]]
    assert [result.metrics for result in results] == [result.metrics for result in whole]
    for number, sink in enumerate(again):
        kept = [row for row in first[number].rows if row["step"] <= sink.restarts[0]]
        assert kept + sink.rows == expected[number].rows


def test_checkpoints_of_a_group_are_those_of_a_run_alone(tmp_path):
    """A run may go on alone from what it saved in a group."""
    [_, grouped], _ = group([{"seed": 0}, {"seed": 1}], folders=[None, tmp_path])

    [alone, sink] = run(seed=1, folder=tmp_path)

    assert alone == grouped
    assert sink.rows == []
    one = config(seed=1)
    shapes = loop.program_for(one, loop._dataset(one.data).spec).state_shapes
    with Checkpoints(tmp_path, one) as checkpoints:
        restored = checkpoints.restore(shapes)
    assert jax.tree.structure(restored.state) == jax.tree.structure(shapes)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"policy": "weight=int8@tensor"}, "policy weight=int8, not int4@channel"),
        ({"policy": "weight=int8@channel", "model": {"kind": "mlp", "hidden": [8]}}, r"model.hidden is \(8,\), not"),
    ],
)
def test_runs_that_cannot_be_stacked_are_refused_and_the_reason_is_known(change, reason):
    one = {"policy": "weight=int4@channel"}

    results, _ = group([one, change])

    for result in results:
        assert isinstance(result, ValueError)
        assert "share no program" in str(result)
    assert re.match(reason, "; ".join(structural_differences(config(**change), config(**one))))


def test_lanes_whose_program_was_made_anew_between_them_go_together(monkeypatch):
    """As in a group of more runs than programs are kept, each of which begins from a run of a program of its own."""
    making = threading.Lock()

    def made_anew(config, spec):
        with making:
            _build.cache_clear()
            return program_for(config, spec)

    monkeypatch.setattr(loop, "program_for", made_anew)
    changes = [{"seed": 0, "train": {"steps": 3}}, {"seed": 1, "train": {"steps": 3}}]

    results, sinks = group(changes)

    monkeypatch.undo()
    for each, result, sink in zip(changes, results, sinks, strict=True):
        assert result.step == 3, result
        assert_close(sink, run(**each)[1], rtol=1e-4, atol=1e-6)


def test_a_lane_that_is_left_before_its_first_step_is_not_waited_for():
    lockstep = Lockstep(3)
    with lockstep.lane(1):
        pass

    with ThreadPoolExecutor(2) as threads:
        results = list(threads.map(partial(run_in, lockstep), (0, 2)))

    assert [result.metrics for result in results] == [result.metrics for result in group([{"seed": 0}, {"seed": 2}])[0]]


def run_in(lockstep, lane):
    """Returns the result of a run in a lane, whose number is its seed."""
    with lockstep.lane(lane):
        return run(seed=lane)[0]


def test_threads_that_ask_at_the_same_time_share_a_program():
    one, barrier = config(model={"kind": "mlp", "hidden": [5]}), threading.Barrier(3)

    def built(_):
        barrier.wait()
        return program_for(one, one.data.spec()).step

    with ThreadPoolExecutor(3) as threads:
        steps = list(threads.map(built, range(3)))

    assert all(step is steps[0] for step in steps)

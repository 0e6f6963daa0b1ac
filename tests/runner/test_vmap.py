"""The executor `vmap`: what goes at once, and that each run ends as it does by itself."""

import json
import signal

import numpy as np
import pytest

from precision_lab import runner
from precision_lab.runner import executors
from precision_lab.runner.execute import plan
from precision_lab.runner.executors import vmap
from precision_lab.runner.stopping import Stop
from tests.runner.commands import EXPERIMENT as SLOW
from tests.runner.commands import lines, rows, start, states, wait_for
from tests.runner.fakes import EXPERIMENT

SMALL = {
    **EXPERIMENT,
    "train": {"steps": 12, "log_every": 4, "eval_every": 6, "eval_examples": 100},
    "arms": {f"w{bits}": {"policy": f"weight=int{bits}@channel"} for bits in (2, 8)} | {"float32": {}},
    "seeds": [0, 1],
    "claims": [],
}


@pytest.mark.slow
def test_check_19_runs_at_once_give_the_rows_of_runs_in_turn_to_rounding(tmp_path):
    said = []
    runner.run(SMALL, out=tmp_path / "vmap", executor="vmap", say=said.append)
    runner.run(SMALL, out=tmp_path / "serial", say=said.append)
    again = runner.run(SMALL, out=tmp_path / "vmap", executor="vmap", say=said.append)

    assert said == ["6 of 6 runs are finished already and are reused."]
    assert {one.state for one in again.trials} == {"done"}
    found, expected = rows(tmp_path / "vmap"), rows(tmp_path / "serial")
    assert found.keys() == expected.keys()
    for run, in_turn in expected.items():
        assert [(row["step"], row["split"]) for row in found[run]] == [(row["step"], row["split"]) for row in in_turn]
        for row, other in zip(found[run], in_turn, strict=True):
            measured = {"loss", "relative_mse"} & row.keys()
            assert measured, row
            for name in measured:  # twelve steps of float32 sums in another order
                np.testing.assert_allclose(row[name], other[name], rtol=1e-4)
    envs = [json.loads(path.read_text()) for path in tmp_path.glob("vmap/trials/*/env.json")]
    assert [env["executor"] for env in envs] == ["vmap"] * 6


def test_a_run_that_was_made_in_turn_says_that_it_was_not_made_at_once(training, tmp_path):
    said = []
    runner.run(EXPERIMENT, out="runs", say=said.append)
    runner.run(EXPERIMENT, out="runs", executor="vmap", say=said.append)

    assert "9 runs come from another environment (executor none, here vmap)" in said[-1]


def planned(tmp_path, **changes):
    """Returns the runs of an experiment."""
    return plan(runner.load({**SMALL, **changes}), tmp_path)


def context(said, jobs=None):
    """Returns a context that keeps what is said."""
    return executors.Context({}, None, said.append, None, jobs)


@pytest.mark.parametrize(
    ("room", "jobs", "sizes", "words"),
    [
        (99, None, [4, 2], []),
        (99, 3, [3, 1, 2], []),
        (3, None, [3, 1, 2], ["w2, seed 0 and 3 runs like it do not fit into memory at once; 3 at a time."]),
        (1, None, [1] * 6, [f"{arm}, seed 0 and {n} runs like it do not fit into memory at once; in turn."
                            for arm, n in (("w2", 3), ("float32", 1))]),
    ],
)  # fmt: skip
def test_groups_are_as_large_as_there_is_room_for(tmp_path, monkeypatch, room, jobs, sizes, words):
    monkeypatch.setattr("precision_lab.training.size.room_for", lambda config: room)
    said = []

    together = list(vmap._together(planned(tmp_path), context(said, jobs)))

    assert [len(group) for group in together] == sizes
    assert said == words


def test_no_run_goes_before_the_one_that_it_begins_from(tmp_path, monkeypatch):
    monkeypatch.setattr("precision_lab.training.size.room_for", lambda config: 99)
    waves = []
    monkeypatch.setattr(vmap, "_at_once", lambda runs, context: waves.append({one.label for one in runs}) or [])
    arms = {"child": {"policy": "weight=int2@channel", "start": {"arm": "parent"}}, "parent": {}}

    vmap.execute(planned(tmp_path, arms=arms), context([]))

    assert waves == [{"parent, seed 0", "parent, seed 1"}, {"child, seed 0", "child, seed 1"}]


@pytest.fixture
def many(monkeypatch):
    """Room for any number of runs."""
    monkeypatch.setattr("precision_lab.training.size.room_for", lambda config: 99)


def test_a_run_that_fails_takes_no_other_with_it(training, many, tmp_path):
    training.failures["float16"] = RuntimeError("broken")
    said = []

    results = runner.run(EXPERIMENT, out="runs", executor="vmap", say=said.append)

    by_arm = {arm: {one.state for one in results.of_arm(arm)} for arm in EXPERIMENT["arms"]}
    assert by_arm == {"float32": {"done"}, "float16": {"failed"}, "bfloat16": {"done"}}
    assert sum("float16, seed" in line and "RuntimeError: broken" in line for line in said) == 3


class Silent:
    """Progress that nobody watches."""

    def start_run(self, *_):
        """Does nothing."""

    step = end_run = start_run


def test_a_run_that_another_command_holds_is_left_for_later(training, many, tmp_path, monkeypatch):
    group = [one for one in plan(runner.load(EXPERIMENT), tmp_path / "runs") if one.label.startswith("float32")]
    left = []
    monkeypatch.setattr(vmap.serial, "execute", lambda runs, context: left.extend(runs))

    group[0].run.prepare(group[0].config)
    with group[0].run.claim(group[0].config, wait=False):
        vmap.execute(group, executors.Context({}, Silent(), print, Stop()))

    assert [one.label for one in left] == ["float32, seed 0"]
    assert [one.run.status()["state"] for one in group] == ["queued", "done", "done"]


def test_the_environment_says_how_many_went_at_once_and_nothing_of_a_run_that_went_alone(training, many, tmp_path):
    said = []
    three = {**EXPERIMENT, "arms": {"float32": {}}, "claims": []}
    alone = {**EXPERIMENT, "arms": {"alone": {"policy": "float16_mixed"}}, "seeds": [0], "claims": []}

    for experiment in (three, alone):
        results = runner.run(experiment, out="runs", executor="vmap", say=said.append)
        lanes = [(env.get("executor"), env.get("lanes")) for trial in results.trials for env in trial.envs]
        assert lanes == ([("vmap", 3)] * 3 if experiment is three else [(None, None)])
        said.clear()
        runner.run(experiment, out="runs", executor="vmap", say=said.append)
        assert not any("another environment" in line for line in said)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "state"), [(signal.SIGTERM, 75, "preempted"), (signal.SIGKILL, -9, "running")]
)
def test_a_group_that_is_stopped_goes_on_bitwise(tmp_path, number, code, state):
    """Checks 3 and 5 for runs at once."""
    arms = {f"lr{lr}": {"optim": {"lr": lr}} for lr in (0.1, 0.05)}
    options = {"experiment": {**SLOW, "arms": arms, "train": {**SLOW["train"], "checkpoint_every": 10}}}
    words = ("--executor", "vmap")
    whole = start(tmp_path, "whole", *words, **options)
    assert whole.wait(timeout=300) == 0, whole.stderr.read()

    stopped = start(tmp_path, "runs", *words, sleep_s=0.05, **options)
    wait_for(stopped, lambda: lines(tmp_path / "runs") >= 10)
    stopped.send_signal(number)
    assert stopped.wait(timeout=60) == code
    assert states(tmp_path / "runs") == [state] * 2

    again = start(tmp_path, "runs", *words, **options)
    assert again.wait(timeout=300) == 0, again.stderr.read()
    assert rows(tmp_path / "runs") == rows(tmp_path / "whole")

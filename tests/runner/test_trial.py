"""One run, as every executor makes it: what it logs and what it tells."""

import logging
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from precision_lab import runner
from precision_lab.runner.execute import plan
from precision_lab.runner.rundir import RunDir
from precision_lab.runner.trial import _logging_to, execute_trial
from precision_lab.training import RunResult
from tests.runner.fakes import EXPERIMENT


def test_runs_at_once_keep_the_messages_of_their_own_threads_and_those_of_nobody(tmp_path):
    barrier, log = threading.Barrier(3), logging.getLogger("some.library")

    def go(number):
        with _logging_to(tmp_path / "logs" / f"{number}.log"):
            barrier.wait()
            log.warning("of run %d", number)
            barrier.wait()
            barrier.wait()

    with ThreadPoolExecutor(2) as threads:
        ended = threads.map(go, range(2))
        for _ in range(2):
            barrier.wait()
        log.warning("of no run")
        barrier.wait()
        list(ended)

    for number in range(2):
        lines = (tmp_path / "logs" / f"{number}.log").read_text().splitlines()
        assert [line.partition("some.library: ")[2] for line in lines] == [f"of run {number}", "of no run"]


class Told:
    """Progress that remembers what it is told."""

    def __init__(self):
        self.told = []

    def start_run(self, label, total_steps, run=""):
        self.told.append((label, total_steps))

    def end_run(self, status, run=""):
        self.told.append(status)


def test_a_run_that_another_process_finished_counts_as_one_that_ended(training, tmp_path):
    results = runner.run(EXPERIMENT, out=tmp_path, say=lambda _: None)
    one, trained, progress = plan(results.experiment, tmp_path)[0], len(training.trained), Told()

    state = execute_trial(one.run, env={}, progress=progress, label="again", say=print)

    assert (state, len(training.trained)) == ("done", trained)
    assert progress.told == [("again", 10), "done"]


@pytest.mark.parametrize("first", [7, None])
def test_the_summary_of_a_run_that_goes_on_whatever_happens_says_when_it_happened(training, monkeypatch, first):
    ended = RunResult("done", 10, {"eval/loss": 1.0}, first_nonfinite=first)
    monkeypatch.setattr("precision_lab.training.train", lambda *_, **__: ended)
    going_on = {**EXPERIMENT, "train": {**EXPERIMENT["train"], "on_nonfinite": "continue"}, "seeds": [0], "claims": []}

    results = runner.run(going_on, out="runs", say=lambda _: None)
    stopping = runner.run({**EXPERIMENT, "seeds": [0], "claims": []}, out="runs", say=lambda _: None)

    assert [RunDir(one.path).summary()["first_nonfinite"] for one in results.trials] == [first] * 3
    assert not any("first_nonfinite" in RunDir(one.path).summary() for one in stopping.trials)

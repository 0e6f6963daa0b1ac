"""The whole road with nothing faked: real data, real training, real kills."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from precision_lab import runner
from precision_lab.runner.known import metric_names
from precision_lab.runner.yaml12 import dump

EXPERIMENT = {
    "name": "digits",
    "model": {"kind": "mlp", "hidden": [16]},
    "data": {"kind": "digits", "batch": 32},
    "optim": {"kind": "sgd", "lr": 0.1, "momentum": 0.9},
    "train": {"steps": 60, "eval_every": 20, "log_every": 5, "checkpoint_every": 10},
    "arms": {
        "float32": {},
        "float16": {"policy": "float16_pure", "master_weights": True, "loss_scale": "dynamic"},
    },
    "claims": [
        {"kind": "close", "a": "float16", "b": "float32", "metric": "eval/loss", "margin": 0.1},
        {"kind": "below", "a": "float32", "metric": "eval/loss", "value": 1.5},
        {"kind": "above", "a": "float16", "metric": "train/loss_scale", "reduce": "min", "value": 1},
    ],
}


def command(folder, *words):
    """Starts the command line in a folder."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen(
        [sys.executable, "-m", "precision_lab.cli", *words],
        cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def rows(folder):
    """Returns every row of every run under a folder of results, without the attempt that wrote it."""
    found = {}
    for path in sorted(folder.glob("trials/*/metrics.jsonl")):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        found[path.parent.name] = [{key: value for key, value in row.items() if key != "attempt"} for row in lines]
    return found


def test_an_experiment_on_digits_is_trained_judged_and_reported(tmp_path):
    said = []

    results = runner.run(EXPERIMENT, out=tmp_path / "runs", say=said.append)

    assert results.exit_code == 0, said
    assert [one.verdict for one in results.verdicts] == ["reproduced"] * 3
    # Every run, bits by two metrics, curves over steps and over time, what the numbers did.
    assert (results.folder / "report.html").read_text().count("<svg") == 6
    for one in results.trials:
        assert set(one.series) == metric_names(one.config)
        assert one.series["eval/loss"].steps == [0, 20, 40, 60]
        assert (one.path / "env.json").exists()


def test_a_rule_that_matches_nothing_is_refused_before_anything_is_written(tmp_path):
    arms = {
        "float32": {},
        "float16": {"policy": "params=float32,compute=float16,output=float32;**/haed/**:compute=float32"},
    }

    with pytest.raises(ValueError, match=r"arms\.float16\.policy: .*haed"):
        runner.run({**EXPERIMENT, "arms": arms, "claims": []}, out=tmp_path / "runs")

    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_kill_9_and_the_same_command_give_bitwise_the_same_numbers(tmp_path):
    longer = {**EXPERIMENT, "train": {**EXPERIMENT["train"], "steps": 400}, "claims": []}
    (tmp_path / "config.yaml").write_text(dump(longer))
    whole = command(tmp_path, "run", "config.yaml", "--out", "whole")
    assert whole.wait(timeout=300) == 0, whole.stderr.read()

    for wanted in (30, 150):  # rows: in the middle of the first run, then of the second
        killed = command(tmp_path, "run", "config.yaml", "--out", "killed")
        kill_when(killed, lambda n=wanted: row_count(tmp_path / "killed") >= n)
    finished = command(tmp_path, "run", "config.yaml", "--out", "killed")
    assert finished.wait(timeout=300) == 0, finished.stderr.read()
    again = command(tmp_path, "run", "config.yaml", "--out", "killed")
    assert again.wait(timeout=300) == 0

    assert rows(tmp_path / "killed") == rows(tmp_path / "whole")
    assert "2 of 2 runs are finished already" in again.stderr.read()


def row_count(folder):
    """Returns how many rows have been written so far, by a process that may be writing now."""
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("trials/*/metrics.jsonl"))


def kill_when(process, ready):
    """Kills a process without warning as soon as something holds."""
    deadline = time.monotonic() + 240
    while not ready():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()

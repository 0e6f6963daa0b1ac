"""Runs that are really killed, with kill -9, and called again."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training.runs import HALF, config

pytestmark = pytest.mark.slow

CONFIG = config(
    policy=HALF,
    master_weights=True,
    loss_scale={"kind": "dynamic", "interval": 10},
    optim={"kind": "adam", "lr": 1e-3, "schedule": {"kind": "cosine"}},
    train={"steps": 60, "log_every": 7, "eval_every": 20, "checkpoint_every": 20},
)


def attempt(folder, when):
    script = Path(__file__).with_name("killed_run.py")
    command = [sys.executable, str(script), CONFIG.model_dump_json(), str(folder), when]
    return subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], env=environment())


def environment():
    import os

    root = str(Path(__file__).parents[2])
    return {**os.environ, "PYTHONPATH": root}


def saved(folder):
    return sorted(int(path.name) for path in (folder / "checkpoints").iterdir() if path.name.isdigit())


def rows(folder):
    return sorted((folder / "rows.jsonl").read_text().splitlines())


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    done = attempt(folder, "never")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), rows(folder)


@pytest.mark.parametrize(
    ("deaths", "left"),
    [
        (["step:5"], [[]]),
        (["step:33", "step:47"], [[20], [20, 40]]),
        (["save:40"], [[20]]),
        (["save:60"], [[20, 40]]),
        (["step:60"], [[40, 60]]),
    ],
    ids=["before the first save", "twice", "while saving", "while saving the last", "after the last"],
)
def test_a_killed_run_ends_with_the_same_bits(tmp_path, uninterrupted, deaths, left):
    for when, steps in zip(deaths, left, strict=True):
        killed = attempt(tmp_path, when)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
        assert saved(tmp_path) == steps

    done = attempt(tmp_path, "never")

    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == uninterrupted[0]
    assert rows(tmp_path) == uninterrupted[1]

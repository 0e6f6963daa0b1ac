"""Experiments that run in processes of their own, slowly enough to be stopped."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from precision_lab.runner.yaml12 import dump

EXPERIMENT = {
    "name": "slow",
    "model": {"kind": "mlp", "hidden": [16]},
    "data": {"kind": "slow_digits", "batch": 32},
    "optim": {"kind": "sgd", "lr": 0.1, "momentum": 0.9},
    "train": {"steps": 100, "log_every": 7, "eval_every": 50},
    "arms": {"float32": {}, "bfloat16": {"policy": "bfloat16_mixed"}},
}


def start(folder, out, *words, sleep_s=0.0, experiment=EXPERIMENT, **environment):
    """Starts an experiment in a process, and a session, of its own."""
    (folder / "config.yaml").write_text(dump(experiment))
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, sys.path)])
    command = [sys.executable, "-m", "precision_lab.cli", "run", "config.yaml", "--out", out, "--import", "slow_digits"]
    return subprocess.Popen(
        [*command, *words], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": path, "SLEEP_S": str(sleep_s), **environment}, start_new_session=True,
    )  # fmt: skip


def rows(folder):
    """Returns every row of every run, without the attempt that wrote it."""
    found = {}
    for path in sorted(folder.glob("trials/*/metrics.jsonl")):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        found[path.parent.name] = [{key: value for key, value in row.items() if key != "attempt"} for row in rows]
    return found


def states(folder):
    """Returns the states that the directories of the runs hold, sorted."""
    return sorted(json.loads(path.read_text())["state"] for path in folder.glob("trials/*/status.json"))


def lines(folder):
    """Returns how many rows have been written so far."""
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("trials/*/metrics.jsonl"))


def wait_for(process, ready, timeout_s=240):
    """Waits until something holds while a process runs."""
    deadline = time.monotonic() + timeout_s
    while not ready():
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def session(number):
    """Returns the processes of a session that still run, as Linux lists them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session = path.read_text().rpartition(")")[2].split()[:4]
        except OSError:  # It has just ended.
            continue
        if int(session) == number and state != "Z":
            found.append(int(path.parent.name))
    return found

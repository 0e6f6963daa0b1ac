"""Two processes that train together over the loopback, against one with as many devices (check 20)."""

import json
import os
import re
import socket
import subprocess
import sys

import numpy as np
import pytest

from precision_lab.runner import distributed
from precision_lab.runner.yaml12 import dump

EXPERIMENT = {
    "name": "mesh",
    "model": {"kind": "mlp", "hidden": [64, 64]},
    "data": {"kind": "digits", "batch": 32},
    "optim": {"kind": "adam", "lr": 1e-3},
    "train": {"steps": 10, "log_every": 1, "eval_every": 5, "eval_examples": 64, "checkpoint_every": 5},
    "arms": {"data": {"mesh": {"data": -1}}, "tensor": {"mesh": {"tensor": -1}}},
}


def start(folder, out, devices, *words, **environment):
    """Starts the command in a process with so many devices; what it compiled is kept in `out`-compiled."""
    kept = f"--xla_dump_to={folder / out}-compiled{environment.get('JAX_PROCESS_ID', '')} --xla_dump_hlo_as_text"
    return subprocess.Popen(
        [sys.executable, "-m", "precision_lab.cli", "run", "config.yaml", "--out", out, *words],
        cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={
            **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "JAX_PLATFORMS": "cpu",
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {kept}", **environment,
        },
    )  # fmt: skip


def losses(folder, arm):
    """Returns the training losses of an arm, float32, and the rest of its rows."""
    (trials,) = folder.glob("*/trials.json")
    (name,) = [one["run_id"] for one in json.loads(trials.read_text())["trials"] if one["arm"] == arm]
    rows = [json.loads(line) for line in (folder / "trials" / name / "metrics.jsonl").read_text().splitlines()]
    return np.float32([row["loss"] for row in rows if row["split"] == "train"]), rows


def collective_programs(compiled):
    """Returns every program, after all optimizations, in which devices tell one another something."""
    texts = [path.read_text() for path in compiled.glob("*.cpu_after_optimizations.txt")]
    return sorted(text for text in texts if re.search(r" = \S+ (all-|reduce-|collective-)\w+[-\w]*\(", text))


def alone_and_together(folder, devices, *words):
    """Runs the experiment in one process with twice so many devices, and in two processes."""
    (folder / "config.yaml").write_text(dump(EXPERIMENT))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    alone = start(folder, "one", 2 * devices, *words)
    assert alone.wait(timeout=300) == 0, alone.stderr.read()
    known = {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2"}
    both = [start(folder, "two", devices, "--distributed", *words, **known, JAX_PROCESS_ID=str(i)) for i in range(2)]
    try:
        for one in both:
            assert one.wait(timeout=300) == 0, one.stderr.read()
    finally:
        for one in both:
            one.kill()
    return folder / "one", folder / "two"


@pytest.mark.slow
def test_two_processes_of_four_devices_equal_one_of_eight(tmp_path):
    """What they compute is the same to the letter, so that only the order of sums over devices is left: 2 ulp a step.

    In one process XLA adds in the order of the devices; over the network gloo adds in another one.
    """
    one, two = alone_and_together(tmp_path, 4)

    for arm in EXPERIMENT["arms"]:
        expected, rows = losses(one, arm)
        found, rows_found = losses(two, arm)
        assert [(row["step"], row["split"]) for row in rows_found] == [(row["step"], row["split"]) for row in rows]
        assert (abs(found - expected) <= 2 * np.spacing(expected) * np.arange(1, 11)).all()
    alone, first = (collective_programs(tmp_path / name) for name in ("one-compiled", "two-compiled0"))
    assert len(alone) >= 4, "a step and an evaluation of each arm"
    assert set(alone) <= set(first)
    assert not any("HloModule jit__lambda" in text for text in set(first) - set(alone)), "only announcements"
    (env,) = {path.read_text() for path in two.glob("trials/*/env.json")}
    assert (json.loads(env)["devices"], json.loads(env)["processes"]) == (8, 2)
    assert not list(two.glob("trials/*/logs/*"))


@pytest.mark.slow
def test_a_product_divided_over_two_processes_has_the_bits_of_one(tmp_path):
    """A sum of two terms has no order."""
    one, two = alone_and_together(tmp_path, 1, "--arm", "tensor")

    assert losses(two, "tensor")[1] == losses(one, "tensor")[1]


def test_what_cannot_be_distributed_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="need executor 'serial', got 'process'"):
        distributed.initialize(True, "process")
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "127.0.0.1:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    with pytest.raises(ValueError, match="JAX_COORDINATOR_ADDRESS is set, but not JAX_PROCESS_ID"):
        distributed.initialize(False, "serial")

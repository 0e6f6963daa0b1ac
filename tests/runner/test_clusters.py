"""Executors of clusters, on this machine alone: Ray with a cluster of its own, submitit with its local stand-in."""

import json
import os
import signal
from pathlib import Path

import pytest

from precision_lab import runner
from precision_lab.runner import execute, executors
from precision_lab.runner.executors import slurm
from precision_lab.runner.stopping import Stop
from tests.runner.commands import EXPERIMENT, rows

DEADLY = {**EXPERIMENT, "arms": {"float32": {}, "deadly": {"data": {"kind": "deadly_digits"}}}}


@pytest.fixture(autouse=True)
def modules(monkeypatch, tmp_path):
    """Makes the slow digits importable, here and in workers, and keeps what Ray writes to the home away from it."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def run(out, executor, experiment=EXPERIMENT, **options):
    """Runs an experiment and returns its results and what was said."""
    said = []
    results = runner.run(experiment, out=out, executor=executor, imports=["slow_digits"], say=said.append, **options)
    return results, said


def states(results):
    return {one.arm: one.state for one in results.trials}


@pytest.mark.slow
def test_ray_gives_the_numbers_of_serial_and_retries_what_dies(monkeypatch):
    """Checks 18 and 23."""
    pytest.importorskip("ray", reason="Ray is an extra: pip install 'precision-lab[ray]'")
    run("serial", "serial", arms=["float32"])
    monkeypatch.setenv("DIE", "1")
    crashed, said = run("runs", "ray", DEADLY, jobs=2)

    assert states(crashed) == {"float32": "done", "deadly": "failed"}
    assert crashed.exit_code == 3
    assert crashed.trial("deadly", 0).attempt == 3  # Ray tried twice more.
    assert any("deadly, seed 0 failed: its worker of Ray ended" in line for line in said)
    assert rows(Path("serial")).items() <= rows(Path("runs")).items()

    monkeypatch.delenv("DIE")
    again, _ = run("runs", "ray", DEADLY, jobs=2)

    assert states(again) == {"float32": "done", "deadly": "done"}
    assert [one.attempt for one in again.trials] == [1, 4]


@pytest.mark.slow
def test_submitit_gives_the_numbers_of_serial_and_marks_what_dies(monkeypatch):
    """Check 18."""
    pytest.importorskip("submitit", reason="submitit is an extra: pip install 'precision-lab[slurm]'")
    monkeypatch.setattr(slurm, "CLUSTER", "local")
    run("serial", "serial", arms=["float32"])
    monkeypatch.setenv("DIE", "1")
    crashed, _ = run("runs", "slurm:timeout_min=5", DEADLY, jobs=2)

    assert states(crashed) == {"float32": "done", "deadly": "failed"}
    assert "the last words" in crashed.trial("deadly", 0).error
    assert rows(Path("serial")).items() <= rows(Path("runs")).items()


def test_a_sweep_is_one_array_with_a_cap_that_is_warned_before_its_time_is_up(tmp_path, monkeypatch):
    """Check 24, as far as the script goes that `sbatch` gets."""
    pytest.importorskip("submitit", reason="submitit is an extra: pip install 'precision-lab[slurm]'")
    shim(tmp_path, "srun", "exit 1")
    monkeypatch.setenv("PATH", shim(tmp_path, "sbatch", "cp $1 ../script; echo Submitted batch job 5"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    experiment = runner.load({**EXPERIMENT, "seeds": list(range(60))}, imports=["slow_digits"])
    planned = execute.plan(experiment, Path("runs"))

    context = executors.Context({}, None, print, Stop(), 8, {"partition": "gpu", "gpus_per_node": "1"})
    jobs = slurm._submit(planned, [["slow_digits"]] * 120, context)

    script = (tmp_path / "script").read_text()
    assert [job.job_id for job in jobs] == [f"5_{i}" for i in range(120)]
    for line in ("array=0-119%8", "signal=USR1@120", "partition=gpu", "gpus-per-node=1", "time=240"):
        assert f"#SBATCH --{line}\n" in script


def shim(tmp_path, name, body):
    """Makes a command of this name, and returns a PATH on which it is found first."""
    path = tmp_path / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return f"{path.parent}:{os.environ['PATH']}"


def test_a_job_whose_time_is_up_saves_and_goes_back_into_the_queue(tmp_path, monkeypatch):
    """With a `scontrol` that only writes down what it was asked."""
    monkeypatch.setenv("PATH", shim(tmp_path, "scontrol", f'echo "$@" >> {tmp_path}/asked'))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "5")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    planned = execute.plan(runner.load(EXPERIMENT, arms=["float32"], imports=["slow_digits"]), tmp_path / "runs")[0]
    planned.run.prepare(planned.config)
    import slow_digits

    taken = []
    take = slow_digits.SlowSplit.take

    def take_and_signal(self, indices):
        taken.append(None)
        if len(taken) == 30:
            os.kill(os.getpid(), signal.SIGUSR1)
        return take(self, indices)

    monkeypatch.setattr(slow_digits.SlowSplit, "take", take_and_signal)
    with pytest.raises(SystemExit) as ended:
        slurm.run_in_job(str(planned.run.path), "float32, seed 0", ["slow_digits"])

    assert ended.value.code == 75
    assert (tmp_path / "asked").read_text() == "requeue 5_2\n"
    assert planned.run.status()["state"] == "preempted"
    (saved,) = planned.run.checkpoints.iterdir()
    assert 0 < int(saved.name) < 100
    assert slurm.run_in_job(str(planned.run.path), "float32, seed 0", ["slow_digits"]) == "done"
    attempts = [json.loads(line)["attempt"] for line in (planned.run.path / "metrics.jsonl").read_text().splitlines()]
    assert sorted(set(attempts)) == [1, 2]


def test_slurm_without_sbatch_is_refused_with_the_way_out(monkeypatch):
    monkeypatch.setenv("PATH", "")

    with pytest.raises(ValueError, match="needs sbatch, which is not on this machine"):
        slurm.execute([], None)


def test_a_resource_of_ray_that_is_no_number_is_refused_by_name():
    from precision_lab.runner.executors.ray import _resources

    with pytest.raises(ValueError, match=r"takes a number as num_gpus, such as 1 or 0\.5, got 'x'"):
        _resources({"num_gpus": "x"})

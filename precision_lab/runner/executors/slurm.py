"""Runs as one job array of SLURM, through submitit, at most `jobs` at once; this process waits for them.

Before its time limit SLURM sends SIGUSR1: the run saves, and the job is put back into the queue and continues. On
SIGTERM (`scancel`, or preemption, after which SLURM itself may queue the job again) it saves and ends with code 75.
Options are those of `sbatch` and the common ones of submitit: `slurm:partition=gpu,timeout_min=600,gpus_per_node=1`.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from precision_lab.runner.executors import Context
from precision_lab.runner.executors.remote import Watch, environment, mark_crashed, modules_to_import
from precision_lab.runner.rundir import RunDir
from precision_lab.runner.stopping import Preempted
from precision_lab.runner.trial import Planned

CLUSTER = "slurm"
"""What submitit calls the cluster; `local` is its stand-in for tests."""

_POLL_S = 1.0
_SIGNAL_DELAY_S = 120
_COMMON = ("timeout_min", "mem_gb", "nodes", "cpus_per_task", "gpus_per_node")

IN_WAVES = True


def execute(pending: Sequence[Planned], context: Context) -> None:
    """Submits runs as an array, and waits until each has ended."""
    if CLUSTER == "slurm" and shutil.which("sbatch") is None:
        raise ValueError(
            "executor 'slurm' needs sbatch, which is not on this machine; run it where jobs are submitted."
        )
    imports = [modules_to_import(one) for one in pending]
    for one in pending:
        one.run.prepare(one.config)
    jobs = _submit(pending, imports, context)
    context.say(f"submitted {len(jobs)} jobs, {jobs[0].job_id} to {jobs[-1].job_id}; Ctrl-C cancels them.")
    going, watch, cancelled = dict(zip(pending, jobs, strict=True)), Watch(context.progress), False
    while going:
        if context.stop() and not cancelled:
            cancelled = True
            for job in going.values():
                job.cancel(check=False)
        watch.look(list(going))
        for one, job in [(one, job) for one, job in going.items() if job.done()]:
            del going[one]
            _end(one, job, context, watch)
        time.sleep(_POLL_S if going else 0)
    context.stop.end_run()


def _submit(pending: Sequence[Planned], imports: Sequence[Sequence[str]], context: Context) -> list[Any]:
    """Submits the array, and returns its jobs."""
    submitit = import_module("submitit")

    folder = pending[0].run.path.parent.parent / "slurm"
    executor = submitit.AutoExecutor(folder=folder / "%j", cluster=CLUSTER)
    given = {key if key in _COMMON else f"slurm_{key}": _number(value) for key, value in context.options.items()}
    executor.update_parameters(
        name="precision_lab",
        slurm_array_parallelism=context.jobs or len(pending),
        slurm_additional_parameters={"signal": f"USR1@{_SIGNAL_DELAY_S}", "requeue": True},
        **{"timeout_min": 240, **given},
    )
    before = dict(os.environ)
    os.environ.update(environment())
    try:
        directories = [str(one.run.path.absolute()) for one in pending]
        trackers = [context.trackers] * len(pending)
        return executor.map_array(run_in_job, directories, [one.label for one in pending], imports, trackers)
    finally:
        os.environ.clear()
        os.environ.update(before)


def run_in_job(directory: str, label: str, imports: Sequence[str], trackers: Sequence[str] = ()) -> str:
    """Executes a run inside a job, and puts the job back into the queue if its time is up."""
    from precision_lab.runner.executors.worker import Channel, execute

    try:
        return execute(RunDir(Path(directory)), label, imports, trackers, Channel(sys.stderr), wait=True)
    except Preempted as stopped:
        if stopped.number == signal.SIGUSR1 and "SLURM_JOB_ID" in os.environ:
            subprocess.run(["scontrol", "requeue", _job_id()], check=True, timeout=60)
        raise


def _job_id() -> str:
    """Returns the name of this job for SLURM."""
    array = os.environ.get("SLURM_ARRAY_JOB_ID")
    return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else os.environ["SLURM_JOB_ID"]


def _end(one: Planned, job: Any, context: Context, watch: Watch) -> None:
    """Closes the books on a run, whose directory says how it ended unless its job died."""
    if one.run.status()["state"] in ("queued", "stopped") and not context.stop():
        how = mark_crashed(one, f"its job {job.job_id} ended as {job.state}", Path(job.paths.stderr))
        context.say(f"{one.label} failed: {how}")
    watch.end(one)


def _number(value: str) -> Any:
    """Returns a number for text that is one."""
    return int(value) if value.lstrip("-").isdecimal() else value

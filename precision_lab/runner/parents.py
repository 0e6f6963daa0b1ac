"""Runs that begin where another run ended: where they find it, and what if it has not ended well."""

import time
from collections.abc import Mapping
from typing import Any

from precision_lab.runner.identity import run_id
from precision_lab.runner.rundir import BusyError, RunDir
from precision_lab.runner.starts import start_of
from precision_lab.training import AnyRun

_POLL_S = 1.0


class StartError(Exception):
    """The run that another begins from has no final parameters."""


def parent_of(run: RunDir, config: AnyRun) -> RunDir | None:
    """Returns the directory, beside that of a run, of the run that it begins from."""
    start = start_of(config)
    return None if start is None or start.run is None else RunDir(run.path.parent / run_id(start.run))


def await_parent(run: RunDir, config: AnyRun, *, wait: bool) -> None:
    """Makes sure that no other process, here or elsewhere, is executing the run that a run begins from.

    Raises:
      BusyError: one is, and `wait` is false.
    """
    parent = parent_of(run, config)
    while parent is not None and parent.is_busy():
        if not wait:
            raise BusyError(run.id)
        time.sleep(_POLL_S)


def start_from(run: RunDir, config: AnyRun) -> dict[str, Any]:
    """Returns the argument with which `training.train` finds the final parameters that a run begins from.

    Raises:
      StartError: the run that has them is not done.
    """
    parent = parent_of(run, config)
    if parent is None:
        return {}
    status = parent.status()
    if status["state"] != "done":
        start = start_of(config)
        name = f"arm {start.arm!r}" if start is not None and start.arm else "a run"
        raise StartError(f"it starts from {name}, which {_trouble(status)} ({parent.id}).")
    return {"start_from": parent.checkpoints}


def _trouble(status: Mapping[str, Any]) -> str:
    """Returns what kept a run from its end, in words."""
    if status["state"] == "diverged":
        return f"diverged at step {status.get('step')}"
    if status["state"] == "failed":
        return f"failed: {status.get('error')}"
    return {"queued": "has not run"}.get(status["state"], f"is {status['state']}")

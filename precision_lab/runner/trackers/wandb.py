"""Weights & Biases, offline unless `WANDB_MODE` says otherwise: files in `wandb/` of each run, for `wandb sync`."""

import os
import shutil
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from precision_lab.runner.trackers import Tracked

FOLDER = "wandb"
PROJECT = "precision_lab"


class Wandb:
    """Writes one run of Weights & Biases, under the run's own identity."""

    def __init__(self) -> None:
        self._run: Any = None

    def start(self, run: Tracked) -> None:
        """Begins a run in place of an earlier attempt's; online, where steps only grow, it is taken up instead."""
        mode: Any = os.environ.get("WANDB_MODE", "offline")
        if mode == "offline":
            shutil.rmtree(run.folder / FOLDER, ignore_errors=True)
        wandb = import_module("wandb")
        settings = wandb.Settings(silent=True, console="off", disable_git=True, x_disable_stats=True)
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT), id=run.id, name=run.label, config=dict(run.config),
            dir=str(run.folder), mode=mode, resume=None if mode == "offline" else "allow", reinit="create_new",
            settings=settings,
        )  # fmt: skip

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Logs metrics; several rows of one step become one."""
        self._run.log(dict(metrics), step=step)

    def artifact(self, path: Path) -> None:
        """Keeps a copy of a file."""
        shutil.copy(path, self._run.dir)

    def summary(self, metrics: Mapping[str, float]) -> None:
        """Sets the values that the run's page shows."""
        self._run.summary.update(dict(metrics))

    def finish(self, state: str) -> None:
        """Closes the run; what did not end well has another exit code."""
        self._run.summary.update({"state": state})
        self._run.finish(exit_code=0 if state in ("done", "diverged") else 1)


def make() -> Wandb:
    """Returns a tracker that has not started."""
    return Wandb()

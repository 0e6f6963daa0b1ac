"""TensorBoard, through tensorboardX: event files in `tensorboard/` of each run; `tensorboard --logdir runs/trials`."""

import shutil
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from precision_lab.runner.trackers import Tracked

FOLDER = "tensorboard"


class TensorBoard:
    """Writes event files."""

    def __init__(self) -> None:
        self._writer: Any = None
        self._last = 0

    def start(self, run: Tracked) -> None:
        """Opens a new event file in place of an earlier attempt's."""
        shutil.rmtree(run.folder / FOLDER, ignore_errors=True)
        self._writer = import_module("tensorboardX").SummaryWriter(str(run.folder / FOLDER))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Writes one scalar for each metric."""
        self._last = step
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def artifact(self, path: Path) -> None:
        """Writes a file as text."""
        self._writer.add_text(path.name, f"```\n{path.read_text(encoding='utf-8')}\n```", 0)

    def summary(self, metrics: Mapping[str, float]) -> None:
        """Nothing to add: the last values of the curves are the result."""

    def finish(self, state: str) -> None:
        """Writes the state, and closes the file."""
        self._writer.add_text("state", state, self._last)
        self._writer.close()


def make() -> TensorBoard:
    """Returns a tracker that has not started."""
    return TensorBoard()

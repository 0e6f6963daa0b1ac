"""What executors share whose runs go on in other processes, perhaps on other machines."""

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from precision_lab.runner.environment import registered_modules
from precision_lab.runner.rundir import FINISHED, BusyError
from precision_lab.runner.trial import Planned, Progress

_TAIL_BYTES = 4000


def modules_to_import(one: Planned) -> list[str]:
    """Returns the modules that another process must import before it can execute a run.

    Raises:
      ValueError: the model or the data were registered by the script or notebook itself.
    """
    modules = registered_modules(one.config)
    if "__main__" in modules:
        raise ValueError(
            f"{one.label}: its model or data are registered by the script itself, which another process cannot "
            "import. Move them to a module of their own and name it: --import MODULE, or imports=[...]."
        )
    return modules


def environment() -> dict[str, str]:
    """Returns the environment of a subprocess, which finds the modules that this process finds."""
    path = os.pathsep.join(dict.fromkeys(str(Path(entry).absolute()) for entry in sys.path))
    # Several processes share a GPU, and so no one may take all of its memory.
    return {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", **os.environ, "PYTHONPATH": path}


def ending(code: int) -> str:
    """Returns in words how a process ended."""
    if code >= 0:
        return f"its process ended with exit code {code}"
    names = {one.value: one.name for one in signal.Signals}
    return f"its process was killed by {names.get(-code, f'signal {-code}')}"


def mark_crashed(one: Planned, how: str, output: Path | None = None) -> str:
    """Notes that the process of a run died, the end of its output in the log; returns the reason in one line."""
    try:
        with one.run.claim(one.config, wait=False):
            attempt = int(one.run.status().get("attempt", 0))
            tail = _tail(output)
            one.run.log(attempt).parent.mkdir(exist_ok=True)
            with one.run.log(attempt).open("a", encoding="utf-8") as log:
                log.write(f"{how}; the end of its output:\n{tail}\n")
            last = (tail.strip().splitlines() or [""])[-1].strip()[:200]
            reason = f"{how}; last line: {last}" if last else how
            one.run.stop("failed", attempt=attempt, error=reason)
            return f"{reason} (see {one.run.log(attempt)})"
    except BusyError:  # Another command was quick to take it up again.
        return how


def _tail(path: Path | None) -> str:
    """Returns the end of a file, nothing where there is none."""
    content = path.read_bytes() if path is not None and path.exists() else b""
    return content[-_TAIL_BYTES:].decode(errors="replace")


class Watch:
    """Shows how far runs are, from their directories."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._going: dict[str, int] = {}

    def look(self, runs: Sequence[Planned]) -> None:
        """Passes on what is new."""
        for one in runs:
            run = one.run
            if run.id not in self._going and run.status()["state"] == "running":
                self._going[run.id] = 0
                self._progress.start_run(one.label, one.config.total_steps, run.id)
            step, loss = _last_step(run.path / "metrics.jsonl")
            if run.id in self._going and step > self._going[run.id]:
                self._going[run.id] = step
                self._progress.step(step, loss, run.id)

    def end(self, one: Planned) -> str:
        """Shows that a run has ended, and returns its state."""
        self.look([one])
        state = one.run.status()["state"]
        if self._going.pop(one.run.id, None) is None and state in FINISHED:
            self._progress.start_run(one.label, one.config.total_steps, one.run.id)
        self._progress.end_run(state, one.run.id)
        return state


def _last_step(path: Path) -> tuple[int, float]:
    """Returns the step and the loss of the last row of training metrics, (0, NaN) before there is one."""
    for line in reversed(_tail(path).splitlines()):
        try:
            row = json.loads(line)
        except ValueError:  # Torn, or cut in the middle.
            continue
        if isinstance(row, dict) and row.get("split") == "train":
            return int(row["step"]), float(row["loss"])
    return 0, float("nan")

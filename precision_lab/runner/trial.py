"""One run, from its directory to its result; what every executor calls.

Whatever happens is written in the directory: a result, a crash with its traceback, or that the run was stopped and
where it goes on.
"""

import contextlib
import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from precision_lab.runner.disk import disk_full, is_disk_full
from precision_lab.runner.environment import registered_code
from precision_lab.runner.identity import plain
from precision_lab.runner.parents import await_parent, start_from
from precision_lab.runner.rundir import FINISHED, RunDir
from precision_lab.runner.stopping import Preempted, Stop
from precision_lab.runner.summary import flat
from precision_lab.runner.together import agreed, announce
from precision_lab.runner.trackers import Tracked, TrackedSink
from precision_lab.training import AnyRun, RunConfig


class Progress(Protocol):
    """What `training.progress.RunProgress` offers while runs go on."""

    def start_run(self, label: str, total_steps: int, run: str = "") -> None: ...

    def step(self, step: int, loss: float, run: str = "") -> None: ...

    def end_run(self, status: str, run: str = "") -> None: ...


@dataclass(frozen=True)
class Planned:
    """One run to be made: its directory, and the arms that it serves."""

    label: str
    config: AnyRun
    run: RunDir


def execute_trial(
    run: RunDir,
    *,
    env: Mapping[str, Any],
    progress: Progress,
    label: str,
    say: Callable[[str], None] = print,
    stop: Stop | None = None,
    trackers: Sequence[str] = (),
    wait: bool = False,
) -> str:
    """Executes the run of a prepared directory, or takes it up where it was left, and returns the state it ends in.

    The configuration is read from the directory. A crash is recorded there and not raised.

    Args:
      run: the directory, with its `config.yaml`.
      env: the fingerprint of this machine.
      progress: hears how far the run is.
      label: names the run in messages.
      say: receives one-line messages.
      stop: asks the run to save and end at a step.
      trackers: names of what shows its metrics, see `precision_lab.runner.trackers`.
      wait: whether to wait for another process that executes it.

    Raises:
      BusyError: another process is executing it, or the run that it begins from, and `wait` is false.
      ValueError: the directory holds no valid configuration.
      KeyboardInterrupt, Preempted: the run was stopped, and is marked so.
      DiskFullError: there is no room for results.
    """
    config = run.config()
    stop = stop or Stop()
    await_parent(run, config, wait=wait)
    with run.claim(config, wait=wait):
        state = run.status()["state"]
        if state in FINISHED:  # Another process was faster.
            progress.start_run(label, config.total_steps)
            progress.end_run(state)
            return state
        try:
            attempt = run.start({**env, **registered_code(config)})
        except OSError as error:
            raise (disk_full(run.path.parent) if is_disk_full(error) else error) from None
        progress.start_run(label, config.total_steps)
        try:
            state = _Attempt(run, config, attempt, label, progress, stop, say, tuple(trackers)).execute()
        finally:
            progress.end_run(run.status()["state"])
    stop.end_run()
    return state


@dataclass(frozen=True)
class _Attempt:
    """One attempt at a run, whose directory this process holds."""

    run: RunDir
    config: AnyRun
    number: int
    label: str
    progress: Progress
    stop: Stop
    say: Callable[[str], None]
    trackers: tuple[str, ...]

    def execute(self) -> str:
        """Trains, writes down how that ended, and returns the state."""
        state = "interrupted"
        try:
            state = self._train()
        except Preempted:
            state = "preempted"
            raise
        except Exception as error:
            state = "failed"
            full = disk_full(self.run.path.parent) if is_disk_full(error) else None
            log = _record_crash(self.run, self.number, error, full)
            if full is not None:
                raise full from None
            self.say(f"{self.label} failed: {_last_line(error)} (see {log})")
        finally:
            if state in ("interrupted", "preempted"):
                self.run.stop(state, attempt=self.number, error=None)
        return state

    def _train(self) -> str:
        """Trains, keeps the record and the result, and returns the state."""
        from precision_lab import training

        started, run = time.monotonic(), self.run
        run.checkpoints.mkdir(exist_ok=True)
        begin = start_from(run, self.config)
        announce(run.id)
        with run.beating(), _logging_to(run.log(self.number)), self._sink() as sink:
            result = training.train(
                self.config, checkpoint_dir=run.checkpoints, sink=sink, on_step=self.progress.step,
                should_stop=agreed(self.stop), **begin,
            )  # fmt: skip
            state = self.stop.state if result.status == "stopped" else result.status
            sink.end(state, result.metrics)
        if result.status == "stopped":
            return state
        found: dict[str, Any] = {"step": result.step, "metrics": result.metrics}
        if result.status == "diverged":
            found["last_finite_checkpoint"] = result.last_finite
        if isinstance(self.config, RunConfig) and self.config.train.on_nonfinite == "continue":
            found["first_nonfinite"] = result.first_nonfinite
        if sink.troubles:
            found["trackers"] = sink.troubles
        run.finish(state, duration_s=round(time.monotonic() - started, 3), attempt=self.number, **found)
        return state

    def _sink(self) -> TrackedSink:
        """Returns where rows go."""
        told = Tracked(self.run.id, self.label, self.run.path, flat(plain(self.config)))
        return TrackedSink(self.run.sink(self.number), told, self.trackers)


_logged: set[int] = set()
"""Threads of this process whose run has a log now."""


@contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    """Keeps what libraries log during a run in its log, which exists only if there was something.

    Of runs that go on at once each has the messages of its own thread; those of threads that serve no run in
    particular, such as a library's, are in the logs of all.
    """
    own = threading.get_ident()
    path.parent.mkdir(exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.addFilter(lambda record: record.thread == own or record.thread not in _logged)
    _logged.add(own)
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        _logged.discard(own)
        with contextlib.suppress(OSError):  # What a full disk did not take.
            handler.close()


def _record_crash(run: RunDir, attempt: int, error: Exception, full: Exception | None) -> Path:
    """Notes the failure of a run, its traceback in the log as far as there is room."""
    log = run.log(attempt)
    with contextlib.suppress(OSError):
        log.parent.mkdir(exist_ok=True)
        with log.open("a", encoding="utf-8") as file:
            file.write("".join(traceback.format_exception(error)))
    run.stop("failed", attempt=attempt, error=_last_line(full or error))
    return log


def _last_line(error: Exception) -> str:
    """Returns an error as one line of readable length."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else text[:297] + "..."

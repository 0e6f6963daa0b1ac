"""Trackers: programs that show the metrics of runs, beside `metrics.jsonl`, which stays the record.

Each has its own file. A tracker is started anew with every attempt and given the rows that the record has kept, so that
it shows each step once, however often the run was stopped. One that fails is left out from then on; it never stops a
run, and what went wrong is in the log and in the summary.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from precision_lab.runner.metrics import JsonlSink, read_rows

TRACKERS = {"tensorboard": "tensorboardX", "wandb": "wandb", "mlflow": "mlflow"}
"""By name, the package that it needs."""

_LABELS = ("step", "split", "attempt")
_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Tracked:
    """What a tracker is told about a run.

    Attributes:
      id: the run's identity, its name everywhere.
      label: its arm and seed.
      folder: the run's directory.
      config: its configuration by dotted key.
    """

    id: str
    label: str
    folder: Path
    config: Mapping[str, Any]


class Tracker(Protocol):
    """Where metrics go; any method may raise."""

    def start(self, run: Tracked) -> None:
        """Begins to show a run; what an earlier attempt has left of it is dropped."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Shows metrics, by `split/metric`, of a step; steps never decrease."""

    def artifact(self, path: Path) -> None:
        """Keeps a file of the run."""

    def summary(self, metrics: Mapping[str, float]) -> None:
        """Shows what the run ended with."""

    def finish(self, state: str) -> None:
        """Ends, with the state of the run."""


def refuse_unknown(names: Sequence[str]) -> None:
    """Raises ValueError for a tracker that there is not, or whose package is not installed."""
    for name in names:
        if name not in TRACKERS:
            near = get_close_matches(name, TRACKERS, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(TRACKERS)}."
            raise ValueError(f"no tracker {name!r}{hint}")
        if find_spec(TRACKERS[name]) is None:
            raise ValueError(f"tracker {name!r} needs {TRACKERS[name]}: pip install 'precision-lab[{name}]'.")


def make(name: str) -> Tracker:
    """Returns a tracker that has not started."""
    return import_module(f"{__name__}.{name}").make()


class TrackedSink:
    """A sink that keeps rows in the record first, and then shows them to trackers; use as a context manager.

    Attributes:
      troubles: by tracker, what went wrong with it.
    """

    def __init__(
        self, sink: JsonlSink, run: Tracked, names: Sequence[str], make: Callable[[str], Tracker] = make
    ) -> None:
        """Names the trackers; they start with the first row."""
        self._sink = sink
        self._run = run
        self._make = make
        self._names = list(names)
        self._going: dict[str, Tracker] = {}
        self.troubles: dict[str, str] = {}

    def restart(self, step: int) -> None:
        """Drops rows past `step`, and starts the trackers with those that are left."""
        self._sink.restart(step)
        kept = read_rows(self._sink.path) if self._names else []
        for name in self._names:
            self._try(name, lambda name=name: self._start(name, kept))

    def write(self, row: Mapping[str, object]) -> None:
        """Keeps a row, and shows it."""
        self._sink.write(row)
        self._each(lambda tracker: _show(tracker, row))

    def end(self, state: str, metrics: Mapping[str, float]) -> None:
        """Tells the trackers how the run ended."""
        if metrics:
            self._each(lambda tracker: tracker.summary(metrics))
        self._each(lambda tracker: tracker.finish(state))
        self._going.clear()

    def __enter__(self) -> "TrackedSink":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Whoever ended it properly has told the trackers already.
        self.end("failed" if kind is not None and issubclass(kind, Exception) else "stopped", {})
        self._sink.close()

    def _start(self, name: str, kept: Sequence[Mapping[str, Any]]) -> None:
        """Starts a tracker, and shows it what there is."""
        tracker = self._make(name)
        tracker.start(self._run)
        tracker.artifact(self._run.folder / "config.yaml")
        for row in kept:
            _show(tracker, row)
        self._going[name] = tracker

    def _each(self, call: Callable[[Tracker], None]) -> None:
        """Calls every tracker that works."""
        for name, tracker in list(self._going.items()):
            self._try(name, lambda tracker=tracker: call(tracker))

    def _try(self, name: str, call: Callable[[], None]) -> None:
        """Calls a tracker, and leaves it out from now on if it fails."""
        try:
            call()
        except Exception as error:
            self._going.pop(name, None)
            self.troubles[name] = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            _LOG.warning("tracker %s failed and is left out from now on", name, exc_info=error)


def _show(tracker: Tracker, row: Mapping[str, Any]) -> None:
    """Shows one row of the record."""
    metrics = {f"{row['split']}/{key}": float(value) for key, value in row.items() if key not in _LABELS}
    tracker.log(int(row["step"]), metrics)

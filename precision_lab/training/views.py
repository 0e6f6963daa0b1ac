"""Three ways of showing how far a run is.

The estimate of the remaining time counts from the first finished step, because what comes before it is compilation.
"""

import math
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

_LINE_EVERY_S = 30.0
_LINE_EVERY_SHARE = 0.1
_LINE_LEAST_S = 1.0
_BAR_EVERY_S = 0.1
_CELL_EVERY_S = 0.5
_CELL_ENDED = 20


class Clock:
    """How far one run is, and how long the rest may take.

    `now` is a function so that tests need not wait.
    """

    def __init__(self, label: str, total_steps: int, now: Callable[[], float] = time.monotonic) -> None:
        """Starts before the first step."""
        self.label = label
        self.total = total_steps
        self.done = 0
        self.loss = math.nan
        self._now = now
        self._begun = now()
        self._first: tuple[float, int] | None = None

    def step(self, step: int, loss: float) -> None:
        """Notes that `step` is done; the first one noted ends compilation (or a resumed run's restoring)."""
        self.done, self.loss = step, loss
        if self._first is None:
            self._first = (self._now(), step)

    def elapsed_s(self) -> float:
        """Returns the seconds since the run began."""
        return self._now() - self._begun

    def rate(self) -> float | None:
        """Returns steps per second since the first one, or None if there is nothing to tell it from."""
        if self._first is None or self.done <= self._first[1]:
            return None
        return (self.done - self._first[1]) / max(self._now() - self._first[0], 1e-9)

    def eta_s(self) -> float | None:
        """Returns the seconds that the remaining steps will take at this rate, or None."""
        rate = self.rate()
        return None if rate is None else (self.total - self.done) / rate

    def __str__(self) -> str:
        eta = self.eta_s()
        share = 100 * self.done // max(self.total, 1)
        rest = "compiling" if self._first is None else "" if eta is None else f"{_duration(eta)} left"
        loss = "" if math.isnan(self.loss) and self.done < self.total else f"loss {self.loss:.4g}"
        parts = [f"step {self.done}/{self.total}", f"{share} %", loss, rest]
        return f"{self.label}: " + ", ".join(part for part in parts if part)


class View(Protocol):
    """One way of showing progress."""

    def open(self, total_runs: int) -> None: ...
    def start(self, clock: Clock, finished: int, total_runs: int) -> None: ...
    def update(self, clock: Clock) -> None: ...
    def end(self, clock: Clock, status: str, finished: int, total_runs: int) -> None: ...
    def close(self) -> None: ...


class LinesView:
    """Plain lines without control characters: one per tenth of a run or half a minute, and one at its end.

    Of what takes no more than a second nothing is told but its beginning and its end.
    """

    def __init__(self, write: Callable[[str], None] | None = None, now: Callable[[], float] = time.monotonic) -> None:
        """Writes to `write`, by default lines to standard error."""
        self._write = write or (lambda line: print(line, file=sys.stderr, flush=True))
        self._now = now
        self._next: dict[Clock, tuple[float, float, float]] = {}

    def open(self, total_runs: int) -> None:
        """Nothing to open."""

    def start(self, clock: Clock, finished: int, total_runs: int) -> None:
        """Announces the run."""
        self._write(f"[{finished + 1}/{total_runs}] {clock.label}: {clock.total} steps (compiling first)")
        self._set_next(clock)

    def update(self, clock: Clock) -> None:
        """Writes a line if one is due; the last step is left to `end`."""
        next_step, soonest, latest = self._next[clock]
        now = self._now()
        if ((clock.done >= next_step and now >= soonest) or now >= latest) and clock.done < clock.total:
            self._write(f"  {clock}")
            self._set_next(clock)

    def end(self, clock: Clock, status: str, finished: int, total_runs: int) -> None:
        """Writes how the run ended."""
        # A run that diverged shows its NaN; one that was interrupted before its first row has no loss yet.
        loss = "" if math.isnan(clock.loss) and status != "diverged" else f", loss {clock.loss:.4g}"
        self._write(f"[{finished}/{total_runs}] {clock.label}: {status}{loss}, {_duration(clock.elapsed_s())}")

    def close(self) -> None:
        """Nothing to close."""

    def _set_next(self, clock: Clock) -> None:
        share, now = _LINE_EVERY_SHARE * clock.total, self._now()
        next_step = (clock.done // max(share, 1e-9) + 1) * share
        self._next[clock] = next_step, now + _LINE_LEAST_S, now + _LINE_EVERY_S


class BarsView:
    """Bars on a terminal: the runs, and the steps of each that goes on."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        """Makes the bars; they are shown from `open` on."""
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn

        self._bars = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[note]}"),
            console=Console(stderr=True, highlight=False),
            transient=True,
        )
        self._now = now
        self._next_time: dict[Clock, float] = {}
        self._runs = None
        self._steps: dict[Clock, Any] = {}

    def open(self, total_runs: int) -> None:
        """Shows the bar of the runs."""
        self._bars.start()
        if total_runs > 1:
            self._runs = self._bars.add_task("runs", total=total_runs, note=f"0/{total_runs}")

    def start(self, clock: Clock, finished: int, total_runs: int) -> None:
        """Shows the bar of the steps, pulsing until the first one is done."""
        self._steps[clock] = self._bars.add_task(_escaped(clock.label), total=None, note="compiling")

    def update(self, clock: Clock) -> None:
        """Moves the bar, ten times a second at most: a step may take less time than drawing it."""
        if clock in self._steps and self._now() >= self._next_time.get(clock, 0.0):
            self._next_time[clock] = self._now() + _BAR_EVERY_S
            note = str(clock).removeprefix(f"{clock.label}: ")
            self._bars.update(self._steps[clock], total=clock.total, completed=clock.done, note=_escaped(note))

    def end(self, clock: Clock, status: str, finished: int, total_runs: int) -> None:
        """Takes the bar of the steps away and moves that of the runs."""
        if clock in self._steps:
            self._bars.remove_task(self._steps.pop(clock))
        if self._runs is not None:
            self._bars.update(self._runs, completed=finished, note=f"{finished}/{total_runs}")
        self._bars.console.print(f"{_escaped(clock.label)}: {status}, {_duration(clock.elapsed_s())}")

    def close(self) -> None:
        """Takes the bars away."""
        self._bars.stop()


class CellView:
    """One output of a Jupyter cell, rewritten in place."""

    def __init__(self, display: Any = None, now: Callable[[], float] = time.monotonic) -> None:
        """Shows through `display`, by default IPython's."""
        if display is None:
            from IPython.display import display  # pyright: ignore[reportMissingImports]  # there is one in Jupyter
        self._display = display
        self._now = now
        self._handle = None
        self._ended: list[str] = []
        self._going: dict[Clock, str] = {}
        self._next_time = 0.0

    def open(self, total_runs: int) -> None:
        """Makes the output."""
        self._handle = self._display(_Text(""), display_id=True)

    def start(self, clock: Clock, finished: int, total_runs: int) -> None:
        """Shows the run."""
        self._show(clock, f"[{finished + 1}/{total_runs}] {clock}")

    def update(self, clock: Clock) -> None:
        """Shows the run again, twice a second at most."""
        if self._now() >= self._next_time:
            self._next_time = self._now() + _CELL_EVERY_S
            self._show(clock, str(clock))

    def end(self, clock: Clock, status: str, finished: int, total_runs: int) -> None:
        """Keeps one line of the run, until twenty others have ended."""
        self._ended.append(f"[{finished}/{total_runs}] {clock.label}: {status}, {_duration(clock.elapsed_s())}")
        del self._ended[:-_CELL_ENDED]
        self._going.pop(clock, None)
        self._draw()

    def close(self) -> None:
        """Leaves what is shown."""

    def _show(self, clock: Clock, line: str) -> None:
        self._going[clock] = line
        self._draw()

    def _draw(self) -> None:
        if self._handle is not None:
            self._handle.update(_Text("\n".join([*self._ended, *self._going.values()])))


class _Text:
    """What a cell shows: text as it is, without the quotes that Jupyter puts around a string."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


def _escaped(text: str) -> str:
    """Returns text that rich shows as it is."""
    from rich.markup import escape

    return escape(text)


def _duration(seconds: float) -> str:
    """Returns a duration in at most two units, such as "42 s", "3 min 5 s" or "2 h 10 min"."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"

"""When each step was reached: seconds of training so far, kept beside the record, which must not depend on time.

`clock.txt` has a line `step seconds` for each step that was logged. A run that is taken up again counts on from the
step that it goes on from, so the time it was not running does not count.
"""

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

FILE = "clock.txt"


def read_clock(run: Path) -> dict[int, float]:
    """Returns the seconds by step, empty where none were kept; lines that are torn are passed over."""
    found: dict[int, float] = {}
    with contextlib.suppress(OSError):
        for line in (run / FILE).read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):
                step, seconds = line.split()
                found[int(step)] = float(seconds)
    return found


class StepClock:
    """Notes when steps are reached. A disk that takes no more is no reason to stop: what is missing is not drawn."""

    def __init__(self, run: Path, now: Callable[[], float] = time.monotonic) -> None:
        """Starts to count."""
        self._run = run
        self._now = now
        self._begun = now()
        self._before = 0.0
        self._last: int | None = None

    def restart(self, step: int) -> None:
        """Drops what was noted past `step`, and counts on from there."""
        kept = {at: seconds for at, seconds in read_clock(self._run).items() if at <= step}
        self._before = max(kept.values(), default=0.0)
        lines = "".join(f"{at} {seconds:.3f}\n" for at, seconds in sorted(kept.items()))
        with contextlib.suppress(OSError):
            (self._run / FILE).write_text(lines, encoding="utf-8")

    def note(self, step: int) -> None:
        """Notes that a step is reached, once."""
        if step == self._last:
            return
        self._last = step
        with contextlib.suppress(OSError), (self._run / FILE).open("a", encoding="utf-8") as file:
            file.write(f"{step} {self._before + self._now() - self._begun:.3f}\n")

"""Progress of runs: bars on a terminal, one live cell in Jupyter, plain lines elsewhere."""

import sys

from precision_lab.training.views import BarsView, CellView, Clock, LinesView, View

_SHOWN_AT_ONCE = 8


class RunProgress:
    """Shows runs, one after another or several at once, out of `total_runs`; use as a context manager.

    Runs that go on at once are told apart by `run`, any text; one after another they need none. Of more than eight at
    once the steps of eight are shown, and of the others that they ended.
    """

    def __init__(self, total_runs: int = 1, *, view: View | None = None) -> None:
        """Chooses how to show it by where it runs, unless `view` is given."""
        self._total_runs = total_runs
        self._finished = 0
        self._view = view or _choose_view()
        self._clocks: dict[str, Clock] = {}
        self._shown: set[Clock] = set()

    def start_run(self, label: str, total_steps: int, run: str = "") -> None:
        """Begins a run; its label is shown."""
        self._clocks[run] = clock = Clock(label, total_steps)
        if len(self._shown) < _SHOWN_AT_ONCE:
            self._shown.add(clock)
            self._view.start(clock, self._finished + len(self._clocks) - 1, self._total_runs)

    def step(self, step: int, loss: float, run: str = "") -> None:
        """Notes that a step of a run is done; what `train` calls `on_step`."""
        if run in self._clocks:
            self._clocks[run].step(step, loss)
            if self._clocks[run] in self._shown:
                self._view.update(self._clocks[run])

    def end_run(self, status: str, run: str = "") -> None:
        """Ends a run with its status, such as "done" or "diverged"."""
        clock = self._clocks.pop(run, None)
        if clock is not None:
            self._finished += 1
            self._shown.discard(clock)
            self._view.end(clock, status, self._finished, self._total_runs)

    def __enter__(self) -> "RunProgress":
        self._view.open(self._total_runs)
        return self

    def __exit__(self, *_: object) -> None:
        self._view.close()


def _choose_view() -> View:
    """Returns the view for where this runs."""
    if _in_jupyter():
        return CellView()
    return BarsView() if sys.stderr.isatty() else LinesView()


def _in_jupyter() -> bool:
    """Returns whether a Jupyter kernel runs this; a shell of IPython is a terminal."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return type(shell).__name__ == "ZMQInteractiveShell"

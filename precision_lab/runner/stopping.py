"""Signals that ask a command to stop: the run in progress saves at its next step, so that nothing is lost.

SIGTERM and SIGUSR1 come from a machine that is needed for something else (a scheduler, a container, a shutdown):
exit code 75, which schedulers read as "try again". SIGINT is Ctrl-C; a second one does not wait for the step.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

PREEMPTED_EXIT_CODE = 75
"""EX_TEMPFAIL of sysexits.h: the same command continues."""

_SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))


class Preempted(SystemExit):
    """The process was asked to make room; as an exit, so that a script that does not catch it ends with code 75."""

    def __init__(self, number: int = signal.SIGTERM) -> None:
        """Names the signal that asked for it."""
        super().__init__(PREEMPTED_EXIT_CODE)
        self.number = number


class Stop:
    """Whether to stop at the next step; what `training.train` calls `should_stop`.

    A request waits only while a run is between its steps: before the first one there is nothing to save, so it
    takes effect at once.
    """

    def __init__(self) -> None:
        self.error: BaseException | None = None
        self._saves = False

    def __call__(self) -> bool:
        """Returns whether to stop; from now on a request waits for the next call."""
        self._saves = True
        return self.error is not None

    @property
    def state(self) -> str:
        """What a run is that was stopped: `interrupted` by a person, else `preempted`."""
        return "interrupted" if isinstance(self.error, KeyboardInterrupt) else "preempted"

    def end_run(self) -> None:
        """Raises what was requested, if anything was; from now on a request takes effect at once."""
        self._saves = False
        if self.error is not None:
            raise self.error

    def request(self, error: BaseException, *, now: bool = False) -> None:
        """Stops at the next step, or raises `error` at once if no run would save, or `now`."""
        if now or not self._saves:
            raise error
        self.error = self.error or error

    def handle(self, number: int, frame: Any) -> None:
        """What `signal.signal` wants."""
        if number != signal.SIGINT:
            self.request(Preempted(number))
            return
        again = self.error is not None
        self.request(KeyboardInterrupt(), now=again)
        # Not print: the handler may run in the middle of another print.
        os.write(2, b"\nsaving after this step; Ctrl-C again stops at once.\n")


@contextmanager
def stop_on_signals() -> Iterator[Stop]:
    """Gives a `Stop` that signals request while the context lasts; outside the main thread they stay as they are."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.signal(number, stop.handle) for number in _SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

"""A process that executes one run and tells how far it is: `python -m precision_lab.runner.executors.worker DIR LABEL`.

It writes lines of JSON to its standard output, one message each; whatever else the run prints goes to the error
output. When its standard input ends, the process that started it is gone, and it saves and stops.
"""

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from precision_lab.runner.disk import DiskFullError
from precision_lab.runner.loading import import_module_of_user
from precision_lab.runner.rundir import BusyError, RunDir
from precision_lab.runner.stopping import stop_on_signals

_EVERY_S = 0.1


class Channel:
    """Sends messages to the process that started this one; stands for its progress and for what it says."""

    def __init__(self, file: TextIO) -> None:
        self._file = file
        self._next_s = 0.0

    def send(self, **message: Any) -> None:
        """Sends one message; if nobody listens any more, that is noticed elsewhere."""
        try:
            self._file.write(json.dumps(message) + "\n")
            self._file.flush()
        except OSError:
            pass

    def start_run(self, label: str, total_steps: int, run: str = "") -> None:
        """Tells that the run begins."""
        self.send(kind="start", total=total_steps)

    def step(self, step: int, loss: float, run: str = "") -> None:
        """Tells how far the run is, ten times a second at most."""
        if time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + _EVERY_S
            self.send(kind="step", step=step, loss=loss)

    def end_run(self, status: str, run: str = "") -> None:
        """Nothing to tell: the state is in the run's directory."""

    def say(self, line: str) -> None:
        """Passes a message on."""
        self.send(kind="say", line=line)


def execute(
    run: RunDir, label: str, imports: Sequence[str], trackers: Sequence[str], channel: Channel, *, wait: bool
) -> str:
    """Executes a run in this process, with signals heard, and returns the state it ends in."""
    with stop_on_signals() as stop:
        for module in imports:
            import_module_of_user(module)
        from precision_lab.runner.environment import fingerprint
        from precision_lab.runner.trial import execute_trial

        return execute_trial(
            run, env=fingerprint(), progress=channel, label=label, say=channel.say, stop=stop, trackers=trackers,
            wait=wait,
        )  # fmt: skip


def main(args: Sequence[str] | None = None) -> None:
    """Executes the run that the arguments name, and exits with 0 if its directory says how it ended."""
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    parser.add_argument("label")
    parser.add_argument("--import", dest="imports", action="append", default=[])
    parser.add_argument("--tracker", dest="trackers", action="append", default=[])
    parser.add_argument("--wait", action="store_true")
    options = parser.parse_args(args)
    channel = Channel(os.fdopen(os.dup(1), "w"))
    os.dup2(2, 1)
    threading.Thread(target=_stop_when_alone, daemon=True).start()
    try:
        run = RunDir(options.directory)
        execute(run, options.label, options.imports, options.trackers, channel, wait=options.wait)
    except BusyError:
        channel.send(kind="busy")
    except DiskFullError as error:
        channel.send(kind="full", line=str(error))
    except KeyboardInterrupt:
        sys.exit(130)


def _stop_when_alone() -> None:
    """Asks this process to save and stop once its standard input ends."""
    while os.read(0, 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()

"""One subprocess for each run, several at once: a run that takes its process down takes nothing else with it.

Subprocesses are started anew, never forked, since JAX has threads. Their progress is shown here. A run whose process
dies is marked failed, with the end of its output in its log.
"""

import json
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from precision_lab.runner.disk import DiskFullError
from precision_lab.runner.environment import cores
from precision_lab.runner.executors import Context
from precision_lab.runner.executors.remote import ending, environment, mark_crashed, modules_to_import
from precision_lab.runner.order import Order
from precision_lab.runner.rundir import RunDir
from precision_lab.runner.trial import Planned

_WORKER = "precision_lab.runner.executors.worker"
_POLL_S = 0.2


@dataclass
class Child:
    """A subprocess and the run it executes."""

    one: Planned
    process: subprocess.Popen
    busy: bool = False
    said: bool = False
    messages: list[dict[str, Any]] = field(default_factory=list)

    @property
    def output(self) -> Path:
        """Where its error output goes."""
        return _output(self.one.run)


IN_WAVES = False


def execute(pending: Sequence[Planned], context: Context) -> None:
    """Executes runs in subprocesses, `jobs` at once; those that other commands hold come last, and are waited for."""
    _Pool(context).go(pending)


class _Pool:
    """The subprocesses of one call."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._jobs = context.jobs or max(1, cores() // 2)
        self._inbox: queue.Queue[tuple[Child, dict[str, Any] | None]] = queue.Queue()
        self._children: list[Child] = []
        self._full = ""

    def go(self, pending: Sequence[Planned]) -> None:
        """Executes all runs."""
        order = Order(pending)
        try:
            while order:
                while len(self._children) < self._jobs and not self._ends() and (found := order.take()):
                    self._children.append(self._start(found[0], wait=found[1]))
                if self._ends() and not self._children:
                    break
                self._listen(order)
        finally:
            for child in self._children:  # Only if something was raised here.
                child.process.kill()
                child.process.wait()
        self._context.stop.end_run()
        if self._full:
            raise DiskFullError(self._full)

    def _ends(self) -> bool:
        """Returns whether no more runs are to be started; asks those that go on to save and stop."""
        if not self._context.stop():
            return bool(self._full)
        for child in self._children:
            if not child.said:
                child.said = True
                number = signal.SIGINT if self._context.stop.state == "interrupted" else signal.SIGTERM
                child.process.send_signal(number)
        return True

    def _start(self, one: Planned, *, wait: bool) -> Child:
        """Starts the subprocess of a run."""
        one.run.prepare(one.config)
        path = _output(one.run)
        path.parent.mkdir(exist_ok=True)
        words = [str(one.run.path), one.label, *(["--wait"] if wait else [])]
        words += [word for module in modules_to_import(one) for word in ("--import", module)]
        words += [word for name in self._context.trackers for word in ("--tracker", name)]
        with path.open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", _WORKER, *words],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=output, env=environment(),
                process_group=0,  # Ctrl-C is for this process, which passes it on.
            )  # fmt: skip
        child = Child(one, process)
        threading.Thread(target=self._read, args=(child,), daemon=True).start()
        return child

    def _read(self, child: Child) -> None:
        """Puts what a subprocess tells into the inbox, and None when it has ended; runs in a thread."""
        assert child.process.stdout is not None
        for line in child.process.stdout:
            self._inbox.put((child, json.loads(line)))
        child.process.wait()
        self._inbox.put((child, None))

    def _listen(self, order: Order) -> None:
        """Handles the next message, if one comes soon."""
        try:
            child, message = self._inbox.get(timeout=_POLL_S)
        except queue.Empty:
            return
        if message is not None:
            self._handle(child, message)
            return
        self._children.remove(child)
        if child.busy:
            order.held(child.one)
        else:
            self._end(child)
            order.ended(child.one)

    def _handle(self, child: Child, message: dict[str, Any]) -> None:
        """Does what a message asks for."""
        progress, run = self._context.progress, child.one.run.id
        match message["kind"]:
            case "start":
                progress.start_run(child.one.label, message["total"], run)
            case "step":
                progress.step(message["step"], message["loss"], run)
            case "say":
                self._context.say(message["line"])
            case "busy":
                child.busy = True
            case "full":
                self._full = message["line"]

    def _end(self, child: Child) -> None:
        """Closes the books on a run: whatever its process did, its directory says how it ended."""
        run, code = child.one.run, child.process.returncode
        asked = child.said or code == 0 or self._full
        if not asked and run.status()["state"] in ("queued", "stopped"):
            self._context.say(f"{child.one.label} failed: {mark_crashed(child.one, ending(code), child.output)}")
        self._context.progress.end_run(run.status()["state"], run.id)
        if child.output.exists() and child.output.stat().st_size == 0:
            child.output.unlink()


def _output(run: RunDir) -> Path:
    """Returns where the error output of a run's process goes."""
    return run.path / "logs" / "process.log"

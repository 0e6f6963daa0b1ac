"""Run directories: one folder per run, named by the run's identity.

    runs/trials/<run_id>/   config.yaml env.json status.json metrics.jsonl checkpoints/ logs/ summary.json

`config.yaml` is written before anything else, and the identity it describes never changes; `metrics.jsonl` is the
record; everything is replaced atomically, so a kill at any moment leaves a directory that the same command continues
from.
"""

import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from precision_lab.runner import heartbeat
from precision_lab.runner.atomic import TEMPORARY, json_text, overwrite, read_json, write_json, write_text
from precision_lab.runner.disk import is_disk_full
from precision_lab.runner.identity import plain, run_id
from precision_lab.runner.metrics import JsonlSink, Series, decode_number, encode_number, read_rows, series
from precision_lab.runner.resolve import validate_run
from precision_lab.runner.yaml12 import dump, parse_file
from precision_lab.training import AnyRun

TRIALS = "trials"
FINISHED = frozenset({"done", "diverged"})
"""States that the same configuration would reach again; a failed or interrupted run is taken up once more."""

_POLL_S = 5.0

_GLANCE_S = 0.3
"""How long a lock is tried for: whoever reads the status of a run holds it for a moment."""


class BusyError(Exception):
    """Another process is executing the run."""


class RunDir:
    """The files of one run. Reading never changes anything; `claim` is what allows writing."""

    def __init__(self, path: Path) -> None:
        """Names a run directory, which need not exist."""
        self.path = Path(path)

    @property
    def id(self) -> str:
        return self.path.name

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    def exists(self) -> bool:
        """Returns whether a run was ever prepared here."""
        return (self.path / "config.yaml").exists()

    def config(self) -> AnyRun:
        """Returns the configuration the run was made with.

        Raises:
          ValueError: the file is missing, or is not a valid configuration any more.
        """
        path = self.path / "config.yaml"
        if not path.exists():
            raise ValueError(f"{self.path} is not a run directory: it has no config.yaml.")
        data, places = parse_file(path)
        return validate_run(data, places, source=str(path))

    def status(self) -> dict[str, Any]:
        """Returns `status.json`, with state `queued` where there is none and `stopped` where its process is gone.

        Of a run of another machine that is told by the clocks of both: good enough to look at, not to take it up.
        """
        status = self._read_status()
        if status["state"] == "running" and not self.is_locked():
            noted = status.get("heartbeat_unix_s", status.get("unix_s", 0.0))
            recent = time.time() - noted < heartbeat.GONE_AFTER_S
            status["state"] = "running" if self._runs_elsewhere() and recent else "stopped"
        return status

    def _read_status(self) -> dict[str, Any]:
        """Returns `status.json` as it is."""
        path = self.path / "status.json"
        return read_json(path) if path.exists() else {"state": "queued", "attempt": 0}

    def is_busy(self) -> bool:
        """Returns whether some process, here or on another machine, is executing the run now."""
        return self.is_locked() or self._runs_elsewhere()

    def held_by(self) -> str:
        """Returns in words who executes a run that is busy."""
        if self.is_locked():
            return "which another process is running"
        host = self._read_status().get("host")
        return (
            f"which {host} may be running: it is taken up once nothing is heard of it for {heartbeat.GONE_AFTER_S:g} s"
        )

    def _runs_elsewhere(self) -> bool:
        """Returns whether another machine noted that it executes the run, unless that note has stayed the same."""
        status = self._read_status()
        if status["state"] != "running" or status.get("host") in (None, socket.gethostname()):
            return False
        note = tuple(status.get(key) for key in ("host", "pid", "attempt", "unix_s", "heartbeat_unix_s"))
        return heartbeat.unchanged_s(self.path.absolute(), note) < heartbeat.GONE_AFTER_S

    def env(self) -> dict[str, Any]:
        """Returns the fingerprint of the machine that made the last attempt, empty before the first."""
        return (self.envs() or [{}])[-1]

    def envs(self) -> list[dict[str, Any]]:
        """Returns the different fingerprints of all attempts, that of the last one last."""
        path = self.path / "env.json"
        if not path.exists():
            return []
        latest = read_json(path)
        return [*latest.pop("earlier", []), latest]

    def summary(self) -> dict[str, Any]:
        """Returns `summary.json`, empty for an unfinished run."""
        path = self.path / "summary.json"
        summary = read_json(path) if path.exists() else {}
        if "metrics" in summary:
            summary["metrics"] = {key: decode_number(value) for key, value in summary["metrics"].items()}
        return summary

    def rows(self) -> list[dict[str, Any]]:
        """Returns the rows of `metrics.jsonl`."""
        return read_rows(self.path / "metrics.jsonl")

    def series(self) -> dict[str, Series]:
        """Returns every logged metric by its name, `split/metric`."""
        return series(self.rows())

    def log(self, attempt: int) -> Path:
        """Returns where an attempt keeps its log, written only if there is something to say."""
        return self.path / "logs" / f"attempt-{attempt}.log"

    def is_locked(self) -> bool:
        """Returns whether some process of this machine holds the run now."""
        lock = self.path / "lock"
        if not lock.exists():
            return False
        try:
            with FileLock(lock, timeout=0):
                return False
        except Timeout:
            return True
        except OSError:  # A results folder that may only be read: whoever runs there cannot be told from here.
            return False

    def refuse_other(self, config: AnyRun) -> None:
        """Raises ValueError if the directory holds something else than a run of `config`; changes nothing."""
        if not self.path.exists():
            return
        if not self.exists():
            # The lock, and a part of the configuration, may be all that an earlier process had time to write.
            if any(item.name != "lock" and not item.match(TEMPORARY) for item in self.path.iterdir()):
                raise ValueError(f"{self.path} is not a run directory, and not empty. Choose another --out.")
            return
        found = run_id(self.config())
        if found != run_id(config):
            raise ValueError(
                f"{self.path} holds a run of another configuration ({found}); its config.yaml was changed or the "
                f"folder renamed. Move it away or choose another --out."
            )

    def prepare(self, config: AnyRun) -> None:
        """Makes the directory of a run, so that its configuration can be read from it.

        What is no part of the run's identity, such as how often to save, is as `config` says from now on.

        Raises:
          ValueError: the directory belongs to another configuration.
        """
        self.refuse_other(config)
        if not self.exists() or self.config() != config:
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.path / "config.yaml", config_text(config))

    @contextmanager
    def claim(self, config: AnyRun, *, wait: bool) -> Iterator[None]:
        """Holds the run for this process, and prepares the directory on first use.

        Raises:
          BusyError: another process holds it, and `wait` is false.
          ValueError: the directory belongs to another configuration.
        """
        self.refuse_other(config)
        self.path.mkdir(parents=True, exist_ok=True)
        lock = self._lock(wait)
        try:
            self.prepare(config)  # Whoever held the lock until now may have written.
            yield
        finally:
            lock.release()

    def _lock(self, wait: bool) -> FileLock:
        """Returns the lock, held, once no other machine executes the run either."""
        lock = FileLock(self.path / "lock", timeout=-1 if wait else _GLANCE_S)
        while True:
            try:
                lock.acquire()
            except Timeout:
                raise BusyError(self.id) from None
            if not self._runs_elsewhere():
                return lock
            lock.release()
            if not wait:
                raise BusyError(self.id)
            time.sleep(_POLL_S)

    @contextmanager
    def beating(self) -> Iterator[None]:
        """Notes from time to time, while the context lasts, that the run goes on."""
        over = threading.Event()
        thread = threading.Thread(target=self._beat, args=(over,), name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _beat(self, over: threading.Event) -> None:
        """Renews the heartbeat until it is over."""
        while not over.wait(heartbeat.HEARTBEAT_S):
            try:
                self._write_status(**{**self._read_status(), "heartbeat_unix_s": round(time.time(), 3)})
            except OSError:  # A full disk, or a file server that is away: the run itself will say so.
                continue

    def start(self, env: Mapping[str, Any]) -> int:
        """Notes that an attempt begins, and returns its number, from 1."""
        attempt = int(self.status().get("attempt", 0)) + 1
        earlier = [one for one in self.envs() if one != dict(env)]
        write_json(self.path / "env.json", {**env, **({"earlier": earlier} if earlier else {})})
        self._write_status(state="running", attempt=attempt, pid=os.getpid(), host=socket.gethostname(), error=None)
        return attempt

    def sink(self, attempt: int) -> JsonlSink:
        """Opens the record for appending."""
        return JsonlSink(self.path / "metrics.jsonl", attempt)

    def finish(
        self, state: str, *, step: int, metrics: Mapping[str, float], duration_s: float, attempt: int, **more: Any
    ) -> None:
        """Notes the result: the summary first, the state last, so that a finished run always has both."""
        encoded = {key: encode_number(value) for key, value in metrics.items()}
        summary = {"run_id": self.id, "state": state, "step": step, "attempt": attempt, "duration_s": duration_s}
        write_json(self.path / "summary.json", {**summary, **more, "metrics": encoded})
        self._write_status(state=state, attempt=attempt, step=step, error=None)

    def stop(self, state: str, *, attempt: int, error: str | None) -> None:
        """Notes that an attempt ended without a result."""
        self._write_status(state=state, attempt=attempt, error=error)

    def _write_status(self, **status: Any) -> None:
        """Replaces `status.json`; on a full disk, where a file that is there may still be written over, does that."""
        path, value = self.path / "status.json", {"unix_s": round(time.time(), 3), **status}
        try:
            write_json(path, value)
        except OSError as error:
            if not (is_disk_full(error) and path.exists()):
                raise
            overwrite(path, json_text(value))


def config_text(config: AnyRun) -> str:
    """Returns the resolved configuration as YAML, defaults included."""
    return dump(plain(config))


def run_dir(root: Path, config: AnyRun) -> RunDir:
    """Returns the directory of a run under the folder of all results."""
    return RunDir(Path(root) / TRIALS / run_id(config))


def all_runs(root: Path) -> list[RunDir]:
    """Returns every run directory under the folder of all results, by name."""
    folder = Path(root) / TRIALS
    return [RunDir(path.parent) for path in sorted(folder.glob("*/config.yaml"))]

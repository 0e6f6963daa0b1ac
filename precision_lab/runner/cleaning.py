"""What may be deleted: checkpoints of finished runs, which nothing needs in order to go on."""

import contextlib
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from precision_lab.runner.parents import parent_of
from precision_lab.runner.rundir import FINISHED, RunDir, all_runs


@dataclass(frozen=True)
class Old:
    """Old checkpoints of one run, and what they take."""

    run_id: str
    paths: tuple[Path, ...]
    size_bytes: int


def old_checkpoints(out: Path, keep_last: int = 1) -> list[Old]:
    """Returns the checkpoints of finished runs without the latest `keep_last` of each.

    A run that may still go on, one that diverged (its last finite checkpoint shows why), and whatever is no checkpoint
    is left alone; so is the last checkpoint of a run that one which may go on begins from.
    """
    found, runs = [], all_runs(out)
    needed = {_begins_from(run) for run in runs if run.status()["state"] not in FINISHED}
    for run in runs:
        if run.status()["state"] != "done" or run.is_busy():
            continue
        steps = sorted((path for path in run.checkpoints.glob("*") if path.name.isdecimal()), key=lambda p: int(p.name))
        kept = max(keep_last, run.id in needed)
        drop = tuple(steps[: max(len(steps) - kept, 0)])
        if drop:
            found.append(Old(run.id, drop, sum(_size(path) for path in drop)))
    return found


def _begins_from(run: RunDir) -> str:
    """Returns the name of the run that a run begins from, empty if there is none or nobody can tell any more."""
    with contextlib.suppress(ValueError):
        above = parent_of(run, run.config())
        return "" if above is None else above.id
    return ""


def _size(path: Path) -> int:
    """Returns the bytes of everything in a folder."""
    return sum(item.stat().st_size for item in path.rglob("*") if item.is_file())


def delete(out: Path, old: Sequence[Old]) -> int:
    """Deletes checkpoints and returns how many bytes that freed; a run that another process took up keeps its own."""
    freed = 0
    for one in old:
        lock = FileLock(one.paths[0].parents[1] / "lock", timeout=0)
        try:
            with lock:
                for path in one.paths:
                    shutil.rmtree(path)
                freed += one.size_bytes
        except Timeout:
            continue
    return freed

"""A run in a process of its own, made to be killed: `python killed_run.py CONFIG FOLDER DIE`.

DIE is "never", "step:N" (kill -9 after step N) or "save:N" (kill -9 in the middle of saving step N, when all files are
written and none is committed). Rows go to FOLDER/rows.jsonl as they come; the result is printed.
"""

import json
import os
import signal
import sys
from pathlib import Path

from precision_lab.training import RunConfig, train


class FileSink:
    """Appends rows to a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def restart(self, step):
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        self.path.write_text("".join(line for line in lines if json.loads(line)["step"] <= step))

    def write(self, row):
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def die_before_committing(step):
    rename = os.rename

    def guarded(source, target, *args, **kwargs):
        if Path(target).name == str(step):
            die()
        return rename(source, target, *args, **kwargs)

    os.rename = guarded


def main(config_json, folder, when):
    kind, _, number = when.partition(":")
    if kind == "save":
        die_before_committing(int(number))

    def on_step(step, loss):
        if kind == "step" and step == int(number):
            die()

    config = RunConfig.model_validate_json(config_json)
    result = train(
        config, checkpoint_dir=Path(folder) / "checkpoints", sink=FileSink(Path(folder) / "rows.jsonl"), on_step=on_step
    )
    print(json.dumps([result.status, result.step, result.metrics]))


if __name__ == "__main__":
    # The order of float32 sums may depend on the number of cores; one is the same everywhere.
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    main(*sys.argv[1:])

"""A full disk: the run stops and says what to free, nothing that was saved is lost, and the same command continues."""

import errno
import json
import os
import subprocess
import sys

import pytest

from precision_lab import runner
from precision_lab.runner.atomic import overwrite
from precision_lab.runner.disk import is_disk_full
from precision_lab.runner.metrics import JsonlSink, read_rows
from precision_lab.runner.yaml12 import dump
from tests.runner.fakes import EXPERIMENT

FULL = OSError(errno.ENOSPC, "No space left on device")


def test_a_run_that_finds_the_disk_full_fails_with_what_to_free_and_the_rest_is_not_started(training):
    training.failures = {"float16": FULL}
    said = []
    results = runner.run(EXPERIMENT, say=said.append)

    assert [one.state for one in results.trials if one.state != "queued"] == ["done", "failed"]
    assert results.exit_code == 3
    assert "no space left for runs/trials" in results.trial("float16", 0).error
    assert "checkpoints/ of runs that are done" in said[-1]

    training.failures = {}
    training.trained.clear()
    assert runner.run(EXPERIMENT, say=said.append).exit_code == 0
    assert training.trained[0] == ("float16", 0, 4)  # from its checkpoint


def test_a_full_disk_is_known_by_its_number_and_by_words_of_libraries():
    wrapped = RuntimeError("saving failed")
    wrapped.__cause__ = ValueError("RESOURCE_EXHAUSTED: No space left on device")

    assert is_disk_full(FULL)
    assert is_disk_full(wrapped)
    assert not is_disk_full(OSError(errno.EACCES, "Permission denied"))
    assert not is_disk_full(None)


class FillingFile:
    """A file that takes only so many bytes, as the operating system does: in part, and then none."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        if self.room == 0:
            raise FULL
        written = self.file.write(data[: self.room])
        self.room -= written
        return written

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_a_row_that_finds_no_room_is_torn_and_the_next_attempt_repairs_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with JsonlSink(path, 1) as sink:
        sink._file = FillingFile(sink._file, 100)
        for step in (0, 1):
            sink.write({"step": step, "split": "train", "loss": 0.5})
        with pytest.raises(OSError, match="No space"):
            sink.write({"step": 2, "split": "train", "loss": 0.5})

    assert len(path.read_bytes()) == 100
    assert [row["step"] for row in read_rows(path)] == [0, 1]
    with JsonlSink(path, 2) as sink:
        sink.restart(0)
        sink.write({"step": 1, "split": "train", "loss": 0.25})
    assert [(row["step"], row["attempt"]) for row in read_rows(path)] == [(0, 1), (1, 2)]


def test_writing_over_a_file_leaves_valid_json(tmp_path):
    path = tmp_path / "status.json"
    path.write_text(json.dumps({"state": "running", "pid": 1234, "host": "a-long-name"}))
    for value in ({"state": "failed"}, {"state": "failed", "error": "x" * 200}):
        overwrite(path, json.dumps(value))

        assert json.loads(path.read_text()) == value


SCRIPT = """
set -e
mount -t tmpfs -o size={size}k tmpfs small
set +e
{command} --out small/runs 2> first.err; echo $? > first.rc
cp -r small/runs before
mount -o remount,size=40m small
{command} --out small/runs 2> second.err; echo $? > second.rc
cp -r small/runs after
"""
SMALL = {
    "name": "small",
    "model": {"kind": "mlp", "hidden": [64]},
    "data": {"kind": "digits", "batch": 32},
    "optim": {"kind": "sgd", "lr": 0.1, "momentum": 0.9},
    "train": {"steps": 40, "eval_every": 20, "log_every": 1, "checkpoint_every": 10},
}


@pytest.mark.slow
def test_a_disk_that_really_fills_up_costs_nothing_that_was_saved(tmp_path):
    """On a file system of its own that is too small, in a user namespace where that is allowed."""
    if subprocess.run(["unshare", "-rm", "true"], capture_output=True, check=False).returncode:
        pytest.skip("a file system of one's own needs user namespaces, which this machine does not allow")
    (tmp_path / "config.yaml").write_text(dump(SMALL))
    (tmp_path / "small").mkdir()
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = f"{sys.executable} -m precision_lab.cli run config.yaml"
    script = SCRIPT.format(size=290, command=command)
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], cwd=tmp_path, env=environment, capture_output=True, check=False
    )

    assert done.returncode == 0, done.stderr
    assert ((tmp_path / "first.rc").read_text(), (tmp_path / "second.rc").read_text()) == ("3\n", "0\n")
    error = (tmp_path / "first.err").read_text()
    assert "no space left for small/runs/trials" in error
    # TensorStore's own threads may complain of an event loop that has closed; nothing else shows a traceback.
    assert "orbax" not in error
    assert "precision_lab/" not in error
    (status,) = [json.loads(path.read_text()) for path in tmp_path.glob("before/trials/*/status.json")]
    assert (status["state"], "no space left" in status["error"]) == ("failed", True)
    saved = {int(path.name) for path in tmp_path.glob("before/trials/*/checkpoints/*")}
    assert saved
    rows = read_rows(next(tmp_path.glob("after/trials/*/metrics.jsonl")))
    steps = [row["step"] for row in rows if row["split"] == "train"]
    assert steps == list(range(1, 41))
    assert {row["attempt"] for row in rows if row["step"] <= max(saved)} == {1}
    assert {row["attempt"] for row in rows if row["step"] > max(saved)} == {2}

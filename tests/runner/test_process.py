"""The executor `process`, with real processes: it shares no fate, loses no child, and changes no number."""

import json
import signal
import sys
import time
from pathlib import Path

import pytest

from precision_lab import runner
from precision_lab.runner import execute, executors
from precision_lab.runner.executors import remote
from tests.runner.commands import EXPERIMENT, lines, rows, session, start, states, wait_for
from tests.runner.fakes import EXPERIMENT as TOY

DEADLY = {**EXPERIMENT, "arms": {"float32": {}, "deadly": {"data": {"kind": "deadly_digits"}}}}
PROCESS = ("--executor", "process", "--jobs", "2")


@pytest.mark.slow
def test_a_run_that_takes_its_process_down_hurts_no_other_and_is_tried_again(tmp_path, monkeypatch):
    """Checks 16 and 18."""
    monkeypatch.syspath_prepend(Path(__file__).parent)
    runner.run(EXPERIMENT, arms=["float32"], imports=["slow_digits"], out=tmp_path / "serial")

    crashed = start(tmp_path, "runs", *PROCESS, experiment=DEADLY, DIE="1")
    assert crashed.wait(timeout=300) == 3, crashed.stderr.read()
    said = crashed.stderr.read()
    assert states(tmp_path / "runs") == ["done", "failed"]
    (folder,) = tmp_path.glob("runs/trials/*deadly*")
    status = json.loads((folder / "status.json").read_text())
    assert status["error"] == "its process ended with exit code 9; last line: the last words"
    assert "the last words" in (folder / "logs" / "attempt-1.log").read_text()
    assert "deadly, seed 0 failed: its process ended with exit code 9" in said
    assert "float32, seed 0: done" in said
    assert (rows(tmp_path / "serial").items()) <= rows(tmp_path / "runs").items()

    again = start(tmp_path, "runs", *PROCESS, experiment=DEADLY)

    assert again.wait(timeout=300) == 0, again.stderr.read()
    assert "1 of 2 runs are finished already" in again.stderr.read()
    paths = folder.parent.glob("*/status.json")
    attempts = {path.parent.name: json.loads(path.read_text())["attempt"] for path in paths}
    assert sorted(attempts.values()) == [1, 2]
    assert attempts[folder.name] == 2


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="lists the processes of a session in /proc")
@pytest.mark.parametrize(
    ("number", "code", "state"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGKILL, -signal.SIGKILL, "preempted")],
    ids=["Ctrl-C", "kill -9"],
)
def test_stopping_the_command_leaves_no_child_and_what_they_did_is_saved(tmp_path, number, code, state):
    """Check 17; Ctrl-C goes to the command alone, and kill -9 leaves the children to find out."""
    stopped = start(tmp_path, "runs", *PROCESS, sleep_s=0.3)
    wait_for(stopped, lambda: all_have_rows(tmp_path / "runs", 2))
    stopped.send_signal(number)

    assert stopped.wait(timeout=60) == code
    deadline = time.monotonic() + (60 if number == signal.SIGKILL else 2)
    while session(stopped.pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert states(tmp_path / "runs") == [state, state]
    assert len(list(tmp_path.glob("runs/trials/*/checkpoints/*"))) == 2


def all_have_rows(folder, runs):
    """Returns whether so many runs have taken their first steps, as their rows tell."""
    records = list(folder.glob("trials/*/metrics.jsonl"))
    return len(records) == runs and all(b'"split":"train"' in path.read_bytes() for path in records) and lines(folder)


def test_executors_that_are_not_there_or_cannot_do_so_much_are_refused():
    with pytest.raises(ValueError, match="no executor 'proces'; did you mean 'process'"):
        executors.get("proces", None)
    with pytest.raises(ValueError, match=r"'serial' makes one run at a time, got jobs=2; choose executor 'process'"):
        executors.get("serial", 2)
    with pytest.raises(ValueError, match="at least 1, got 0"):
        executors.get("process", 0)
    with pytest.raises(ValueError, match="'process' has no options, got 'a=1'"):
        executors.get("process:a=1")


@pytest.mark.parametrize(("name", "package"), [("ray", "ray"), ("slurm", "submitit")])
def test_an_executor_whose_package_is_missing_says_what_to_install(monkeypatch, name, package):
    monkeypatch.setattr(executors, "find_spec", lambda _: None)

    with pytest.raises(ValueError, match=rf"needs {package}: pip install 'precision-lab\[{name}\]'"):
        executors.get(name)


def test_what_a_script_registers_itself_is_refused(training, monkeypatch):
    planned = execute.plan(runner.load(TOY), Path("runs"))[0]
    monkeypatch.setattr(remote, "registered_modules", lambda config: ["__main__"])

    with pytest.raises(ValueError, match=r"registered by the script itself.*--import MODULE"):
        remote.modules_to_import(planned)


def test_the_end_of_a_process_is_said_in_words():
    assert remote.ending(9) == "its process ended with exit code 9"
    assert remote.ending(-9) == "its process was killed by SIGKILL"

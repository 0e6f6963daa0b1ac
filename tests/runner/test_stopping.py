"""Commands that are asked to stop, by signals, and continue; all with real processes."""

import json
import os
import signal
import time

import pytest

from precision_lab.runner.stopping import Preempted, Stop, stop_on_signals
from tests.runner.commands import lines, rows, start, states, wait_for


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The rows of the experiment when nothing stops it."""
    folder = tmp_path_factory.mktemp("whole")
    process = start(folder, "runs")
    assert process.wait(timeout=300) == 0, process.stderr.read()
    return rows(folder / "runs")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "state", "code"),
    [(signal.SIGTERM, "preempted", 75), (signal.SIGINT, "interrupted", 130)],
    ids=["SIGTERM", "Ctrl-C"],
)
def test_a_stopped_run_saves_at_its_next_step_and_continues_bitwise(tmp_path, whole, number, state, code):
    """Checks 5 and 17; `checkpoint_every` is not set, so what is saved was saved for the signal."""
    stopped = start(tmp_path, "runs", sleep_s=0.05)
    wait_for(stopped, lambda: lines(tmp_path / "runs") >= 5)
    sent = time.monotonic()
    stopped.send_signal(number)
    assert stopped.wait(timeout=60) == code
    assert time.monotonic() - sent < 10
    assert states(tmp_path / "runs") == [state]
    saved = [int(path.name) for path in tmp_path.glob("runs/trials/*/checkpoints/*")]
    assert len(saved) == 1
    assert saved[0] >= 21

    finished = start(tmp_path, "runs")

    assert finished.wait(timeout=300) == 0, finished.stderr.read()
    assert rows(tmp_path / "runs") == whole
    first = next(tmp_path.glob("runs/trials/*float32*/metrics.jsonl")).read_text().splitlines()
    assert {json.loads(line)["attempt"] for line in first} == {1, 2}


@pytest.mark.slow
def test_two_commands_on_one_experiment_share_the_work(tmp_path, whole):
    """Check 25: each run is executed once, by either."""
    both = [start(tmp_path, "runs", sleep_s=0.02) for _ in range(2)]

    ends = [one.wait(timeout=300) for one in both]

    assert ends == [0, 0]
    assert rows(tmp_path / "runs") == whole
    attempts = [json.loads(path.read_text())["attempt"] for path in tmp_path.glob("runs/trials/*/status.json")]
    assert attempts == [1, 1]


def test_a_request_waits_for_a_step_only_while_a_run_is_between_steps():
    stop = Stop()
    with pytest.raises(Preempted):
        stop.request(Preempted())

    assert not stop()  # a run asks: from now on it would save
    stop.request(Preempted())
    assert stop()
    assert stop.state == "preempted"
    with pytest.raises(Preempted) as raised:
        stop.end_run()
    assert raised.value.code == 75


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=["SIGTERM", "SIGUSR1"])
def test_signals_are_heard_inside_and_left_alone_outside(number):
    before = signal.getsignal(number)

    with stop_on_signals() as stop:
        stop()
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)  # a scheduler may repeat itself, and must not tear the checkpoint
        assert stop()

    assert stop.state == "preempted"
    assert signal.getsignal(number) is before


def test_the_second_interrupt_does_not_wait(capfd):
    with stop_on_signals() as stop:
        stop()
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.state == "interrupted"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)

    assert "Ctrl-C again stops at once" in capfd.readouterr().err

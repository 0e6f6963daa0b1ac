"""Progress: what is shown where, with clocks that the test moves."""

import io
import math
import sys
from types import SimpleNamespace

import pytest

from precision_lab.training.progress import RunProgress, _choose_view
from precision_lab.training.views import BarsView, CellView, Clock, LinesView, _duration


class Time:
    """A clock that goes when told."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def lines_of(steps, *, seconds_per_step, losses=None):
    time, lines = Time(), []
    view = LinesView(lines.append, time)
    with RunProgress(2, view=view) as progress:
        progress.start_run("arm, seed 0", steps)
        for step in range(1, steps + 1):
            time.now += seconds_per_step
            progress.step(step, 1 / step if losses is None else losses)
        progress.end_run("done")
    return lines


def test_the_remaining_time_counts_from_the_end_of_compilation():
    time = Time()
    clock = Clock("run", 101, time)
    assert "compiling" in str(clock)

    time.now = 30.0
    clock.step(1, math.nan)
    assert clock.eta_s() is None
    time.now = 40.0
    clock.step(11, 2.5)

    assert clock.rate() == 1.0
    assert clock.eta_s() == 90.0
    assert str(clock) == "run: step 11/101, 10 %, loss 2.5, 1 min 30 s left"


def test_a_resumed_run_counts_its_own_steps_only():
    time = Time()
    clock = Clock("run", 100, time)
    clock.step(51, 1.0)
    time.now = 10.0
    clock.step(71, 1.0)

    assert clock.rate() == 2.0


def test_lines_come_every_tenth_of_a_run():
    lines = lines_of(1000, seconds_per_step=0.1)

    assert lines[0] == "[1/2] arm, seed 0: 1000 steps (compiling first)"
    assert [line.split(",")[1].strip() for line in lines[1:-1]] == [
        "seed 0: step " + f"{n}/1000" for n in range(100, 1000, 100)
    ]
    assert lines[-1].startswith("[1/2] arm, seed 0: done, loss 0.001")


def test_lines_come_every_half_minute_of_a_slow_run():
    lines = lines_of(1000, seconds_per_step=10.0)

    assert len(lines) == 2 + 333 + 6
    assert all("\x1b" not in line and "\r" not in line and "\n" not in line for line in lines)


def test_a_run_of_a_second_has_no_lines_but_its_first_and_its_last():
    assert len(lines_of(1000, seconds_per_step=0.00099)) == 2
    assert len(lines_of(1000, seconds_per_step=0.0025)) == 2 + 2, "at 1.0 and at 2.0 s"


def test_runs_that_go_on_at_once_are_told_apart():
    time, lines = Time(), []
    with RunProgress(2, view=LinesView(lines.append, time)) as progress:
        progress.start_run("first", 10, "a")
        progress.start_run("second", 1000, "b")
        for step in range(1, 10):
            time.now += 1.0
            progress.step(step, 0.5, "a")
            progress.step(step, 0.25, "b")
        progress.end_run("done", "b")
        progress.end_run("failed", "a")

    assert lines[:2] == ["[1/2] first: 10 steps (compiling first)", "[2/2] second: 1000 steps (compiling first)"]
    assert all(line.startswith("  first: step") and "loss 0.5" in line for line in lines[2:-2])
    assert len(lines[2:-2]) == 9
    assert [line.split(",")[0] for line in lines[-2:]] == ["[1/2] second: done", "[2/2] first: failed"]


def test_of_very_many_runs_at_once_the_steps_of_eight_are_shown():
    time, lines = Time(), []
    names = [f"run {number}" for number in range(20)]
    with RunProgress(21, view=LinesView(lines.append, time)) as progress:
        for name in names:
            progress.start_run(name, 10, name)
        for step in range(1, 11):
            time.now += 1.0
            for name in names:
                progress.step(step, 0.5, name)
        for name in names:
            progress.end_run("done", name)
        progress.start_run("another", 10, "another")

    assert {line.split(":")[0].strip() for line in lines if "step " in line} == set(names[:8])
    assert len([line for line in lines if ": done" in line]) == 20
    assert lines[-1] == "[21/21] another: 10 steps (compiling first)"


def test_a_diverged_run_shows_its_loss():
    time, lines = Time(), []
    with RunProgress(view=LinesView(lines.append, time)) as progress:
        progress.start_run("run", 10)
        progress.step(1, math.nan)
        progress.end_run("diverged")

    assert lines[-1] == "[1/1] run: diverged, loss nan, 0.0 s"


def test_bars_are_drawn_on_a_terminal_and_leave_one_line_a_run(monkeypatch):
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")

    assert isinstance(_choose_view(), BarsView)
    with RunProgress(2) as progress:
        for label in ("first [arm]", "second"):
            progress.start_run(label, 100)
            for step in range(1, 101):
                progress.step(step, 0.5)
            progress.end_run("done")

    text = screen.getvalue()
    assert "first [arm]: done" in text
    assert "second: done" in text
    assert "runs" in text


def test_plain_lines_are_chosen_off_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stderr", io.StringIO())

    assert isinstance(_choose_view(), LinesView)


def test_jupyter_has_one_cell_that_is_rewritten(monkeypatch):
    class ZMQInteractiveShell:
        pass

    shown = []

    def display(text, display_id):
        assert display_id
        shown.append(repr(text))
        return SimpleNamespace(update=lambda text: shown.append(repr(text)))

    ipython = SimpleNamespace(get_ipython=ZMQInteractiveShell)
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", SimpleNamespace(display=display))
    assert isinstance(_choose_view(), CellView)

    time = Time()
    with RunProgress(view=CellView(display, time)) as progress:
        progress.start_run("run", 10)
        for step in range(1, 11):
            time.now += 0.2
            progress.step(step, 0.25)
        progress.end_run("done")

    assert shown[0] == ""
    assert 3 <= len(shown) <= 7
    assert shown[-1].startswith("[1/1] run: done")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.04, "0.0 s"),
        (9.96, "10.0 s"),
        (42.4, "42 s"),
        (185, "3 min 5 s"),
        (3599.6, "1 h 0 min"),
        (7800, "2 h 10 min"),
    ],
)
def test_durations_read_well(seconds, text):
    assert _duration(seconds) == text


def test_steps_outside_a_run_are_ignored():
    progress = RunProgress(view=LinesView(lambda line: pytest.fail(line)))

    progress.step(1, 0.0)
    progress.end_run("done")

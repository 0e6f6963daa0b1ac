import json
import os
import subprocess
import sys
import textwrap
import threading
import time
from types import SimpleNamespace

import pytest

from precision_lab.runner import heartbeat, load, rundir
from precision_lab.runner.atomic import write_text
from precision_lab.runner.rundir import BusyError, RunDir, all_runs, run_dir
from tests.runner.fakes import EXPERIMENT

CONFIG = load(EXPERIMENT).runs["float32"][0]
OTHER = load(EXPERIMENT).runs["float16"][0]


def contents(folder):
    """Returns every file under a folder with its bytes and its time."""
    return {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def test_reading_a_run_that_is_not_there_makes_nothing(tmp_path):
    run = run_dir(tmp_path, CONFIG)

    assert (run.status()["state"], run.rows(), run.env(), run.summary()) == ("queued", [], {}, {})
    assert list(tmp_path.iterdir()) == []


def test_claiming_writes_the_configuration_that_made_it(tmp_path):
    run = run_dir(tmp_path, CONFIG)

    with run.claim(CONFIG, wait=False):
        pass

    assert run.config() == CONFIG
    assert [one.id for one in all_runs(tmp_path)] == [run.id]


def test_a_directory_of_another_configuration_is_refused_and_left_alone(tmp_path):
    run = run_dir(tmp_path, CONFIG)
    with run.claim(CONFIG, wait=False):
        pass
    before = contents(tmp_path)

    with (
        pytest.raises(ValueError, match=r"holds a run of another configuration .* choose another --out"),
        run.claim(OTHER, wait=False),
    ):
        pytest.fail("was claimed")

    assert contents(tmp_path) == before


def test_a_config_edited_by_hand_is_refused(tmp_path):
    run = run_dir(tmp_path, CONFIG)
    with run.claim(CONFIG, wait=False):
        pass
    path = run.path / "config.yaml"
    path.write_text(path.read_text().replace("lr: 0.1", "lr: 0.2"))

    with pytest.raises(ValueError, match="another configuration"):
        run.refuse_other(CONFIG)


def test_a_folder_of_something_else_is_refused(tmp_path):
    run = run_dir(tmp_path, CONFIG)
    run.path.mkdir(parents=True)
    (run.path / "thesis.tex").write_text("years of work")

    with pytest.raises(ValueError, match="not a run directory, and not empty"):
        run.refuse_other(CONFIG)


def test_a_directory_that_was_only_just_made_can_be_used(tmp_path):
    run = run_dir(tmp_path, CONFIG)
    run.path.mkdir(parents=True)

    with run.claim(CONFIG, wait=False):
        assert run.config() == CONFIG


def test_a_directory_whose_maker_was_killed_in_the_first_write_can_be_used(tmp_path):
    run = run_dir(tmp_path, CONFIG)
    run.path.mkdir(parents=True)
    (run.path / "lock").touch()
    (run.path / ".config.yaml.4711-140.tmp").write_text("model: {ki")

    with run.claim(CONFIG, wait=False):
        assert run.config() == CONFIG


def test_what_was_written_while_waiting_for_the_lock_is_looked_at_again(tmp_path, monkeypatch):
    run = run_dir(tmp_path, CONFIG)

    class SlowLock(rundir.FileLock):
        def acquire(self, *args, **kwargs):
            (run.path / "config.yaml").write_text(rundir.config_text(OTHER))
            return super().acquire(*args, **kwargs)

    monkeypatch.setattr(rundir, "FileLock", SlowLock)
    with pytest.raises(ValueError, match="another configuration"), run.claim(CONFIG, wait=True):
        pytest.fail("was claimed")

    assert not run.is_locked()


def test_every_environment_that_attempts_ran_in_is_kept(tmp_path):
    run = run_dir(tmp_path, CONFIG)

    with run.claim(CONFIG, wait=False):
        for jax in ("1", "2", "2", "3", "1"):
            run.start({"jax": jax})

    assert run.envs() == [{"jax": "2"}, {"jax": "3"}, {"jax": "1"}]
    assert run.env() == {"jax": "1"}


def test_the_state_follows_the_run(tmp_path):
    run = run_dir(tmp_path, CONFIG)

    with run.claim(CONFIG, wait=False):
        first = run.start({"jax": "1"})
        running = run.status()["state"]
        run.stop("failed", attempt=first, error="boom")
        failed = run.status()
        second = run.start({"jax": "1"})
        run.finish("done", step=10, metrics={"eval/loss": float("nan")}, duration_s=1.5, attempt=second)

    assert (first, second, running) == (1, 2, "running")
    assert (failed["state"], failed["error"]) == ("failed", "boom")
    assert run.status()["state"] == "done"
    assert str(run.summary()["metrics"]["eval/loss"]) == "nan"
    json.loads((run.path / "summary.json").read_text(), parse_constant=pytest.fail)


def test_a_run_whose_process_is_gone_counts_as_stopped(tmp_path):
    run = run_dir(tmp_path, CONFIG)
    with run.claim(CONFIG, wait=False):
        run.start({})

    assert run.status()["state"] == "stopped"


@pytest.fixture
def clock(monkeypatch):
    """The monotonic clock of this process, moved by hand."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(heartbeat, "_now", lambda: clock.now)
    return clock


@pytest.mark.parametrize("ahead_s", [0, -86400, 86400])
def test_a_run_of_another_machine_is_its_own_as_long_as_its_heart_beats(tmp_path, monkeypatch, clock, ahead_s):
    """Locks of another machine cannot be seen on many file servers, and its clock may be wrong by a day."""
    run, now = run_dir(tmp_path, CONFIG), time.time()

    def elsewhere(act):
        with monkeypatch.context() as there:
            there.setattr(rundir.socket, "gethostname", lambda: "elsewhere")
            there.setattr(rundir.time, "time", lambda: now + clock.now + ahead_s)
            return act()

    def start():
        with run.claim(CONFIG, wait=False):
            run.start({})

    def beat():
        run._write_status(**{**run._read_status(), "heartbeat_unix_s": rundir.time.time()})

    elsewhere(start)
    for _ in range(10):
        assert run.is_busy()
        with pytest.raises(BusyError), run.claim(CONFIG, wait=False):
            pytest.fail("was claimed twice")
        clock.now += heartbeat.HEARTBEAT_S
        elsewhere(beat)
    assert run.held_by().startswith("which elsewhere may be running")

    assert run.is_busy()
    clock.now += heartbeat.GONE_AFTER_S - 1
    assert run.is_busy()
    clock.now += 1
    assert not run.is_busy()
    with run.claim(CONFIG, wait=False):
        assert run.start({}) == 2


def test_who_looks_is_told_by_the_clock_whether_another_machine_still_runs(tmp_path, monkeypatch):
    run, now = run_dir(tmp_path, CONFIG), time.time()
    monkeypatch.setattr(rundir.socket, "gethostname", lambda: "elsewhere")
    with run.claim(CONFIG, wait=False):
        run.start({})
    monkeypatch.undo()

    assert run.status()["state"] == "running"
    monkeypatch.setattr(rundir.time, "time", lambda: now + heartbeat.GONE_AFTER_S + 1)
    assert run.status()["state"] == "stopped"


def test_the_heart_beats_while_a_run_goes_on_and_not_after(tmp_path, monkeypatch):
    monkeypatch.setattr(heartbeat, "HEARTBEAT_S", 0.01)
    run = run_dir(tmp_path, CONFIG)
    with run.claim(CONFIG, wait=False):
        run.start({})
        with run.beating():
            deadline = time.monotonic() + 20
            while "heartbeat_unix_s" not in run.status():
                assert time.monotonic() < deadline
        first = run.status()
        time.sleep(0.05)
        assert run.status() == first

    assert first["heartbeat_unix_s"] >= first["unix_s"]
    assert (first["state"], first["attempt"], first["pid"]) == ("running", 1, os.getpid())


def test_two_processes_never_hold_one_run(tmp_path):
    run = run_dir(tmp_path, CONFIG)
    code = textwrap.dedent(f"""
        import sys
        from precision_lab.runner import load
        from precision_lab.runner.rundir import run_dir
        from tests.runner.fakes import EXPERIMENT
        config = load(EXPERIMENT).runs["float32"][0]
        run = run_dir({str(tmp_path)!r}, config)
        with run.claim(config, wait=False):
            run.start({{}})
            print("held", flush=True)
            sys.stdin.readline()
    """)
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"

        with pytest.raises(BusyError), run.claim(CONFIG, wait=False):
            pytest.fail("was claimed twice")
        assert run.status()["state"] == "running"

        other.kill()
        other.wait()
        with run.claim(CONFIG, wait=False):
            assert run.start({}) == 2
    finally:
        other.kill()
        other.communicate()


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_text(path, "old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "new")

    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_no_run_directory_says_so(tmp_path):
    with pytest.raises(ValueError, match=r"is not a run directory: it has no config\.yaml"):
        RunDir(tmp_path).config()


def test_a_run_whose_status_somebody_reads_at_the_moment_can_be_claimed(tmp_path):
    run = run_dir(tmp_path, CONFIG)
    run.prepare(CONFIG)
    reader = rundir.FileLock(run.path / "lock", thread_local=False)
    reader.acquire()
    threading.Timer(0.05, reader.release).start()

    with run.claim(CONFIG, wait=False):
        assert run.is_locked()

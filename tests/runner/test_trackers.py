"""Trackers: each step once however often a run was stopped, and a run that no failing tracker stops."""

import json
import struct
from types import SimpleNamespace

import pytest

from precision_lab import runner
from precision_lab.runner import trackers
from tests.runner.fakes import EXPERIMENT

ONE = {**EXPERIMENT, "arms": {"float32": {}}, "seeds": [0], "claims": []}


class Memory:
    """A tracker that remembers what it was told, and fails where it is told to."""

    def __init__(self, fails_in=""):
        self.fails_in, self.told = fails_in, []

    def _hear(self, method, *values):
        self.told.append((method, *values))
        if method == self.fails_in:
            raise OSError(28, "No space left on device")

    def start(self, run):
        self._hear("start", run.id)

    def log(self, step, metrics):
        self._hear("log", step, metrics)

    def artifact(self, path):
        self._hear("artifact", path.name)

    def summary(self, metrics):
        self._hear("summary", metrics)

    def finish(self, state):
        self._hear("finish", state)


@pytest.fixture
def memories(monkeypatch):
    """Two trackers `good` and `bad`, made anew for each attempt; the bad one fails where `bad.fails_in` says."""
    made = {"good": [], "bad": []}
    bad = SimpleNamespace(fails_in="", made=made)

    def make(name):
        made[name].append(Memory(bad.fails_in if name == "bad" else ""))
        return made[name][-1]

    monkeypatch.setattr(trackers, "TRACKERS", {"good": "json", "bad": "json"})
    monkeypatch.setattr(trackers.TrackedSink.__init__, "__defaults__", (make,))
    return bad


def run(*names, **options):
    said = []
    return runner.run(ONE, tracker=names, say=said.append, **options)


@pytest.mark.parametrize("method", ["start", "log", "artifact", "summary", "finish"])
def test_a_tracker_that_fails_stops_nothing_and_is_noted(training, memories, method):
    """Check 32."""
    memories.fails_in = method

    results = run("bad", "good")

    trial = results.trials[0]
    assert trial.state == "done"
    summary = json.loads((trial.path / "summary.json").read_text())
    assert summary["trackers"] == {"bad": "OSError: [Errno 28] No space left on device"}
    assert "tracker bad failed and is left out" in (trial.path / "logs" / "attempt-1.log").read_text()
    (good,) = memories.made["good"]
    assert [told[0] for told in good.told[:2]] == ["start", "artifact"]
    assert [told[0] for told in good.told[-2:]] == ["summary", "finish"]
    assert [told[0] for told in memories.made["bad"][0].told].count(method) == 1


def test_every_attempt_shows_the_whole_record_once(training, memories):
    """Check 6: a new attempt replaces what the tracker had, and begins with what the record has kept."""
    training.failures = {"float32": RuntimeError("boom")}
    run("good")
    training.failures = {}
    trial = run("good").trials[0]

    first, second = memories.made["good"]
    assert first.told[-1] == ("finish", "failed")
    assert second.told[-1] == ("finish", "done")
    shown = [(step, name, value) for what, step, metrics in logged(second) for name, value in metrics.items()]
    record = [
        (s, name, v) for name, series in trial.series.items() for s, v in zip(series.steps, series.values, strict=True)
    ]
    assert sorted(shown) == sorted(record)
    assert len({(step, name) for step, name, _ in shown}) == len(shown)


def test_runs_at_once_are_shown_like_others(training, memories, monkeypatch):
    monkeypatch.setattr("precision_lab.training.size.room_for", lambda config: 99)

    several = {**ONE, "seeds": [0, 1]}
    results = runner.run(several, out="runs", executor="vmap", tracker=["good"], say=lambda _: None)

    shown = {told.told[0][1]: told.told[-1] for told in memories.made["good"]}
    assert shown == {one.run_id: ("finish", "done") for one in results.trials}


def logged(tracker):
    return [told for told in tracker.told if told[0] == "log"]


def test_trackers_are_no_part_of_any_identity():
    plain, tracked = runner.load(ONE), runner.load({**ONE, "tracker": ["tensorboard"]})

    assert tracked.id == plain.id
    assert tracked.tracker == ("tensorboard",)
    assert runner.load(tracked.to_dict()).tracker == ("tensorboard",)


def test_trackers_that_are_not_there_are_refused_before_anything_is_written(training, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="no tracker 'tensorbord'; did you mean 'tensorboard'"):
        run("tensorbord")
    monkeypatch.setattr(trackers, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"tracker 'wandb' needs wandb: pip install 'precision-lab\[wandb\]'"):
        run("wandb")

    assert list(tmp_path.iterdir()) == []


def tracked_twice(training, name):
    """Runs once to a crash and once to the end, and returns the finished run."""
    training.failures = {"float32": RuntimeError("boom")}
    run(name)
    training.failures = {}
    trial = run(name).trials[0]
    summary = json.loads((trial.path / "summary.json").read_text())
    assert "trackers" not in summary, summary["trackers"]
    return trial


def points(trial):
    """Returns the record of a run as {metric: [(step, value)]}."""
    return {name: list(zip(s.steps, s.values, strict=True)) for name, s in trial.series.items()}


def near(expected):
    return {name: [(step, pytest.approx(value, rel=1e-6)) for step, value in many] for name, many in expected.items()}


def test_tensorboard_shows_the_record(training):
    pytest.importorskip("tensorboardX", reason="an extra: pip install 'precision-lab[tensorboard]'")
    from tensorboardX.proto.event_pb2 import Event

    trial = tracked_twice(training, "tensorboard")

    (path,) = (trial.path / "tensorboard").iterdir()
    data, shown = path.read_bytes(), {}
    while data:  # Records of TFRecord: length, its checksum, the event, its checksum.
        size = struct.unpack("<Q", data[:8])[0]
        event = Event.FromString(data[12 : 12 + size])
        data = data[16 + size :]
        for value in event.summary.value:
            if value.HasField("simple_value"):
                shown.setdefault(value.tag, []).append((event.step, value.simple_value))
    assert shown == near(points(trial))


def test_mlflow_shows_the_record(training):
    pytest.importorskip("mlflow", reason="an extra: pip install 'precision-lab[mlflow]'")
    from mlflow.tracking import MlflowClient

    trial = tracked_twice(training, "mlflow")

    client = MlflowClient(tracking_uri=f"sqlite:///{trial.path.absolute().parent.parent / 'mlflow.db'}")
    (found,) = client.search_runs([client.get_experiment_by_name("precision_lab").experiment_id])
    assert (found.info.status, found.data.tags["precision_lab.run_id"]) == ("FINISHED", trial.run_id)
    assert found.data.params["optim.lr"] == "0.1"
    shown = {
        name: [(m.step, m.value) for m in client.get_metric_history(found.info.run_id, name)] for name in trial.series
    }
    assert {name: sorted(many) for name, many in shown.items()} == near(points(trial))


def test_wandb_shows_the_record_offline(training):
    pytest.importorskip("wandb", reason="an extra: pip install 'precision-lab[wandb]'")
    from wandb.proto.wandb_internal_pb2 import Record

    trial = tracked_twice(training, "wandb")

    (path,) = (trial.path / "wandb").glob("offline-run-*/*.wandb")
    shown = {}
    for data in leveldb_records(path.read_bytes()):
        record = Record.FromString(data)
        items = {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for name in points(trial).keys() & items.keys():
            shown.setdefault(name, []).append((items["_step"], items[name]))
    assert shown == near(points(trial))


def leveldb_records(data):
    """Yields the records of a log of LevelDB after a header of 7 bytes: blocks of 32 KiB of checksum, length, kind."""
    at, parts = 7, []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # Too short for a header: the rest of the block is padding.
            at += 32768 - at % 32768
            continue
        size, kind = struct.unpack("<HB", data[at + 4 : at + 7])
        parts.append(data[at + 7 : at + 7 + size])
        at += 7 + size
        if kind in (1, 4):  # Whole, or the last part.
            yield b"".join(parts)
            parts = []

"""The index is derived: it always says what the run directories say, however it came about."""

import json
import math
import os
import sqlite3
from pathlib import Path

import pytest

from precision_lab import runner
from precision_lab.runner.query import export, query, save
from precision_lab.runner.rundir import all_runs
from precision_lab.runner.store import INDEX, Store, quoted_names
from tests.runner.fakes import EXPERIMENT

OUT = Path("runs")


@pytest.fixture
def results(training):
    return runner.run(EXPERIMENT, say=lambda line: None)


def rows(where=""):
    with Store(OUT) as store:
        return store.rows(where)


def by_hand(run):
    """Returns the last value of each metric of a run, read from its record without the package."""
    last = {}
    for line in (run.path / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        for key, value in row.items():
            if key not in ("step", "split", "attempt"):
                last[f"{row['split']}/{key}"] = float(value)
    return last


def test_the_index_holds_what_the_directories_hold(results):
    found = {row["run_id"]: row for row in rows()}

    for run in all_runs(OUT):
        row = found.pop(run.id)
        assert (row["state"], row["step"], row["train.steps"]) == ("done", 10, 10)
        assert row["eval/loss"] == by_hand(run)["eval/loss"]
        assert row["seed"] == run.config().seed
        assert row["optim.lr"] == run.config().optim.lr
    assert found == {}


def test_a_run_that_was_killed_is_as_far_as_its_record(results):
    run = all_runs(OUT)[0]
    (run.path / "summary.json").unlink()
    (run.path / "status.json").write_text('{"state": "running", "attempt": 1, "unix_s": 0}')
    record = run.path / "metrics.jsonl"
    record.write_text("".join(line for line in record.open() if json.loads(line)["step"] <= 5))

    (row,) = (row for row in rows() if row["run_id"] == run.id)

    assert (row["state"], row["step"]) == ("stopped", 5)


def test_an_index_that_was_deleted_comes_back_with_the_same_rows(results):
    before = rows()

    (OUT / INDEX).unlink()

    assert rows() == before


@pytest.mark.parametrize("damage", ["text", "empty", "version", "cut"])
def test_a_broken_index_is_made_anew(results, damage):
    before = rows()
    path = OUT / INDEX

    if damage == "text":
        path.write_text("this is no database, and long enough to be taken for one " * 40)
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "version":
        with sqlite3.connect(path) as db:
            db.execute("pragma user_version = 99")
        db.close()
    else:
        path.write_bytes(path.read_bytes()[:5000])

    assert rows() == before


def test_a_refresh_sees_new_changed_and_deleted_runs(results):
    rows()
    runs = all_runs(OUT)
    summary = json.loads((runs[0].path / "summary.json").read_text())
    summary["metrics"]["eval/loss"] = 123.5
    (runs[0].path / "summary.json").write_text(json.dumps(summary))
    runs[1].path.rename(OUT / "elsewhere")

    found = {row["run_id"]: row for row in rows()}

    assert found[runs[0].id]["eval/loss"] == 123.5
    assert runs[1].id not in found
    runner.run(EXPERIMENT, seeds=[0, 1, 2, 3], say=lambda line: None)
    assert len(rows()) == 12


def test_a_refresh_reads_nothing_that_did_not_change(results, monkeypatch):
    rows()
    read = []
    monkeypatch.setattr("precision_lab.runner.store.entry", lambda run: read.append(run.id))

    rows()

    assert read == []


def test_a_run_whose_process_has_gone_is_stopped_though_no_file_changed(results):
    run = all_runs(OUT)[0]
    (run.path / "status.json").write_text(json.dumps({"state": "running", "attempt": 1, "pid": 1}))

    assert {row["state"] for row in rows() if row["run_id"] == run.id} == {"stopped"}


def test_names_that_differ_only_in_capitals_share_a_column(training):
    for name in ("INT4", "int4"):
        settings = {f"evals.{name}": "weight=int4@channel"}
        runner.run(EXPERIMENT, settings=settings, arms=["float32"], seeds=[0], say=lambda line: None)

    assert len(rows("evals.int4 = evals.INT4")) == 2
    assert query(OUT, "select count(evals.INT4), count(evals.int4) from runs")[1] == [(2, 2)]


def test_a_directory_that_cannot_be_read_is_listed_as_such(results):
    run = all_runs(OUT)[0]
    (run.path / "status.json").write_text("{")

    row = next(row for row in rows() if row["run_id"] == run.id)

    assert row["state"] == "unreadable"
    assert "status.json: not valid JSON" in row["error"]


def test_conditions_may_name_keys_and_metrics_as_they_are_written(results):
    found = rows("eval/loss > 0.4 and optim.lr < 1 and policy = 'float16_mixed' and train.steps = 10")

    losses = {run.id: by_hand(run)["eval/loss"] for run in all_runs(OUT)}
    assert {row["run_id"] for row in found} == {
        name for name, loss in losses.items() if loss > 0.4 and "-float16_mixed-" in name
    }
    assert found


def test_names_are_quoted_and_texts_are_not():
    names = ["optim.lr", "eval/loss", "eval_train/loss", "seed"]

    text = quoted_names("eval_train/loss<1 and x = 'eval/loss' and \"optim.lr\"=optim.lr and optim.lrr", names)

    assert quoted_names("r.optim.lr, Eval/Loss, x.seeds", names) == 'r."optim.lr", "eval/loss", x.seeds'
    assert text == '"eval_train/loss"<1 and x = \'eval/loss\' and "optim.lr"="optim.lr" and optim.lrr'


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("optim.lrr < 1", r"--where optim.lrr < 1: no column 'optim.lrr'; did you mean 'optim.lr'\?"),
        ("eval/loss <", r"--where eval/loss <: .*; expected a condition such as .*"),
        ("1; drop table runs", r"--where 1; drop table runs: .*"),
    ],
)
def test_a_condition_that_is_none_is_one_line_and_harms_nothing(results, where, message):
    before = rows()

    with pytest.raises(ValueError, match=f"^{message}$") as caught:
        rows(where)

    assert "\n" not in str(caught.value)
    assert rows() == before


def test_a_folder_that_may_only_be_read_can_be_listed(results, monkeypatch):
    def refuse(*_, **__):
        raise sqlite3.OperationalError("attempt to write a readonly database")

    rows()
    expected = rows()
    monkeypatch.setattr("precision_lab.runner.store._opened", lambda path: Refusing())

    assert rows() == expected


class Refusing:
    """A connection that can do nothing."""

    def execute(self, *_):
        raise sqlite3.OperationalError("attempt to write a readonly database")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def close(self):
        return None


def test_arms_say_which_run_serves_what(results):
    with Store(OUT) as store:
        arms = store.arms()

    assert {(row["experiment"], row["arm"], row["seed"], row["run_id"]) for row in arms} == {
        (results.experiment.id, one.arm, one.seed, one.run_id) for one in results.trials
    }


def test_a_query_reads_every_record(results):
    names, found = query(OUT, "select run_id, split, step, loss from metrics where step is not null")

    expected = {
        (run.id, row["split"], row["step"], row["loss"])
        for run in all_runs(OUT)
        for row in map(json.loads, (run.path / "metrics.jsonl").read_text().splitlines())
    }
    assert names == ["run_id", "split", "step", "loss"]
    assert set(found) == expected
    assert len(found) == len(expected)


def test_a_query_joins_arms_configurations_and_records(results):
    _, found = query(
        OUT, "select arm, min(m.loss) from metrics m join arms using (run_id) join runs using (run_id) "
        "where m.split = 'eval' and m.step = 10 and optim.lr = 0.1 group by arm order by arm"
    )  # fmt: skip

    for arm, least in found:
        assert least == min(one.series["eval/loss"].values[-1] for one in results.of_arm(arm))
    assert [arm for arm, _ in found] == sorted(EXPERIMENT["arms"])


def test_torn_lines_and_numbers_that_are_not_finite_are_seen(training):
    training.last_loss = {"float16": math.nan, "bfloat16": math.inf}
    results = runner.run(EXPERIMENT, say=lambda line: None)
    torn = results.trial("float32", 0).path / "metrics.jsonl"
    torn.write_text(torn.read_text() + '{"step": 11, "spl')

    _, found = query(OUT, "select run_id, loss from metrics where split = 'eval' and step = 10")
    last = dict(found)

    assert all(math.isnan(last[one.run_id]) for one in results.of_arm("float16"))
    assert all(last[one.run_id] == math.inf for one in results.of_arm("bfloat16"))
    assert math.isfinite(last[results.trial("float32", 0).run_id])
    assert query(OUT, "select count(*) from metrics where step = 11")[1] == [(0,)]
    indexed = {row["run_id"]: row["eval/loss"] for row in rows()}
    assert all(indexed[one.run_id] == "nan" for one in results.of_arm("float16"))
    assert query(OUT, "select count(*) from runs where isnan(eval/loss)")[1] == [(3,)]


def test_a_query_that_is_wrong_is_one_line(results):
    with pytest.raises(ValueError, match=r"^query: .*lss.*$") as caught:
        query(OUT, "select lss from metrics")
    with pytest.raises(ValueError, match=r"no results in nowhere"):
        query(Path("nowhere"), "select 1")

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sql", ["select 1; select 2", "drop table runs", "", "-- nothing"])
def test_a_query_is_one_statement_that_gives_rows(results, sql):
    with pytest.raises(ValueError, match="query: expected one statement that gives rows"):
        query(OUT, sql)


def test_a_query_of_an_empty_folder_has_no_rows(tmp_path):
    (tmp_path / "trials").mkdir()

    assert query(tmp_path, "select count(*) from metrics")[1] == [(0,)]
    assert query(tmp_path, "select count(*) from runs")[1] == [(0,)]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_what_is_saved_can_be_read_again(results, tmp_path, suffix):
    import duckdb

    save(OUT, "select run_id, eval/loss from runs order by run_id;", tmp_path / f"x.{suffix}")

    read = duckdb.sql(f"select * from '{tmp_path / f'x.{suffix}'}'").fetchall()
    assert read == [(row["run_id"], row["eval/loss"]) for row in rows()]


@pytest.mark.parametrize("to", ["csv", "parquet", "npz"])
def test_an_exported_run_has_every_number_of_its_record(results, tmp_path, to):
    import duckdb
    import numpy as np

    one = results.trial("float16", 1)

    path = export(one.path, to, tmp_path / f"run.{to}")

    if to == "npz":
        arrays = np.load(path)
        found = {name: (list(arrays[f"{name}:step"]), list(arrays[name])) for name in one.series}
    else:
        found = {}
        for name in one.series:
            split, metric = name.split("/")
            sql = f"select step, \"{metric}\" from '{path}' where split = '{split}' order by step"
            steps, values = zip(*duckdb.sql(sql).fetchall(), strict=True)
            found[name] = (list(steps), list(values))
    assert found == {name: (series.steps, series.values) for name, series in one.series.items()}
    assert os.path.getsize(path) > 0

"""Commands about what has run, as people and scripts meet them."""

import json

import pytest

from precision_lab.runner import ExperimentConfig, Preempted
from precision_lab.runner.yaml12 import dump
from tests.cli.test_app import cli, files
from tests.runner.fakes import EXPERIMENT

__all__ = ["cli"]


def test_ls_shows_what_a_condition_asks_for_and_its_columns(cli):
    cli("run", "toy.yaml")

    code, out, _ = cli("ls", "--where", "seed = 1 and optim.lr < 1")
    listed = json.loads(cli("ls", "--where", "seed = 1", "--json")[1])

    assert code == 0
    assert "optim.lr" in out
    assert sum("-s1-" in line for line in out.splitlines()) == 3
    assert "-s0-" not in out
    assert [row["seed"] for row in listed] == [1, 1, 1]
    assert "no such runs" in cli("ls", "--where", "seed = 99")[1]
    assert cli("ls", "--where", "sed = 1")[0] == 2


def test_status_counts_the_states_of_each_experiment(cli, training):
    training.failures = {"float16": RuntimeError("boom")}
    cli("run", "toy.yaml")

    out = cli("status")[1]
    data = json.loads(cli("status", "--json")[1])

    assert "6 done, 3 failed" in out
    assert data[0]["states"] == {"done": 6, "failed": 3}
    assert "no experiments in empty" in cli("status", "--out", "empty")[1]


def test_resume_goes_on_from_the_folder_and_from_a_run(cli, training, tmp_path):
    training.failures = {"float16": RuntimeError("boom")}
    cli("run", "toy.yaml")
    (tmp_path / "toy.yaml").unlink()
    training.failures = {}
    training.trained.clear()
    failed = json.loads(cli("ls", "--where", "state = 'failed' and seed = 2", "--json")[1])[0]["run_id"]

    one = cli("resume", failed)
    rest = cli("resume", "toy")

    assert (one[0], rest[0]) == (0, 0)
    assert [(kind, seed) for kind, seed, _ in training.trained] == [("float16", 2), ("float16", 0), ("float16", 1)]
    assert "reproduced" in rest[1]
    assert cli("resume", "nothing")[0] == 2


@pytest.mark.parametrize(
    ("error", "code", "word"), [(Preempted(), 75, "preempted"), (KeyboardInterrupt(), 130, "interrupted")]
)
def test_resume_that_is_stopped_says_so_and_exits_as_run_does(cli, training, error, code, word):
    training.failures["float16"] = error
    told = [cli("run", "toy.yaml"), cli("resume", "toy")]

    assert [one[0] for one in told] == [code] * 2
    assert all(f"{word}. What" in one[2] for one in told)


def test_diff_says_in_words_what_differs(cli, tmp_path):
    cli("run", "toy.yaml")
    ids = {row["policy"]: row["run_id"] for row in json.loads(cli("ls", "--where", "seed = 0", "--json")[1])}

    code, out, _ = cli("diff", ids["float32"], ids["float16_mixed"])
    arms = cli("diff", "toy.yaml::float32", "toy.yaml::float16")[1]
    data = json.loads(cli("diff", "toy.yaml::float32", "toy.yaml::float16", "--json")[1])[0]

    assert code == 0
    assert "policy: float32 in a, float16_mixed in b" in out
    assert "seed" not in out.replace("seeds", "")
    assert "they ran in the same environment" in out
    assert "over 3 seeds" in arms
    numbers = [json.loads(cli("show", run, "--json")[1])["metrics"]["eval/loss"] for run in ids.values()]
    assert max(numbers) - min(numbers) > 0.4
    assert 0.4 < data["metrics"]["eval/loss"]["difference"] < 0.6
    assert list(data["config"]) == ["policy"]


def test_diff_compares_probes_and_probes_with_trainings():
    from precision_lab.runner.comparison import Side, difference

    arms = {"a": {"probe": "dot_product"}, "b": {"probe": {"kind": "dot_product", "accum": "float16"}}, "c": {}}
    config = ExperimentConfig(**{**EXPERIMENT, "arms": arms, "claims": []})
    a, b, c = (Side(arm, config.runs[arm][0], ("done",)) for arm in "abc")

    assert difference(a, b)["config"] == {"probe.accum": ["float32", "float16"]}
    assert difference(a, c)["config"]["policy"] == [None, "float32"]


def test_arms_whose_differences_cancel_are_not_equal():
    from precision_lab.runner.comparison import Side, difference, sentences

    config = ExperimentConfig(**EXPERIMENT).runs["float32"][0]
    a, b = (Side(name, config, ("done",) * 2, (), {"eval/accuracy": values}) for name, values in
            (("a", {0: 0.25, 1: 0.75}), ("b", {0: 0.75, 1: 0.25})))  # fmt: skip

    assert any("eval/accuracy: 0.5 to 0.5, +0.0 ± 6.4 over 2 seeds" in line for line in sentences(difference(a, b)))
    assert any("eval/accuracy: equal, 0.5" in line for line in sentences(difference(a, a)))


def test_diff_explains_another_environment(cli, monkeypatch):
    from precision_lab.runner import execute

    cli("run", "toy.yaml", "--arm", "float32")
    monkeypatch.setattr(execute, "fingerprint", lambda: {"jax": "9.9", "device": "cpu", "commit": None})
    cli("run", "toy.yaml", "--arm", "float32", "--out", "other")
    here, there = (json.loads(cli("ls", "--out", out, "--json")[1])[0] for out in ("runs", "other"))

    out = cli("diff", here["path"], there["path"])[1]

    assert "the configurations are the same" in out
    assert "jax: 1.2.3 for a, 9.9 for b" in out
    assert "eval/loss: equal" in out


def test_diff_of_two_experiments_goes_arm_by_arm(cli, tmp_path):
    (tmp_path / "fast.yaml").write_text(dump({**EXPERIMENT, "name": "fast", "optim": {"kind": "sgd", "lr": 0.2}}))
    cli("run", "toy.yaml")
    cli("run", "fast.yaml")

    found = json.loads(cli("diff", "toy.yaml", "fast.yaml", "--json")[1])

    assert [one["config"] for one in found] == [{"optim.lr": [0.1, 0.2]}] * 3
    assert cli("diff", "toy.yaml", "nonsense")[0] == 2


def test_query_prints_a_table_json_or_a_file(cli, tmp_path):
    cli("run", "toy.yaml")
    sql = "select arm, count(*) as n from arms group by arm order by arm"

    out = cli("query", sql)[1]
    data = json.loads(cli("query", sql, "--json")[1])
    written = json.loads(cli("query", sql, "--to", "x.csv", "--json")[1])

    assert "bfloat16" in out
    assert data == [{"arm": arm, "n": 3} for arm in sorted(EXPERIMENT["arms"])]
    assert written == {"wrote": "x.csv"}
    assert (tmp_path / "x.csv").read_text().splitlines()[0] == "arm,n"
    assert cli("query", sql, "--to", "x.xlsx")[0] == 2
    assert cli("query", "select nonsense")[0] == 2


def test_export_writes_one_run_where_it_is_told(cli, tmp_path):
    cli("run", "toy.yaml", "--smoke")
    run = json.loads(cli("ls", "--json")[1])[0]["run_id"]

    code, out, _ = cli("export", run, "--to", "csv", "-o", "sub/run.csv")

    assert (code, out.strip()) == (0, "wrote sub/run.csv")
    assert (tmp_path / "sub" / "run.csv").read_text().startswith("run_id,step,split,attempt")
    assert cli("export", run, "--to", "xlsx")[0] == 2


def test_a_torn_record_with_numbers_that_are_not_finite_can_be_read_by_everything(cli, training, tmp_path):
    training.last_loss = {"float16": float("nan"), "bfloat16": float("inf")}
    cli("run", "toy.yaml", "--smoke")
    for record in (tmp_path / "runs" / "trials").glob("*/metrics.jsonl"):
        record.write_text(record.read_text() + '{"step": 11, "spl')
    ids = {row["policy"]: row["run_id"] for row in json.loads(cli("ls", "--json")[1])}

    assert "eval/loss nan" in cli("show", ids["float16_mixed"])[1]
    assert "eval/loss inf" in cli("show", ids["bfloat16_mixed"])[1]
    assert cli("report", "toy.yaml", "--smoke")[0] == 0
    asked = json.loads(cli("query", "select arm, loss from metrics join arms using (run_id) where step = 10 "
                           "and metrics.split = 'eval'", "--json")[1])  # fmt: skip
    assert {row["arm"]: row["loss"] for row in asked}["float16"] == "nan"
    assert {row["arm"]: row["loss"] for row in asked}["bfloat16"] == "inf"
    assert "nan" in cli("ls")[1]
    assert "eval/loss: " in cli("diff", ids["float32"], ids["float16_mixed"])[1]


def test_gc_keeps_the_last_checkpoint_of_what_an_unfinished_run_begins_from(cli, tmp_path, training):
    training.failures = {"float16": RuntimeError("boom")}
    arms = {"first": {}, "second": {"policy": "float16_mixed", "start": {"arm": "first"}}}
    (tmp_path / "chain.yaml").write_text(dump({**EXPERIMENT, "arms": arms, "seeds": [0], "claims": [], "baseline": ""}))
    cli("run", "chain.yaml")
    (folder,) = (tmp_path / "runs" / "trials").glob("*-float32-*")
    for step in (4, 10):
        (folder / "checkpoints" / str(step)).mkdir()
    (tmp_path / "runs" / "trials" / "broken").mkdir()
    (tmp_path / "runs" / "trials" / "broken" / "config.yaml").write_text("model: nonsense")

    cli("gc", "--keep-last", "0", "--yes")

    assert [name for name in files(folder / "checkpoints") if name.isdecimal()] == ["10"]


def test_gc_shows_first_and_deletes_only_old_checkpoints_of_finished_runs(cli, tmp_path, training):
    training.failures, training.diverging = {"float16": RuntimeError("boom")}, {"bfloat16"}
    cli("run", "toy.yaml", "--smoke")
    for folder in (tmp_path / "runs" / "trials").iterdir():
        for step in (4, 8, 10):
            (folder / "checkpoints" / str(step)).mkdir()
            (folder / "checkpoints" / str(step) / "data").write_bytes(b"x" * 1000)
    left = {path: path.read_bytes() for path in (tmp_path / "runs").rglob("*") if path.is_file()}

    shown = cli("gc")[1]
    untouched = {path: path.read_bytes() for path in left if path.exists() and path.name != "index.sqlite"}
    data = json.loads(cli("gc", "--yes", "--json")[1])

    assert "1 run, 2 kB to free; nothing was deleted" in shown
    assert untouched == {path: content for path, content in left.items() if path.name != "index.sqlite"}
    assert (data["bytes"], data["freed_bytes"]) == (2000, 2000)
    for folder in (tmp_path / "runs" / "trials").iterdir():
        kept = ["10"] if "-float32-" in folder.name else ["10", "4", "8"]
        assert [name for name in files(folder / "checkpoints") if name.isdecimal()] == kept
    assert "0 runs, 0 B to free" in cli("gc")[1]

import json
import math
import sys
from pathlib import Path

import pytest

from precision_lab import runner
from precision_lab.runner import execute
from precision_lab.runner.summary import environments
from precision_lab.runner.yaml12 import dump
from tests.runner.fakes import EXPERIMENT, SilentProgress, loss_at

ALL = [(kind, seed, 0) for seed in range(3) for kind in ("float32", "float16", "bfloat16")]


def run(experiment=EXPERIMENT, **options):
    """Runs the toy experiment and returns its results and what was said."""
    said = []
    results = runner.run(experiment, say=said.append, **options)
    return results, said


def states(results):
    """Returns the state of every run, by arm."""
    return {arm: [one.state for one in results.of_arm(arm)] for arm in results.experiment.arms}


def metrics_of(results):
    """Returns every metric of every run, without the attempt it was logged in."""
    return {one.run_id: {name: (s.steps, s.values) for name, s in one.series.items()} for one in results.trials}


def test_every_arm_runs_with_every_seed_once(training):
    results, _ = run()

    assert training.trained == ALL
    assert all(state == ["done"] * 3 for state in states(results).values())
    assert results.exit_code == 0


def test_a_finished_experiment_runs_nothing_again(training, tmp_path):
    first, _ = run()
    training.trained.clear()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs" / "trials").rglob("*") if path.is_file()}

    again, said = run()

    assert training.trained == []
    assert said == ["9 of 9 runs are finished already and are reused."]
    assert metrics_of(again) == metrics_of(first)
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_only_what_is_still_to_run_is_checked(training):
    run(arms=["float32"])
    training.refused = {"float32": "was checked again"}

    run(arms=["float32"])

    with pytest.raises(ValueError, match="was checked again"):
        run({**EXPERIMENT, "seeds": [0, 9]}, arms=["float32"])


def test_one_more_seed_or_arm_runs_only_what_is_new(training):
    run()
    training.trained.clear()

    run({**EXPERIMENT, "seeds": [0, 1, 2, 3]})
    run({**EXPERIMENT, "arms": {**EXPERIMENT["arms"], "more": {"optim": {"lr": 1.0}}}, "seeds": [0]})

    assert training.trained == [("float32", 3, 0), ("float16", 3, 0), ("bfloat16", 3, 0), ("float32", 0, 0)]


def test_arms_that_are_equal_share_their_runs(training):
    results, _ = run({**EXPERIMENT, "arms": {"a": {}, "b": {"policy": "float32"}}, "claims": []})

    assert training.trained == [("float32", seed, 0) for seed in range(3)]
    assert states(results) == {"a": ["done"] * 3, "b": ["done"] * 3}


def test_an_interrupted_run_goes_on_from_its_checkpoint_to_the_same_numbers(training, tmp_path):
    whole, _ = run(out="whole")
    training.trained.clear()
    training.failures = {"float16": KeyboardInterrupt()}

    with pytest.raises(KeyboardInterrupt):
        run()
    interrupted = runner.read(whole.experiment)
    training.failures = {}
    results, _ = run()

    assert interrupted.trial("float16", 0).state == "interrupted"
    assert interrupted.trial("bfloat16", 0).state == "queued"
    assert ("float16", 0, 4) in training.trained  # saved at step 4, interrupted at 7
    assert metrics_of(results) == metrics_of(whole)
    rows = results.trial("float16", 0).path.joinpath("metrics.jsonl").read_text().splitlines()
    attempts = [json.loads(row)["attempt"] for row in rows]
    assert attempts == [1] * 10 + [2] * 12  # two splits at steps 0 to 4, then at 5 to 10


def test_a_crash_is_recorded_and_the_others_go_on(training):
    training.failures = {"float16": RuntimeError("the <GPU> fell\noff the bus")}

    results, said = run()

    assert states(results) == {"float32": ["done"] * 3, "float16": ["failed"] * 3, "bfloat16": ["done"] * 3}
    assert results.exit_code == 3
    failed = results.trial("float16", 1)
    assert failed.error == "RuntimeError: the <GPU> fell off the bus"
    log = (failed.path / "logs" / "attempt-1.log").read_text()
    assert "Traceback" in log
    assert "the <GPU> fell" in log
    assert sum("float16, seed" in line and "failed" in line for line in said) == 3
    assert [one.verdict for one in results.verdicts] == ["inconclusive"]
    assert "failed" in results.verdicts[0].because


def test_only_the_crashed_runs_are_tried_again(training):
    training.failures = {"float16": RuntimeError("boom")}
    run()
    training.trained.clear()
    training.failures = {}

    results, _ = run()

    assert training.trained == [("float16", seed, 4) for seed in range(3)]
    assert results.exit_code == 0
    assert [one.attempt for one in results.of_arm("float16")] == [2, 2, 2]


def test_a_diverged_run_is_a_result_and_is_not_tried_again(training):
    training.diverging = {"float16"}
    results, _ = run()
    training.trained.clear()

    again, _ = run()

    assert training.trained == []
    assert (results.exit_code, again.exit_code) == (4, 4)
    assert again.verdicts[0].verdict == "inconclusive"
    assert "diverged at step 7" in again.verdicts[0].because


def test_failures_count_more_than_divergence(training):
    training.diverging, training.failures = {"float16"}, {"bfloat16": RuntimeError("boom")}

    assert run()[0].exit_code == 3


@pytest.mark.parametrize("last", [math.nan, math.inf])
def test_a_last_value_that_is_not_finite_is_kept_and_decides_nothing(training, last):
    training.last_loss = {"float16": last}

    results, _ = run()

    assert str(results.trial("float16", 0).value("eval/loss")) == str(last)
    assert results.verdicts[0].verdict == "inconclusive"


def test_claims_are_judged_on_what_the_runs_logged(training):
    claims = [
        {"kind": "gt", "a": "float16", "b": "float32", "metric": "eval/loss", "margin": 0.4},
        {"kind": "gt", "a": "bfloat16", "b": "float32", "metric": "eval/loss", "margin": 0.4},
        {"kind": "close", "a": "bfloat16", "b": "float32", "metric": "eval/loss", "margin": 0.02},
        {"kind": "above", "a": "float32", "metric": "train/loss_scale", "reduce": "max", "value": 1023},
        {"kind": "monotone", "arms": ["float32", "bfloat16", "float16"], "metric": "train/loss", "reduce": "mean"},
    ]

    results, _ = run({**EXPERIMENT, "claims": claims})

    verdicts = [one.verdict for one in results.verdicts]
    assert verdicts == ["reproduced", "not_reproduced", "reproduced", "reproduced", "reproduced"]
    assert results.verdicts[0].numbers["float16 - float32"] == pytest.approx([0.5] * 3, rel=0.03)


def test_a_refused_arm_leaves_no_trace(training, tmp_path):
    training.refused = {"float16": "1 of 1 rules matched no site: '**/haed/**'. Nearest: 'head'."}

    with pytest.raises(ValueError, match=r"arms\.float16\.policy: arm 'float16': 1 of 1 rules matched no site"):
        run()

    assert list(tmp_path.iterdir()) == []
    assert training.trained == []


def test_a_refused_arm_is_located_in_its_file(training, tmp_path):
    training.refused = {"float16": "a rule matched nothing."}
    path = tmp_path / "c.yaml"
    path.write_text(dump(EXPERIMENT))
    line = next(i for i, text in enumerate(path.read_text().splitlines(), 1) if "policy: float16_mixed" in text)

    with pytest.raises(ValueError, match=rf"c\.yaml:{line}: arms\.float16\.policy: arm 'float16': a rule"):
        run(path)


@pytest.mark.parametrize(
    ("key", "value"), [("evals", {"half": "float16"}), ("transforms", [{"kind": "store", "format": "float16"}])]
)
def test_what_is_refused_besides_the_policy_is_located_where_it_is_given(training, key, value):
    training.refused = {"float16": f"{key}.0: no."}
    arms = {**EXPERIMENT["arms"], "float16": {"policy": "float16_mixed", key: value}}

    with pytest.raises(ValueError, match=rf"arms\.float16\.{key}: arm 'float16': {key}\.0: no\."):
        run({**EXPERIMENT, "arms": arms})


def test_data_that_cannot_be_had_leaves_no_trace(training, tmp_path, monkeypatch):
    import precision_lab.data

    def missing(config):
        raise ValueError("data/mnist.gz: sha256 is 00, expected ff. Delete the file and run again.")

    monkeypatch.setattr(precision_lab.data, "load", missing)
    with pytest.raises(ValueError, match="sha256"):
        run()

    assert list(tmp_path.iterdir()) == []


def test_a_run_directory_of_another_configuration_stops_everything_before_it_starts(training, tmp_path):
    results, _ = run(arms=["bfloat16"])
    config = results.trial("bfloat16", 2).path / "config.yaml"
    config.write_text(config.read_text().replace("hidden: [4]", "hidden: [5]"))
    training.trained.clear()
    before = sorted(tmp_path.rglob("*"))

    with pytest.raises(ValueError, match="another configuration"):
        run()

    assert training.trained == []
    assert sorted(tmp_path.rglob("*")) == before


def test_results_of_another_environment_are_reused_with_a_warning(training, monkeypatch):
    run()
    monkeypatch.setattr(execute, "fingerprint", lambda: {"jax": "1.2.4", "device": "cpu", "commit": None})

    _, said = run()

    assert said[-1] == (
        "warning: 9 runs come from another environment (jax 1.2.3, here 1.2.4); --out NEW runs them afresh."
    )


def test_a_run_that_went_on_in_another_environment_shows_both(training, monkeypatch):
    training.failures = {"float32": RuntimeError("boom")}
    run()
    training.failures = {}
    monkeypatch.setattr(execute, "fingerprint", lambda: {"jax": "1.2.4", "device": "cpu", "commit": None})

    results, _ = run(arms=["float32"])
    _, said = run(arms=["float32"])

    assert environments(results)["jax"] == ["1.2.3", "1.2.4"]
    assert said[-1].startswith("warning: 3 runs come from another environment (jax 1.2.3, here 1.2.4);")


def test_a_run_held_by_another_process_comes_last_and_is_not_repeated(training, monkeypatch):
    from precision_lab.runner.rundir import BusyError, RunDir

    claim, refused = RunDir.claim, []
    first = execute.plan(runner.load(EXPERIMENT), Path("runs"))[0].run.id

    def busy_once(self, config, *, wait):
        if self.id == first and not wait:
            refused.append(self.id)
            raise BusyError(self.id)
        return claim(self, config, wait=wait)

    monkeypatch.setattr(RunDir, "claim", busy_once)
    _, said = run()

    assert refused == [first]
    assert training.trained == [*ALL[1:], ALL[0]]
    assert not any("failed" in line for line in said)


def test_progress_hears_how_every_run_ended(training):
    training.diverging, training.failures = {"float16"}, {"bfloat16": RuntimeError("boom")}

    run()

    assert SilentProgress.ended == ["done", "diverged", "failed"] * 3


def test_the_results_are_plain_rows_with_the_numbers_of_the_runs(training):
    results, _ = run()

    row = next(row for row in results.to_dicts() if (row["arm"], row["seed"]) == ("float16", 2))

    assert row["eval/loss"] == loss_at(results.trial("float16", 2).config, 10)
    assert row["state"] == "done"
    assert "float16" in str(results.table())
    json.dumps(results.to_json(), allow_nan=False)


def test_a_frame_without_pandas_says_what_to_install(training, monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    results, _ = run()

    with pytest.raises(ImportError, match=r"pip install 'precision-lab\[notebook\]'.*to_dicts"):
        results.frame()


def test_the_folder_of_results_is_an_experiment_itself(training, tmp_path):
    results, _ = run()
    training.trained.clear()

    again, _ = run(results.folder)

    assert training.trained == []
    assert again.experiment == results.experiment
    names = {path.name for path in results.folder.iterdir()}
    assert names == {"experiment.yaml", "report.html", "report.md", "results.csv", "trials.json", "verdicts.json"} | {
        "table.csv",
        "table.tex",
    }


@pytest.mark.parametrize(
    ("error", "line", "key"),
    [("evals.low: rule '**/no/**' matched no site", 4, "evals"), ("a rule matched no site", 3, "policy")],
)
def test_what_cannot_start_is_told_where_it_is_written(training, tmp_path, error, line, key):
    arms = "arms:\n  float32:\n    policy: float32\n    evals: {low: bfloat16_mixed}\n"
    rest = {key: value for key, value in EXPERIMENT.items() if key not in ("arms", "claims")}
    (tmp_path / "toy.yaml").write_text(arms + dump(rest))
    training.refused["float32"] = error

    with pytest.raises(ValueError, match=rf"^toy\.yaml:{line}: arms\.float32\.{key}: arm 'float32': "):
        run("toy.yaml")

"""Arms that begin where another arm ended."""

from pathlib import Path

import pytest

from precision_lab import runner
from precision_lab.runner import execute
from precision_lab.runner.identity import run_id
from precision_lab.runner.order import Order
from precision_lab.runner.rundir import BusyError, RunDir
from precision_lab.runner.summary import varied
from tests.runner.fakes import EXPERIMENT

CHAIN = {
    **EXPERIMENT,
    "arms": {
        "last": {"start": {"arm": "middle"}, "policy": "bfloat16_mixed"},
        "middle": {"start": {"arm": "first"}, "policy": "float16_mixed"},
        "first": {"train": {"steps": 8}},
    },
    "seeds": [0, 1],
    "baseline": "first",
    "claims": [],
}


def load(arms, **changes):
    return runner.load({**CHAIN, "baseline": "", "arms": arms, **changes})


def run(experiment=CHAIN, **options):
    said = []
    return runner.run(experiment, say=said.append, **options), said


def test_a_run_holds_the_whole_run_that_it_begins_from_at_its_own_seed():
    runs = runner.load(CHAIN).runs

    assert runs["last"][1].start.run == runs["middle"][1]
    assert runs["middle"][1].start.run == runs["first"][1]
    assert runs["first"][1].seed == 1
    longer = runner.load({**CHAIN, "arms": {**CHAIN["arms"], "first": {"train": {"steps": 9}}}}).runs
    assert run_id(longer["last"][1]) != run_id(runs["last"][1])


def test_runs_come_after_those_they_begin_from_and_find_their_checkpoints(training, tmp_path):
    results, _ = run()

    assert [kind for kind, _, _ in training.trained] == ["float32", "float16", "bfloat16"] * 2
    ids = {(one.arm, one.seed): one.run_id for one in results.trials}
    folders = [path and (path.parent.name, path.name) for path in training.starts]
    assert folders == [
        folder
        for seed in (0, 1)
        for folder in (None, (ids["first", seed], "checkpoints"), (ids["middle", seed], "checkpoints"))
    ]


def test_the_resolved_configuration_of_a_run_reads_back_as_the_same_run(training):
    results, _ = run()

    for one in results.trials:
        assert run_id(RunDir(one.path).config()) == one.run_id


def test_choosing_an_arm_chooses_those_it_starts_from(training):
    results, _ = run(arms=["middle"], seeds=[1])

    assert sorted(results.experiment.arms) == ["first", "middle"]
    assert [kind for kind, _, _ in training.trained] == ["float32", "float16"]


@pytest.mark.parametrize(
    ("breaks", "words"),
    [
        ({"failures": {"float16": RuntimeError("out of paper")}}, "failed: RuntimeError: out of paper"),
        ({"diverging": {"float16"}}, "diverged at step 7"),
    ],
)
def test_what_begins_from_a_run_that_did_not_end_well_fails_and_says_so(training, breaks, words):
    for name, value in breaks.items():
        setattr(training, name, value)

    results, _ = run(seeds=[0])

    assert results.trial("last", 0).state == "failed"
    assert f"it starts from arm 'middle', which {words}" in results.trial("last", 0).error
    assert "bfloat16" not in {kind for kind, _, _ in training.trained}


@pytest.mark.parametrize(
    ("arms", "words"),
    [
        ({"a": {}, "b": {"start": {"arm": "aa"}}}, "arms.b.start.arm: no arm 'aa'; did you mean 'a'?"),
        ({"a": {"start": {"arm": "b"}}, "b": {"start": {"arm": "a"}}}, "start from one another: a -> b -> a"),
        ({"a": {"start": {"arm": "a"}}}, "start from one another: a -> a"),
        ({"a": {}, "b": {"start": {}}}, "give start.arm"),
        ({"a": {"train": {"steps": 0}}, "b": {"start": {"arm": "a"}}}, "trains nothing and saves nothing"),
        ({"a": {}, "b": {"start": {"arm": "a"}, "model": {"hidden": [5]}}}, "trains another model"),
        ({"a": {"data": "mnist"}, "b": {"start": {"arm": "a"}}}, "learns data of another shape"),
    ],
)
def test_a_start_that_cannot_be_is_refused_where_it_was_written(arms, words):
    with pytest.raises(ValueError, match=r"start") as caught:
        load(arms, claims=[])

    assert words in str(caught.value)


def test_a_start_that_all_arms_share_can_be_switched_off_in_one():
    experiment = load({"a": {"start": None}, "b": {}}, start={"arm": "a"}, claims=[])

    assert experiment.runs["a"][0].start is None
    assert experiment.runs["b"][0].start.run == experiment.runs["a"][0]


def test_reports_name_the_arm_in_place_of_its_configuration(training):
    results, _ = run(seeds=[0])

    assert varied(results)["middle"]["start.arm"] == "first"
    assert not any("run" in key for changes in varied(results).values() for key in changes)


def test_a_run_of_no_steps_logs_evaluations_under_each_policy_and_no_training():
    arms = {"a": {}, "b": {"start": {"arm": "a"}, "train": {"steps": 0}, "evals": {"int4": "weight=int4@channel"}}}

    known = load(arms, claims=[]).known_metrics(["b"])

    assert "eval_int4/loss" in known
    assert not any(name.startswith("train/") for name in known)


def test_a_column_may_be_of_a_metric_that_only_some_arms_log(training):
    arms = {"a": {}, "b": {"evals": {"half": "float16"}}}

    results, _ = run({**CHAIN, "baseline": "", "arms": arms, "metrics": ["eval/loss", "eval_half/loss"], "seeds": [0]})

    assert results.rows[0].cells["eval_half/loss"].mean is None
    with pytest.raises(ValueError, match="no metric 'eval_hal/loss'; did you mean 'eval_half/loss'"):
        load(arms, metrics=["eval_hal/loss"], claims=[])


@pytest.mark.parametrize(
    ("first", "merge", "words"),
    [
        (
            {"lora": {"rank": 2}},
            False,
            "start.arm: .* ends with adapters beside its weights: merge: true",
        ),
        ({}, True, "start.merge: arm 'a' ends with no adapters to merge"),
    ],
)
def test_adapters_are_merged_where_there_are_any_and_nowhere_else(first, merge, words):
    with pytest.raises(ValueError, match=words):
        load({"a": first, "b": {"start": {"arm": "a", "merge": merge}}}, claims=[])

    assert load({"a": first, "b": {"start": {"arm": "a", "merge": not merge}}}, claims=[]).size() == 4


def test_tables_leave_cells_empty_where_an_arm_logs_no_such_metric(training):
    arms = {"a": {}, "b": {"evals": {"half": "float16"}}}
    experiment = {**CHAIN, "baseline": "", "arms": arms, "metrics": ["eval/loss", "eval_half/loss"], "seeds": [0]}

    results, _ = run(experiment)

    a, b = (row.cells["eval_half/loss"] for row in results.rows)
    assert (a.text, b.text) == ("", "✗")  # the stand-in for training logs no such metric for b either


@pytest.fixture
def chains(tmp_path):
    """First, middle and last of two seeds, as they are planned."""
    return execute.plan(runner.load(CHAIN), tmp_path)


def taken(order):
    """Returns what may go now, in turn."""
    return [one[0].label for one in iter(order.take, None)]


def test_no_run_is_handed_out_before_the_one_it_begins_from_has_ended(chains):
    order = Order(chains)

    assert taken(order) == ["first, seed 0", "first, seed 1"]
    order.ended(chains[3])
    assert taken(order) == ["middle, seed 1"]
    order.ended(chains[0])
    assert taken(order) == ["middle, seed 0"]
    for one in (chains[1], chains[4]):
        order.ended(one)
    assert taken(order) == ["last, seed 0", "last, seed 1"]
    assert order
    for one in (chains[2], chains[5]):
        order.ended(one)
    assert not order


def test_what_a_run_begins_from_need_not_be_ours_to_run(chains):
    """The run itself tells what is wrong with its beginning."""
    assert taken(Order(chains[1:2])) == ["middle, seed 0"]


def test_a_run_of_another_command_comes_last_and_what_begins_from_it_after_it(chains):
    order = Order(chains)
    first, wait = order.take()
    order.held(first)

    assert (first, wait) == (chains[0], False)
    assert order.take() == (chains[3], False)
    assert order.take() is None, "to wait would take the place of what can go on"
    order.ended(chains[3])
    assert order.take() == (chains[4], False)
    order.ended(chains[4])
    assert order.take() == (chains[5], False)
    order.ended(chains[5])
    assert order.take() == (chains[0], True)
    order.ended(chains[0])
    assert order.take() == (chains[1], False)
    order.held(chains[1])
    assert order.take() == (chains[1], True), "what begins from it waits with it"


def test_of_runs_that_may_all_go_the_last_one_is_waited_for_at_once(chains):
    order = Order([chains[0], chains[3]])

    assert [order.take() for _ in range(2)] == [(chains[0], False), (chains[3], True)]


def test_waves_are_as_few_as_the_longest_chain_asks_for(chains):
    """A run whose beginning is finished already goes in the first one."""
    order = Order([chains[0], chains[1], *chains[4:]])
    waves = [[one.label for one in wave] for wave in order.waves()]

    assert waves == [["first, seed 0", "middle, seed 1"], ["middle, seed 0", "last, seed 1"]]
    assert not order


def test_what_begins_from_a_run_whose_process_has_died_is_not_tried_before_that_is_taken_up(training, monkeypatch):
    """The other process holds the first run when its turn comes, and is gone when that of the next one comes."""
    claim, first = RunDir.claim, execute.plan(runner.load({**CHAIN, "seeds": [0]}), Path("runs"))[0].run.id

    def busy_once(self, config, *, wait):
        if self.id == first and not wait:
            raise BusyError(self.id)
        return claim(self, config, wait=wait)

    monkeypatch.setattr(RunDir, "claim", busy_once)
    said = []
    results = runner.run({**CHAIN, "seeds": [0]}, out="runs", say=said.append)

    assert {one.state for one in results.trials} == {"done"}
    assert not any("failed" in line for line in said)

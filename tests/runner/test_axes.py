"""A sweep is arms: their number, names and settings, and every mistake on one line."""

import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from precision_lab import runner
from precision_lab.runner.axes import parse_seeds, text_of
from precision_lab.runner.yaml12 import dump, parse
from tests.runner.fakes import EXPERIMENT
from tests.runner.test_loading import JUNK, paths_in, with_value

PLAIN = {key: value for key, value in EXPERIMENT.items() if key not in ("arms", "claims")}
POLICIES = ["weight=int2@channel", "weight=int4@channel"]

CONFIG = """\
name: toy
model: {kind: mlp, hidden: [4]}
data: {kind: digits, batch: 8}
optim: {kind: sgd, lr: 1e-3}
train: {steps: 10}
sweep:
  bits: {axis: {policy: ["weight=int2@channel", "weight=int4@channel"]}, labels: [2, 4]}
  size: {axis: {data.batch: [8, 16], train.steps: [10, 20]}, mode: zip}
  optim.lr: [1e-3, 3e-3]
  exclude: [{bits: 2, lr: 3e-3}]
  max_trials: 12
seeds: 0..1
claims:
  - {kind: gt, a: "bits=2,size=8+10,lr=0.001", b: "bits=4,size=8+10,lr=0.001", metric: eval/loss}
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Writes the config with one piece of text replaced by another, and returns its path."""
    monkeypatch.chdir(tmp_path)

    def write(old="", new=""):
        assert old in CONFIG
        (tmp_path / "c.yaml").write_text(CONFIG.replace(old, new, 1))
        return "c.yaml"

    return write


def test_axes_multiply_and_arms_are_named_by_their_values(config):
    found = runner.load(config())

    expected = [
        (bits, size, lr)
        for bits, size, lr in itertools.product((2, 4), ((8, 10), (16, 20)), ("0.001", "0.003"))
        if not (bits == 2 and lr == "0.003")
    ]
    assert list(found.arms) == [f"bits={bits},size={size[0]}+{size[1]},lr={lr}" for bits, size, lr in expected]
    for arm, (bits, (batch, steps), lr) in zip(found.arms, expected, strict=True):
        run = found.runs[arm][1]
        assert (f"int{bits}" in run.policy, run.data.batch, run.train.steps) == (True, batch, steps)
        assert run.optim.lr == float(lr)
        assert found.points[arm] == {"bits": bits, "size": f"{batch}+{steps}", "lr": float(lr)}
    assert found.axes == {"bits": [2, 4], "size": ["8+10", "16+20"], "lr": [0.001, 0.003]}
    assert (found.size(), found.seeds) == (12, (0, 1))


def test_keys_of_one_axis_multiply_unless_they_are_zipped():
    grid = {"axis": {"optim.lr": [0.1, 0.2], "data.batch": [8, 16, 32]}}

    assert len(runner.load({**PLAIN, "sweep": {"x": grid}}).arms) == 6
    assert "lr=0.2,batch=8" in runner.load({**PLAIN, "sweep": {"x": grid}}).arms


def test_given_arms_multiply_too_and_claims_about_them_are_judged_everywhere():
    found = runner.load({**EXPERIMENT, "baseline": "float16", "sweep": {"optim.lr": [0.1, 0.2]}})

    assert list(found.arms) == [f"{arm},lr={lr}" for arm in EXPERIMENT["arms"] for lr in (0.1, 0.2)]
    assert [(claim.a, claim.b) for claim in found.claims] == [
        ("float16,lr=0.1", "float32,lr=0.1"),
        ("float16,lr=0.2", "float32,lr=0.2"),
    ]
    assert found.baseline_arm == "float16,lr=0.1"


def test_arms_are_compared_with_the_baseline_at_the_same_point():
    both = runner.load({**EXPERIMENT, "sweep": {"optim.lr": [0.1, 0.2], "data.batch": [8, 16]}})
    some = runner.load({**EXPERIMENT, "sweep": {"lr": {"axis": {"optim.lr": [0.1, 0.2]}, "arms": ["float16"]}}})
    alone = runner.load({**PLAIN, "sweep": {"optim.lr": [0.1, 0.2]}})

    assert both.baseline_of("float16,lr=0.2,batch=8") == "float32,lr=0.2,batch=8"
    assert both.baseline_of("float32,lr=0.2,batch=8") == "float32,lr=0.1,batch=8"
    assert both.baseline_name == "float32"
    assert {some.baseline_of(arm) for arm in some.arms} == {"float32"}
    assert (alone.baseline_of("lr=0.2"), alone.baseline_name) == ("lr=0.1", "lr=0.1")
    assert runner.load(EXPERIMENT).baseline_of("float16") == "float32"


def test_an_axis_may_leave_some_arms_alone():
    sweep = {"lr": {"axis": {"optim.lr": [0.1, 0.2]}, "arms": ["float16"]}}

    found = runner.load({**EXPERIMENT, "sweep": sweep})

    assert list(found.arms) == ["float32", "float16,lr=0.1", "float16,lr=0.2", "bfloat16"]
    assert [(claim.a, claim.b) for claim in found.claims] == [(f"float16,lr={lr}", "float32") for lr in (0.1, 0.2)]


def load(sweep, **changes):
    return runner.load({**PLAIN, "seeds": [0], "sweep": sweep, **changes})


CHAIN = {"arms": {"a": {}, "b": {"start": {"arm": "a"}}, "c": {"start": {"arm": "b"}, "policy": "bfloat16_mixed"}}}


def starts(experiment):
    return {arm: seeds[0].start and seeds[0].start.arm for arm, seeds in experiment.runs.items()}


def test_an_arm_that_starts_from_another_starts_from_it_at_its_own_combination():
    swept = load({"optim.lr": [0.1, 0.2], "batch": {"axis": {"data.batch": [8, 16]}, "arms": ["b", "c"]}}, **CHAIN)

    assert starts(swept) == {
        **{f"a,lr={lr}": None for lr in (0.1, 0.2)},
        **{f"b,lr={lr},batch={batch}": f"a,lr={lr}" for lr in (0.1, 0.2) for batch in (8, 16)},
        **{f"c,lr={lr},batch={batch}": f"b,lr={lr},batch={batch}" for lr in (0.1, 0.2) for batch in (8, 16)},
    }
    for seeds in swept.runs.values():
        assert seeds[0].start is None or seeds[0].start.run.optim.lr == seeds[0].optim.lr
    again = load({"train.steps": [5, 10]}, **{key: swept.to_dict()[key] for key in ("arms",)})
    assert starts(again)["b,lr=0.1,batch=8,steps=5"] == "a,lr=0.1,steps=5"


def test_a_start_that_all_arms_share_follows_the_sweep_too():
    swept = load({"optim.lr": [0.1, 0.2]}, start={"arm": "a"}, arms={"a": {"start": None}, "b": {}})

    assert starts(swept) == {"a,lr=0.1": None, "a,lr=0.2": None, "b,lr=0.1": "a,lr=0.1", "b,lr=0.2": "a,lr=0.2"}


def test_where_the_sweep_made_several_arms_to_start_from_one_is_named():
    axis = {"lr": {"axis": {"optim.lr": [0.1, 0.2]}, "arms": ["a"]}}
    named = {"a": {}, "b": {"start": {"arm": "a,lr=0.2"}}}

    assert starts(load(axis, arms=named))["b"] == "a,lr=0.2"
    with pytest.raises(
        ValueError, match=r"arms.b.start.arm: the sweep made several of arm 'a', .*: a,lr=0.1, a,lr=0.2"
    ):
        load(axis, arms={"a": {}, "b": {"start": {"arm": "a"}}})


def test_an_axis_over_what_an_arm_cannot_have_is_refused():
    dot = {"probe": {"kind": "dot_product", "length": 8}}

    with pytest.raises(ValueError, match=r"^sweep.optim.lr: arm 'p' is a probe, which has no optim; 'arms' under"):
        load({"optim.lr": [0.1, 0.2]}, arms={"a": {}, "p": dot})
    with pytest.raises(ValueError, match=r"^sweep.probe.length: arm 'a' is a training, which has no probe; 'arms'"):
        load({"probe.length": [8, 16]}, arms={"a": {}, "p": dot})
    probes = load({"probe": [{"kind": "dot_product", "length": 8}, {"kind": "dot_product", "length": 16}]})
    assert {seeds[0].probe.length for seeds in probes.runs.values()} == {8, 16}


def test_python_command_line_and_file_make_the_same_runs(config):
    swept = runner.load({**EXPERIMENT, "sweep": {"optim.lr": [0.1, 0.2], "data.batch": [8, 16]}})
    python = runner.load(EXPERIMENT).axis("optim.lr", [0.1, 0.2]).axis("data.batch", [8, 16])
    options = runner.load(EXPERIMENT, axes=["optim.lr=0.1,2e-1", "data.batch=[8, 16]"])

    mapping = runner.load(EXPERIMENT, axes={"optim.lr": [0.1, 0.2], "data.batch": (8, 16)})

    assert python.runs == swept.runs == options.runs == mapping.runs
    assert python.points == swept.points
    assert runner.ExperimentConfig(**{**PLAIN, "sweep": {"optim.lr": [0.1]}}).arms.keys() == {"lr=0.1"}


def test_an_axis_in_python_keeps_to_the_limit_of_the_file(training):
    limited = runner.load({**EXPERIMENT, "max_trials": 9}).axis("optim.lr", [0.1, 0.2])

    with pytest.raises(ValueError, match=r"18 runs .* max_trials is 9"):
        runner.run(limited)


def test_a_swept_experiment_survives_its_own_yaml(config, tmp_path):
    found = runner.load(config())
    (tmp_path / "again.yaml").write_text(dump(found.to_dict()))

    assert runner.load("again.yaml") == found
    assert runner.load("again.yaml").id == found.id
    assert runner.load("again.yaml").axes == found.axes


def test_one_more_value_only_adds_runs(config):
    few = runner.load(config())
    more = runner.load(config("[1e-3, 3e-3]", "[1e-3, 3e-3, 1e-2]"), settings=["sweep.max_trials=99"])

    assert {arm: runs for arm, runs in more.runs.items() if arm in few.runs} == few.runs
    assert more.size() == few.size() + 4 * 2


def test_a_finished_sweep_runs_nothing_and_one_more_value_or_seed_only_what_is_new(training):
    def run(lrs, seeds):
        training.trained.clear()
        sweep = {"optim.lr": lrs}
        runner.run({**EXPERIMENT, "sweep": sweep, "seeds": seeds, "claims": []}, say=lambda line: None)
        return len(training.trained)

    assert run([0.1, 0.2], [0, 1]) == 3 * 2 * 2
    assert run([0.1, 0.2], [0, 1]) == 0
    assert run([0.1, 0.2, 0.3], [0, 1]) == 3 * 2
    assert run([0.1, 0.2, 0.3], [0, 1, 2]) == 3 * 3


def test_an_option_takes_the_place_of_the_files_axis(config):
    found = runner.load(config(), axes=["optim.lr=1e-3"])

    assert list(found.arms) == [f"bits={bits},size={size},lr=0.001" for bits in (2, 4) for size in ("8+10", "16+20")]
    assert found.words == ("c.yaml", "--axis", "optim.lr=1e-3")


def test_seeds_of_an_experiment_can_be_counted():
    assert runner.load(EXPERIMENT).with_seeds(4).seeds == (0, 1, 2, 3)
    assert runner.load(EXPERIMENT).with_seeds([7, 9]).seeds == (7, 9)
    assert parse_seeds("0,2..4") == [0, 2, 3, 4]


def test_selecting_a_given_arm_selects_all_that_the_sweep_made_of_it():
    swept = load(
        {"optim.lr": [0.1, 0.2]}, arms={"a": {}, "b": {"policy": "bfloat16_mixed"}, "c": {"start": {"arm": "b"}}}
    )

    assert list(swept.select(arms=["b"]).arms) == ["b,lr=0.1", "b,lr=0.2"]
    assert list(swept.select(arms=["c"]).arms) == ["b,lr=0.1", "b,lr=0.2", "c,lr=0.1", "c,lr=0.2"]
    several = swept.select(arms=["a", "b"])
    assert list(several.arms) == ["a,lr=0.1", "a,lr=0.2", "b,lr=0.1", "b,lr=0.2"]
    one = swept.select(arms=["b,lr=0.2", "b,lr=0.1"])
    assert [one.baseline_of(arm) for arm in ("b,lr=0.1", "b,lr=0.2")] == ["a,lr=0.1", "a,lr=0.2"]
    with pytest.raises(ValueError, match="no arm 'bb' in toy; did you mean 'b'"):
        swept.select(arms=["bb"])


def test_selecting_an_arm_of_a_sweep_keeps_its_point(config):
    found = runner.load(config(), arms=["bits=4,size=8+10,lr=0.003"])

    assert found.axes == {"bits": [4], "size": ["8+10"], "lr": [0.003]}
    assert found.words[-2:] == ("--arm", "bits=4,size=8+10,lr=0.003")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1e-3, "0.001"),
        (True, "true"),
        (None, "none"),
        ([128, 64], "128x64"),
        ("weight=int4@group32,activation=int8@token", "int4@group32+int8@token"),
        ({"kind": "dynamic", "init": 4}, "dynamic+init4"),
        ("w8a8;**/head/**:weight=none", "w8a8+head+none"),
        ("../..", "none"),
    ],
)
def test_a_value_is_a_readable_and_safe_part_of_a_name(value, text):
    assert text_of(value) == text


def test_a_long_value_is_cut_and_stays_unique():
    long = ["weight=int4@channel;" + f"**/{'x' * 60}{i}/**:weight=none" for i in range(2)]

    names = [text_of(value) for value in long]

    assert len(set(names)) == 2
    assert all(len(name) <= 48 for name in names)


MISTAKES = [
    ("optim.lr: [1e-3, 3e-3]", "lr: {axis: {optim.lrr: [1]}}", r"c.yaml:9: sweep.lr.axis.optim.lrr\[0\]: .*'lr'\?.*"),
    ("[1e-3, 3e-3]", "[1e-3, fast]", r"c.yaml:9: sweep.optim.lr\[1\]: expected a number, got 'fast' \(in arm '.*'\)\."),
    ("[1e-3, 3e-3]", "[1e-3, 1e-3]", r"c.yaml:9: sweep.optim.lr\[1\]: 0.001 is listed twice\."),
    ("[1e-3, 3e-3]", "[]", r"c.yaml:9: sweep.optim.lr: expected a list of values, got \[\]\."),
    ("optim.lr: [1e-3, 3e-3]", "optm.lr: [1]", r"c.yaml:9: sweep.optm.lr: unknown key; did you mean 'optim'\?"),
    ("optim.lr: [1e-3, 3e-3]", "lr: 3", r"c.yaml:9: sweep.lr: an axis is a list of values, or .*; got 3\."),
    ("optim.lr: [1e-3, 3e-3]", "seed: [1, 2]", r"c.yaml:9: sweep.seed: seeds are no axis; list them in 'seeds'.*"),
    ("optim.lr: [1e-3, 3e-3]", "train.steps: [5]", r"c.yaml:9: sweep.train.steps: .* set by the axis 'size' already\."),
    ("optim.lr: [1e-3, 3e-3]", "train: [{steps: 5}]", r"c.yaml:9: sweep.train: .* set by the axis 'size' already\."),
    ("mode: zip", "mode: zipp", r"c.yaml:8: sweep.size.mode: unknown value 'zipp'; did you mean 'zip'\?"),
    ("mode: zip", "mod: zip", r"c.yaml:8: sweep.size.mod: unknown key; did you mean 'mode'\?"),
    ("mode: zip", "labels: [1, 2]", r"c.yaml:8: sweep.size.labels: labels are for an axis of one key.*"),
    ("train.steps: [10, 20]", "train.steps: [10]", r"c.yaml:8: sweep.size.axis: zipped keys need .* 2,.* 1\."),
    ("labels: [2, 4]", "labels: [2]", r"c.yaml:7: sweep.bits.labels: expected a list of 2, .* got \[2\]\."),
    ("labels: [2, 4]", "labels: [2, 2]", r"c.yaml:7: sweep.bits.axis: two values are called '2'; .*"),
    ("labels: [2, 4]", "labels: [2, a/b]", r"c.yaml:7: sweep.bits.labels\[1\]: 'a/b' cannot be part of a name\."),
    ("labels: [2, 4]", "arms: [x]", r"c.yaml:7: sweep.bits: arms: no arm 'x'; arms: run\."),
    ("bits: {axis", "b/its: {axis", r"c.yaml:7: sweep.b/its: 'b/its' cannot be the name of an axis.*"),
    ("{bits: 2, lr: 3e-3}", "{bit: 2}", r"c.yaml:10: sweep.exclude\[0\]: no axis 'bit'; did you mean 'bits'\?"),
    ("{bits: 2, lr: 3e-3}", "3", r"c.yaml:10: sweep.exclude\[0\]: a condition is a mapping such as .*, got 3\."),
    ("{bits: 2, lr: 3e-3}", "{bits: [2, 4]}", r"c.yaml:10: sweep.exclude: excludes every combination\."),
    ("max_trials: 12", "max_trials: 11", r"toy: 12 runs \(6 arms, 2 seeds\), and max_trials is 11; raise it, .*"),
    ("max_trials: 12", "max_trials: 0", r"c.yaml:11: sweep.max_trials: .* 1, got 0\..*"),
    ("seeds: 0..1", "seeds: 0..x", r"c.yaml:12: seeds: seeds 0..x: expected numbers .* got '0..x'\."),
    ("a: \"bits=2", "a: \"bits=3", r"c.yaml:14: claims\[0\].a: no arm 'bits=3.*'; did you mean 'bits=4.*'\?"),
]  # fmt: skip


@pytest.mark.parametrize(("old", "new", "message"), MISTAKES, ids=[f"{old[:9]}>{new[:20]}" for old, new, _ in MISTAKES])
def test_a_mistake_in_a_sweep_is_one_line_that_says_where(config, old, new, message):
    with pytest.raises(ValueError, match=f"^{message}$") as caught:
        runner.load(config(old, new))

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axes": ["optim.lr"]}, r"--axis 'optim.lr': expected key=value,value with a dotted key, such as .*"),
        ({"axes": ["optim.lr="]}, r"--axis 'optim.lr=': expected key=value,value .*"),
        ({"axes": ["optim.lrr=1,2"]}, r"--axis: optim.lrr\[0\]: unknown key; did you mean 'lr'\?.*"),
        ({"axes": ["optim.lr=1,1"]}, r"--axis: optim.lr\[1\]: 1 is listed twice\."),
        ({"axes": ["seed=0,1"]}, r"--axis: seed: seeds are no axis; .*--seeds\."),
        ({"settings": ["optim.lr=1"]}, r"--set optim.lr would change nothing: the axis 'optim.lr' sets it; .*"),
    ],
)  # fmt: skip
def test_a_mistake_after_axis_names_the_option(config, options, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        runner.load(config(), **options)


def test_a_product_too_large_to_write_down_is_counted_and_refused():
    sweep = {key: list(range(1, 101)) for key in ("optim.lr", "data.batch", "train.steps")}

    with pytest.raises(ValueError, match=r"^sweep: 1000000 combinations, more than 10000"):
        runner.load({**PLAIN, "sweep": sweep})


WHOLE, _ = parse(CONFIG, "config")
SWEEP_PATHS = [keys for keys in paths_in(WHOLE) if keys[:1] == ("sweep",)]


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(keys=st.sampled_from(SWEEP_PATHS), value=JUNK)
def test_junk_anywhere_in_a_sweep_is_taken_or_refused_in_one_line(keys, value):
    try:
        runner.load(with_value(WHOLE, keys, value))
    except ValueError as error:
        assert "\n" not in str(error)  # noqa: PT017 (either outcome is right)

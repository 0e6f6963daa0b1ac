"""Every mistake in a config is one line: file, line, dotted path, what is wrong, the nearest right word."""

import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from precision_lab.runner import ExperimentConfig, load
from precision_lab.runner.yaml12 import dump, parse
from tests.runner.fakes import EXPERIMENT

CONFIG = """\
# A comment.
name: toy
model: {kind: mlp, hidden: [4]}
data: {kind: digits, batch: 8}
optim: {kind: adamw, lr: 1e-3, weight_decay: 0.1}
train: {steps: 10}
arms:
  float32: {policy: float32}
  sgd:
    optim: {kind: sgd}
  adam: {optim: {kind: adam}}
seeds: [0, 1]
baseline: float32
metrics: [eval/loss]
claims:
  - {kind: gt, a: sgd, b: float32, metric: eval/loss}
presets:
  smoke: {seeds: [7], train: {steps: 2}, claims: []}
  full: {arms: {sgd: {optim: {lr: 1}}}}
"""


@pytest.fixture
def config(tmp_path, monkeypatch):
    """Writes a config with one piece of text replaced by another, and returns its path."""
    monkeypatch.chdir(tmp_path)

    def write(old="", new=""):
        assert old in CONFIG
        (tmp_path / "c.yaml").write_text(CONFIG.replace(old, new, 1) if old else CONFIG)
        return "c.yaml"

    return write


MISTAKES = [
    ("lr: 1e-3", "lrr: 1e-3", r"c.yaml:5: optim.lrr: unknown key; did you mean 'lr'\? \(and 1 more\)"),
    ("lr: 1e-3", "lr: fast", r"c.yaml:5: optim.lr: expected a number, got 'fast'\."),
    ("lr: 1e-3", "lr: off", r"c.yaml:5: optim.lr: expected a number, got 'off'\."),
    ("lr: 1e-3", "lr: -1", r"c.yaml:5: optim.lr: input should be greater than 0, got -1\."),
    ("kind: mlp", "kind: mpl", r"c.yaml:3: model.kind: unknown model kind 'mpl'.*'mlp'.*"),
    ("hidden: [4]", "hidden: [4, 0]", r"c.yaml:3: model.hidden\[1\]: .*greater than or equal to 1, got 0\."),
    ("train: {steps: 10}", "train: {stps: 10}", r"c.yaml:6: train.stps: unknown key; did you mean 'steps'\?.*"),
    ("train: {steps: 10}", "train: {}", r"c.yaml:6: train.steps: required, and missing\."),
    ("train: {steps: 10}", "train: 10", r"c.yaml:6: train: expected a mapping of keys to values, got 10\."),
    ("train: {steps: 10}\n", "", r"c.yaml: train: required, and missing\."),
    ("arms:", "armz:", r"c.yaml:7: armz: unknown key; did you mean 'arms'\?.*"),
    ("  sgd:", "  s gd:", r"c.yaml:\d+: arms.s gd: a name is letters, digits and _.@\+=,-, first .*; got 's gd'\..*"),
    ("policy: float32", "policy: flaot32", r"c.yaml:8: arms.float32.policy: .*'flaot32'.*'float32'.*"),
    ("policy: float32", 'policy: "params=float16,params=float32"', r"c.yaml:8: arms.float32.policy: .*twice.*"),
    ("policy: float32", "polcy: float32", r"c.yaml:8: arms.float32.polcy: unknown key; did you mean 'policy'\?"),
    ("{policy: float32}", "3", r"c.yaml:8: arms.float32: expected a mapping of keys to values, got 3\."),
    ("{policy: float32}", "{seed: 3}", r"c.yaml:8: arms.float32.seed: an arm has no seed of its own.*"),
    ("kind: sgd}", "kind: sgd, momentm: 1}", r"c.yaml:10: arms.sgd.optim.momentm: unknown key; .*'momentum'\?"),
    ("kind: adam}", "kind: adam}, train: {loss_shift: 3}", r"c.yaml:11: arms.adam.*loss_shift needs optim.kind sgd.*"),
    ("{optim: {kind: adam}}", "{data: {kind: tinyshakespeare}}", r"c.yaml:\d+: .*language_model.*adam.*"),
    ("seeds: [0, 1]", "seeds: [0, 0]", r"c.yaml:12: seeds\[1\]: seed 0 is listed twice\."),
    ("seeds: [0, 1]", "seeds: []", r"c.yaml:12: seeds: expected more items, got \[\]\."),
    ("seeds: [0, 1]", "seeds: 3", r"c.yaml:12: seeds: expected a list, got 3\."),
    ("seeds: [0, 1]", "seeds: [-1]", r"c.yaml:12: seeds\[0\]: .* got -1\..*"),
    ("seeds: [0, 1]", "seed: 0", r"c.yaml:12: seed: unknown key; did you mean 'seeds'\?"),
    ("baseline: float32", "baseline: flot32", r"c.yaml:13: baseline: no arm 'flot32'; did you mean 'float32'\?"),
    ("metrics: [eval/loss]", "metrics: [eval/los]", r"c.yaml:14: metrics\[0\]: no metric 'eval/los'; .*'eval/loss'\?"),
    ("kind: gt", "kind: gtt", r"c.yaml:16: claims\[0\].kind: unknown kind 'gtt'; did you mean 'gt'\?"),
    ("a: sgd", "a: sdg", r"c.yaml:16: claims\[0\].a: no arm 'sdg'; did you mean 'sgd'\?"),
    ("a: sgd", "a: {arm: sdg}", r"c.yaml:16: claims\[0\].a.arm: no arm 'sdg'; did you mean 'sgd'\?"),
    ("a: sgd", "a: {arm: sgd, metric: los}", r"c.yaml:16: claims\[0\].a.metric: no metric 'los'.*"),
    ("a: sgd", "a: {arm: sgd, att: 3}", r"c.yaml:16: claims\[0\].a.*att: unknown key; did you mean 'at'\?.*"),
    (", metric: eval/loss", "", r"c.yaml:16: claims\[0\].metric: required, and missing\."),
    ("a: sgd", "a: float32", r"c.yaml:16: claims\[0\]: a and b are the same arm, 'float32'\."),
    ("metric: eval/loss", "metric: loss", r"c.yaml:16: claims\[0\].metric: no metric 'loss'.*"),
    ("{kind: gt", "{kind: close", r"c.yaml:16: claims\[0\].margin: required, and missing\."),
    ("train: {steps: 2}", "train: {stes: 2}", r"c.yaml:18: presets.smoke.train.stes: unknown key; .*'steps'\?.*"),
    ("{lr: 1}}}}", "{lr: 0}}}}", r"c.yaml:19: presets.full.arms.sgd.optim.lr: .*greater than 0, got 0\."),
    ("full: {arms", "full: {name: x, arms", r"c.yaml:19: presets.full.name: a preset cannot change 'name'\."),
    ("name: toy", 'name: "../toy"', r"c.yaml:2: name: .*got '../toy'\."),
    ("name: toy", "name: toy\nname: toy", r"c.yaml:3: name: duplicate key, first given on line 2\."),
    ("name: toy", "name: [toy", r"c.yaml:\d+: not valid YAML.*"),
    ("name: toy", "base: {}\nname: toy", r"c.yaml:2: base: unknown key; write model, data.*"),
]


@pytest.mark.parametrize(("old", "new", "message"), MISTAKES, ids=[new[:30] for _, new, _ in MISTAKES])
def test_a_mistake_is_one_line_that_says_where(config, old, new, message):
    with pytest.raises(ValueError, match=f"^{message}$") as caught:
        load(config(old, new))

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["optim.lrr=3"], r"--set: optim.lrr: unknown key; did you mean 'lr'\?"),
        (["optim.lr=off"], r"--set: optim.lr: expected a number, got 'off'\."),
        (["arms.adm.policy=bfloat16_mixed"], r"--set arms.adm.policy: no arm 'adm'; did you mean 'adam'\?"),
        (["optim.kind=sgd"], None),
        (["arms.sgd.policy=x"], r"--set: arms.sgd.policy: .*'x'.*"),
        (["optim"], r"--set 'optim': expected key=value with a dotted key, such as --set optim.lr=1e-3\."),
    ],
)
def test_a_mistake_after_set_names_the_option(config, changes, message):
    if message is None:
        load(config(), settings=changes)
        return
    with pytest.raises(ValueError, match=f"^{message}$"):
        load(config(), settings=changes)


def test_a_setting_that_every_arm_overrides_is_refused(config):
    path = config("float32: {policy: float32}\n  sgd:\n", "float32: {policy: float32}\n  sgd:\n    policy: float32\n")

    load(path, settings=["policy=bfloat16_mixed"])  # adam follows the base
    only_one = {**EXPERIMENT, "arms": {"float32": {"policy": "float32"}}, "claims": []}
    with pytest.raises(ValueError, match=r"--set policy would change nothing: .* --set arms\.float32\.policy="):
        load(only_one, settings={"policy": "float16_mixed"})


def test_an_arm_merges_into_the_base_and_a_new_kind_keeps_what_it_shares(config):
    runs = load(config()).runs

    assert runs["float32"][0].optim.weight_decay == 0.1
    assert (runs["sgd"][0].optim.kind, runs["sgd"][0].optim.lr, runs["sgd"][0].optim.weight_decay) == ("sgd", 1e-3, 0.1)
    assert runs["adam"][0].optim.kind == "adam"  # which has no weight decay to keep
    assert [run.seed for run in runs["sgd"].values()] == [0, 1]


@pytest.mark.parametrize("kind", ["preset", "setting"])
def test_a_preset_or_a_setting_that_changes_a_kind_leaves_nothing_behind(config, tmp_path, kind):
    if kind == "preset":
        change = "{model: {kind: convnet, channels: [4]}, arms: {sgd: {optim: {kind: adam}}}}"
        found = load(config("{arms: {sgd: {optim: {lr: 1}}}}", change), presets=["full"])
    else:
        found = load(config(), settings=["model=convnet", "arms.sgd.optim.kind=adam"])

    run = found.runs["sgd"][0]
    assert (run.model.kind, run.optim.kind, run.optim.lr) == ("convnet", "adam", 1e-3)
    (tmp_path / "again.yaml").write_text(dump(found.to_dict()))
    assert load("again.yaml") == found


def test_a_preset_merges_over_the_file(config):
    smoke = load(config(), presets=["smoke"])
    full = load(config(), presets=["full"])

    assert (smoke.seeds, smoke.claims, smoke.runs["adam"][7].train.steps) == ((7,), (), 2)
    assert full.runs["sgd"][0].optim.lr == 1.0
    assert full.runs["adam"][0].optim.lr == 1e-3


def test_settings_come_after_presets_and_seeds_last(config):
    found = load(config(), presets=["smoke"], settings=["train.steps=3"], seeds=[5])

    assert found.runs["adam"][5].train.steps == 3
    assert found.seeds == (5,)


def test_an_unknown_preset_names_the_nearest(config):
    with pytest.raises(ValueError, match=r"^c.yaml: no preset 'smok'; did you mean 'smoke'\?$"):
        load(config(), presets=["smok"])
    with pytest.raises(ValueError, match=r"^no preset 'smoke'; the experiment has no presets\.$"):
        load(EXPERIMENT, presets=["smoke"])


def test_an_experiment_survives_its_own_yaml(config, tmp_path):
    experiment = load(config(), presets=["full"])
    (tmp_path / "again.yaml").write_text(dump(experiment.to_dict()))

    again = load("again.yaml")

    assert again == experiment
    assert again.id == experiment.id


def test_python_objects_and_plain_data_give_equal_experiments():
    from precision_lab.models.config import MLPConfig
    from precision_lab.training.config import SGDConfig

    objects = {**EXPERIMENT, "model": MLPConfig(hidden=(4,)), "optim": SGDConfig(lr=0.1)}

    assert ExperimentConfig(**objects).runs == ExperimentConfig(**EXPERIMENT).runs == load(EXPERIMENT).runs


def test_a_folder_or_the_name_of_an_experiment_is_enough(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "experiments" / "mixed_precision"
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG)

    for target in ("experiments/mixed_precision", folder, folder / "config.yaml"):
        assert load(target) == load("mixed_precision")
    with pytest.raises(ValueError, match=r"'mixed_precison'; did you mean 'experiments/mixed_precision'\?$"):
        load("mixed_precison")
    with pytest.raises(ValueError, match=r"experiments has no config.yaml"):
        load("experiments")


def test_the_words_after_run_name_what_was_loaded(config):
    found = load(config(), presets=["smoke"], settings=["optim.lr=2e-3"], seeds=[1])

    assert found.words == ("c.yaml", "--preset", "smoke", "--set", "optim.lr=2e-3", "--seed", "1")
    assert load(config(), arms=["adam"]).words == ("c.yaml", "--arm", "adam")
    assert load(EXPERIMENT).words == ()


def test_selecting_arms_drops_the_claims_about_others(config):
    found = load(config(), arms=["float32", "adam"])

    assert list(found.arms) == ["float32", "adam"]
    assert found.claims == ()
    with pytest.raises(ValueError, match=r"no arm 'adm' in toy; did you mean 'adam'\?"):
        load(config(), arms=["adm"])


def test_several_arms_keep_the_baseline_they_are_compared_with(config):
    assert list(load(config(), arms=["sgd", "adam"]).arms) == ["float32", "sgd", "adam"]
    assert load(config(), arms=["sgd", "adam"]).baseline_arm == "float32"
    assert len(load(config(), arms=["sgd", "adam"]).claims) == 1
    assert list(load(EXPERIMENT, arms=["bfloat16", "float16"]).arms) == ["float32", "float16", "bfloat16"]
    assert list(load(config(), arms=["adam", "adam"]).arms) == ["adam"]
    assert load(config(), arms=["adam"]).baseline_arm == "adam"


def test_seeds_and_arms_make_the_folder_and_claims_do_not(config):
    path = config()

    assert load(path).id == load({**load(path).to_dict(), "claims": [], "notes": "n"}).id
    assert load(path).id != load(path, seeds=[0]).id
    assert load(path).id != load(path, settings=["optim.lr=1"]).id


def test_arms_that_turn_out_equal_are_one_run():
    twice = {**EXPERIMENT, "arms": {"a": {}, "b": {"policy": "float32"}}, "claims": []}

    assert load(twice).size() == 3


def test_a_module_that_is_not_there_is_named(config):
    with pytest.raises(ValueError, match=r"--import no_such_module: no module 'no_such_module' here or installed"):
        load(config(), imports=["no_such_module"])


def test_a_module_in_the_working_directory_registers_a_model(config, tmp_path):
    (tmp_path / "my_models_for_test.py").write_text(
        "from typing import Literal\n"
        "from precision_lab.models.config import ModelConfig, register_model\n"
        "class Mine(ModelConfig):\n"
        "    kind: Literal['mine'] = 'mine'\n"
        "    size: int = 1\n"
        "register_model('mine', Mine, 'my_models_for_test:build')\n"
    )
    path = config("{kind: mlp, hidden: [4]}", "{kind: mine, size: 3}")

    assert load(path, imports=["my_models_for_test"]).runs["sgd"][0].model.size == 3


JUNK = st.sampled_from(
    [
        None,
        True,
        -1,
        0,
        10**400,
        1.5,
        math.inf,
        math.nan,
        "",
        "off",
        "kind",
        [],
        {},
        [1],
        {"kind": "x"},
        {"a": {}},
        [[]],
    ]
) | st.text(max_size=5)


def paths_in(data, at=()):
    """Yields the path of every value in nested data."""
    yield at
    items = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    for key, value in items:
        yield from paths_in(value, (*at, key))


def with_value(data, keys, value):
    """Returns nested data with one value replaced."""
    if not keys:
        return value
    copy = dict(data) if isinstance(data, dict) else list(data)
    copy[keys[0]] = with_value(data[keys[0]], keys[1:], value)
    return copy


WHOLE, _ = parse(CONFIG, "config")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(keys=st.sampled_from([keys for keys in paths_in(WHOLE) if keys]), value=JUNK)
def test_junk_anywhere_is_taken_or_refused_in_one_line(keys, value):
    try:
        load(with_value(WHOLE, keys, value), settings={"optim.lr": 0.5})
    except ValueError as error:
        assert "\n" not in str(error)  # noqa: PT017 (either outcome is right)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(position=st.integers(0, len(CONFIG)), cut=st.integers(0, 12), text=st.text(max_size=4))
def test_any_edit_of_the_file_is_taken_or_refused_in_one_line(tmp_path, position, cut, text):
    path = tmp_path / "edited.yaml"
    path.write_text(CONFIG[:position] + text + CONFIG[position + cut :], encoding="utf-8")

    try:
        load(path)
    except ValueError as error:
        assert "\n" not in str(error)  # noqa: PT017 (either outcome is right)
        assert "edited.yaml" in str(error)  # noqa: PT017

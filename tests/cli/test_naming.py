"""Names on the command line: every command takes an arm, and the run of an arm with one seed, in the same words."""

import json

import pytest

from precision_lab import runner
from precision_lab.cli.naming import Name, find_run, parse_name
from precision_lab.runner.rundir import run_dir
from tests.cli.test_app import cli

__all__ = ["cli"]


def test_a_name_has_a_target_an_arm_and_a_seed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd::name::x").mkdir()

    assert parse_name("a/b") == Name("a/b")
    assert parse_name("transformer:width=64") == Name("transformer:width=64")
    assert parse_name("x.yaml::float16,lr=0.1@a") == Name("x.yaml", "float16,lr=0.1@a")
    assert parse_name("x::float16::12") == Name("x", "float16", 12)
    assert parse_name("odd::name::x") == Name("odd::name::x")
    for text in ("::a", "x::", "x::a::b", "x::a::", "x::a::1::2", "x::a::-1"):
        with pytest.raises(ValueError, match="is none of RUN, EXPERIMENT, EXPERIMENT::ARM and EXPERIMENT::ARM::SEED"):
            parse_name(text)


def test_a_run_has_the_same_names_whatever_looks_at_it(cli, tmp_path):
    """Only diff knew arms by ::, and neither show nor export knew them at all."""
    cli("run", "toy.yaml")
    config = runner.load("toy.yaml").runs["float16"][1]
    [folder] = (path.parent for path in (tmp_path / "runs").glob("*/experiment.yaml"))
    run = run_dir(tmp_path / "runs", config)

    for text in ("toy.yaml::float16::1", f"runs/{folder.name}::float16::1", f"{folder.name}::float16::1", run.id):
        shown = json.loads(cli("show", text, "--json")[1])
        [same] = json.loads(cli("diff", text, run.id, "--json")[1])
        code, _, err = cli("export", text, "-o", "record.csv")

        assert find_run(text, tmp_path / "runs").id == shown["run_id"] == same["a"] == run.id
        assert (same["config"], code, err) == ({}, 0, "")


def test_an_arm_has_the_same_name_in_every_command(cli, tmp_path):
    cli("run", "toy.yaml", "--arm", "float16", "--seed", "4")
    [folder] = (path.parent for path in (tmp_path / "runs").glob("*/experiment.yaml"))

    ways = [
        ("toy.yaml", "--arm", "float16"),
        ("toy.yaml::float16",),
        ("toy.yaml::float16::4",),
        (f"{folder.name}::float16",),
    ]
    tables = [json.loads(cli("sites", *way, "--json")[1]) for way in ways]

    assert all(table == tables[0] for table in tables)
    assert tables[0] != json.loads(cli("sites", "toy.yaml", "--json")[1])
    # With one run an arm is that run.
    assert json.loads(cli("show", f"{folder.name}::float16", "--json")[1])["config"]["seed"] == 4


BAD = [
    (
        ("show", "toy.yaml::float16"),
        "toy.yaml::float16 has runs with seeds 0, 1, 2; name one of them: toy.yaml::float16::0.",
    ),
    (("show", "toy.yaml::flot16::0"), "no arm 'flot16' in toy; did you mean 'float16'?"),
    (
        ("show", "toy.yaml::float16::7"),  # no seed of the config, so that a bare run would not do it
        "toy.yaml::float16::7 has not run in runs; precision-lab run toy.yaml --seed 7 does that.",
    ),
    (("show", "toy.yaml"), "'toy.yaml' is an experiment; name one of its runs: toy.yaml::ARM::SEED."),
    (("doctor", "toy.yaml::float16"), "has runs with seeds 0, 1, 2"),
    (("sites", "toi.yaml::float16"), "no config file or experiment folder 'toi.yaml'"),
    (("diff", "toi.yaml::float16", "toy.yaml"), "no config file or experiment folder 'toi.yaml'"),
    (
        ("sites", "toy.yaml::float16", "--arm", "float32"),
        "--arm float32, but the target says float16; leave one of them out.",
    ),
    (("compare", "toy.yaml::float16::1", "--seed", "2"), "--seed 2, but the target says 1; leave one of them out."),
    (("export", "toy.yaml::float16::x"), "is none of RUN, EXPERIMENT, EXPERIMENT::ARM and EXPERIMENT::ARM::SEED"),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=[" ".join(words) for words, _ in BAD])
def test_a_name_of_nothing_is_one_line_and_exit_code_2(cli, words, message):
    code, out, err = cli(*words)

    assert (code, out) == (2, "")
    assert message in err
    assert (err.startswith("precision-lab: "), err.count("\n")) == (True, 1)

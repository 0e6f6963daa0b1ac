"""The command `compare`: errors against NumPy's, whose parameters they are of, and how bad input ends."""

import dataclasses
import json
import time

import ml_dtypes
import numpy as np
import pytest

from precision_lab import data
from precision_lab.cli import main
from precision_lab.runner.rundir import all_runs, run_dir
from precision_lab.runner.yaml12 import dump
from precision_lab.training import RunConfig
from precision_lab.training.checkpointing import Checkpoints
from precision_lab.training.numbers import hyper
from precision_lab.training.program import program_for
from tests.cli.test_app import files
from tests.runner.fakes import EXPERIMENT

TOY = {key: EXPERIMENT[key] for key in ("model", "data", "optim", "train")}
STEP = 10


@pytest.fixture
def cli(monkeypatch, capsys, tmp_path):
    """Runs a command line in an empty folder with the toy experiment, and returns (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toy.yaml").write_text(dump(EXPERIMENT))

    def call(*words):
        with pytest.raises(SystemExit) as ended:
            main(words)
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err

    return call


def compared(cli, *words):
    """Returns the command's JSON, and its rows by site and policy."""
    code, out, err = cli("compare", *words, "--json")
    assert code == 0, err
    found = json.loads(out)
    return found, {(row["site"], row["policy"]): row for row in found["rows"]}


def saved_run(tmp_path, **options):
    """Makes the folder of a run whose checkpoint holds drawn weights, and returns its name and the state."""
    import jax

    config = RunConfig.model_validate({**TOY, **options})
    program = program_for(config, data.load(config.data).spec)
    fresh = program.init(config.seed, hyper(config))
    params = jax.tree.map(lambda x: np.random.default_rng(x.size).normal(size=x.shape).astype("f4"), fresh.params)
    state = program.start(params, fresh.model_state, hyper(config), np.uint32(0), None)
    run = run_dir(tmp_path / "runs", config)
    run.prepare(config)
    with Checkpoints(run.checkpoints, config) as checkpoints:
        checkpoints.save(STEP, dataclasses.replace(state, step=np.int32(STEP)), {})
    return run.id, params


def first_examples(count):
    """Returns held-out digits as rows."""
    return data.load(RunConfig.model_validate(TOY).data).eval.take(np.arange(count))["inputs"].reshape(count, -1)


def sqnr_db(reference, other):
    """Returns the ratio of powers in dB, in float64."""
    reference, other = np.asarray(reference, np.float64), np.asarray(other, np.float64)
    return 10 * np.log10(np.sum(reference**2) / np.sum((other - reference) ** 2))


def as_bfloat16(x):
    return x.astype(ml_dtypes.bfloat16).astype(np.float64)


def test_the_error_of_a_layer_is_that_of_rounding_its_operands(cli, tmp_path):
    name, params = saved_run(tmp_path)
    x, kernel = first_examples(16), params["layers"][0]["kernel"]

    found, rows = compared(cli, name, "--policy", "bfloat16_mixed", "--examples", "16")

    expected = sqnr_db(x @ kernel, as_bfloat16(x) @ as_bfloat16(kernel))
    row = rows["layers/0/kernel", "bfloat16_mixed"]
    assert (found["reference"], found["examples"]) == ("float32", 16)
    assert row["local_sqnr_db"] == pytest.approx(expected, abs=0.02)
    assert row["cumulative_sqnr_db"] == row["local_sqnr_db"]


def test_parameters_are_the_checkpoints_or_those_that_the_run_began_with(cli, tmp_path):
    name, _ = saved_run(tmp_path)

    trained, _ = compared(cli, name, "-p", "bfloat16_mixed")
    begun, _ = compared(cli, name, "-p", "bfloat16_mixed", "--step", "0")
    experiment, _ = compared(cli, "toy.yaml", "-p", "bfloat16_mixed")

    assert (trained["step"], begun["step"], experiment["step"]) == (STEP, 0, 0)
    assert begun["rows"] == experiment["rows"] != trained["rows"]
    assert compared(cli, "toy.yaml", "-p", "bfloat16_mixed", "--seed", "1")[0]["rows"] != begun["rows"]
    assert files(tmp_path) == ["runs", "toy.yaml"]


def test_float32_masters_are_compared_in_the_place_of_what_they_are_the_masters_of(cli, tmp_path):
    """From the stored bfloat16 parameters the policy that stores them so would be exact."""
    stored = "params=bfloat16,compute=float32,output=float32"
    name, params = saved_run(tmp_path, policy=stored, master_weights=True)
    x, kernel = first_examples(64), params["layers"][0]["kernel"]

    rows = compared(cli, name)[1]

    row = rows["layers/0/kernel", next(policy for _, policy in rows)]
    assert row["cumulative_sqnr_db"] == pytest.approx(sqnr_db(x @ kernel, x @ as_bfloat16(kernel)), abs=0.02)


def test_sites_come_worst_first_and_what_the_model_returns_last(cli, tmp_path):
    name, _ = saved_run(tmp_path)
    policies = ("-p", "bfloat16_mixed", "-p", "float32;head/**:weight=int4@tensor")

    found, _ = compared(cli, name, *policies)
    code, out, _ = cli("compare", name, *policies)

    sites = list(dict.fromkeys(row["site"] for row in found["rows"]))
    assert sites == ["head/kernel", "layers/0/kernel", "output"]
    assert code == 0
    lines = [line.split() for line in out.splitlines()]
    table = {words[0]: words[1:] for words in lines if words and words[0] in sites}
    assert list(table) == sites
    assert table["layers/0/kernel"][2:] == ["exact", "exact"]
    assert out.count("float32;head/**:weight=int4@tensor") == 2
    assert list(dict.fromkeys(row["site"] for row in compared(cli, name, *policies, "--top", "1")[0]["rows"])) == [
        "head/kernel"
    ]


def test_errors_are_counted_from_the_reference_that_is_asked_for(cli, tmp_path):
    name, params = saved_run(tmp_path)
    x, kernel = first_examples(64), params["layers"][0]["kernel"]

    found, rows = compared(cli, name, "-p", "float32", "--reference", "bfloat16_mixed")

    expected = sqnr_db(as_bfloat16(x) @ as_bfloat16(kernel), x @ kernel)
    assert found["reference"] == "bfloat16_mixed"
    assert rows["layers/0/kernel", "float32"]["local_sqnr_db"] == pytest.approx(expected, abs=0.02)


def test_a_run_that_is_going_on_is_left_alone(cli, tmp_path):
    """Its checkpoint may be half written, and opening the folder would remove it."""
    name, _ = saved_run(tmp_path)
    (run,) = all_runs(tmp_path / "runs")
    torn = run.checkpoints / "20.orbax-checkpoint-tmp"

    with run.claim(run.config(), wait=False):
        torn.mkdir()
        code, _, err = cli("compare", name, "-p", "bfloat16_mixed")

    assert (code, torn.exists()) == (2, True)
    assert f"{name} is running; wait until it is done, or give --step 0" in err


@pytest.mark.parametrize(("ago_s", "code"), [(0, 2), (10_000, 0)])
def test_a_run_that_another_machine_left_behind_is_looked_at(cli, tmp_path, ago_s, code):
    """A command of its own has seen no note before, so that such a run was said to go on for ever."""
    name, _ = saved_run(tmp_path)
    (run,) = all_runs(tmp_path / "runs")
    note = {"state": "running", "host": "another", "pid": 1, "attempt": 1, "unix_s": time.time() - ago_s}
    (run.path / "status.json").write_text(json.dumps(note))

    assert cli("compare", name, "-p", "bfloat16_mixed")[0] == code


@pytest.mark.parametrize("ending", ["svg", "html", "png"])
def test_a_picture_is_saved_where_it_is_told(cli, tmp_path, ending):
    code, _, err = cli("compare", "toy.yaml", "-p", "bfloat16_mixed", "--save", f"sub/a.{ending}")

    written = (tmp_path / "sub" / f"a.{ending}").read_bytes()
    assert (code, f"wrote sub/a.{ending}" in err) == (0, True)
    assert written.startswith({"png": b"\x89PNG", "svg": b"<svg", "html": b"<!doctype html>"}[ending])
    assert ending == "png" or b"layers/0/kernel" in written


BAD = [
    (("toy.yaml",), "toy, arm float32 is in float32, the reference itself; say what to hold against it"),
    (("toy.yaml", "-p", "float32"), "float32 is the reference itself; say what to hold against it"),
    (("toy.yaml", "-p", "bf16", "-p", "bfloat16"), "the same policy is given twice"),
    (("toy.yaml", "-p", "bfloat16_mixed", "--step", "3"), "--step 3: toy, arm float32 has no checkpoints; give a run"),
    (("toy.yaml", "-p", "bfloat16_mixed", "--save", "a.gif"), "a picture ends in one of .png, .svg, .pdf, .html"),
    (("toy.yaml", "-p", "float32;haed/**:weight=int4"), "matched no site: 'haed/**'"),
    (("lora.yaml", "-p", "bfloat16_mixed"), "a run with adapters (lora) has two models in one"),
    (("chain.yaml", "--arm", "b", "-p", "bf16"), "chain, arm b: it starts from arm 'a', which has not run"),
    (("unsaved", "-p", "bfloat16_mixed"), "--step 0 takes the parameters that the run begins with"),
    (("run", "-p", "bfloat16_mixed", "--step", "7"), "no checkpoint of step 7"),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=[" ".join(words) for words, _ in BAD])
def test_bad_input_is_one_line_and_exit_code_2(cli, tmp_path, words, message):
    plain = {**EXPERIMENT, "claims": []}
    (tmp_path / "lora.yaml").write_text(dump({**plain, "lora": {"rank": 2}, "arms": {"a": {}}}))
    arms = {"a": {}, "b": {"start": {"arm": "a"}}}
    (tmp_path / "chain.yaml").write_text(dump({**plain, "name": "chain", "arms": arms}))
    unsaved = RunConfig.model_validate({**TOY, "seed": 7})
    run_dir(tmp_path / "runs", unsaved).prepare(unsaved)
    name = {"unsaved": run_dir(tmp_path / "runs", unsaved).id}
    if words[0] == "run":
        name["run"] = saved_run(tmp_path)[0]

    code, out, err = cli("compare", name.get(words[0], words[0]), *words[1:])

    assert (code, out) == (2, "")
    assert message in err
    assert (err.startswith("precision-lab: "), err.count("\n")) == (True, 1)

"""The command as people and scripts meet it: exit codes, one-line errors, JSON, and nothing written by mistake."""

import json
import os
import subprocess
import sys

import pytest

from precision_lab.cli import main
from precision_lab.runner.axes import parse_seeds
from precision_lab.runner.yaml12 import dump
from tests.runner.fakes import EXPERIMENT


@pytest.fixture
def cli(training, capsys, tmp_path):
    """Runs a command line in an empty folder with the toy experiment, and returns (exit code, stdout, stderr)."""
    (tmp_path / "toy.yaml").write_text(dump({**EXPERIMENT, "presets": {"smoke": {"seeds": [0], "claims": []}}}))

    def call(*words):
        with pytest.raises(SystemExit) as ended:
            main(words)
        out, err = capsys.readouterr()
        return ended.value.code or 0, out, err

    return call


def files(folder):
    """Returns the names of everything in a folder."""
    return sorted(path.name for path in folder.iterdir())


def test_help_imports_no_jax_and_no_plotting():
    code = (
        "import sys, precision_lab.cli as c\n"
        "try: c.main(['--help'])\n"
        "except SystemExit as end: assert not end.code\n"
        "heavy = {'jax', 'flax', 'optax', 'orbax', 'matplotlib', 'scipy', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)

    assert done.returncode == 0, done.stderr
    for command in ("run", "check", "report", "ls", "show", "formats", "bits", "memory", "sites", "compare", "doctor"):
        assert command in done.stdout


def test_a_mistake_in_a_config_imports_no_jax_either(tmp_path):
    (tmp_path / "c.yaml").write_text(dump({**EXPERIMENT, "loss_scale": "off"}))
    code = (
        "import sys, precision_lab.cli as c\n"
        "try: c.main(['run', 'c.yaml'])\n"
        "except SystemExit as end: print(end.code, 'jax' in sys.modules)\n"
    )

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, timeout=60,
                          env={**os.environ, "PYTHONPATH": ":".join(sys.path)})  # fmt: skip

    assert done.stdout.split() == ["2", "False"]
    assert files(tmp_path) == ["c.yaml"]


def test_a_run_ends_with_table_verdicts_and_report(cli, tmp_path):
    code, out, _ = cli("run", "toy.yaml")

    assert code == 0
    assert "float16" in out
    assert "✓ reproduced" in out
    report = next((tmp_path / "runs").glob("toy-*/report.html"))
    assert str(report.relative_to(tmp_path)) in out


def test_a_second_run_does_nothing_and_says_so(cli, training):
    cli("run", "toy.yaml")
    training.trained.clear()

    code, _, err = cli("run", "toy.yaml")

    assert (code, training.trained) == (0, [])
    assert "9 of 9 runs are finished already" in err


BAD_INPUT = [
    (("run", "toy.yaml", "--set", "optim.lrr=1"), "--set: optim.lrr: unknown key; did you mean 'lr'?"),
    (("run", "toy.yaml", "--set", "policy=flaot16"), "unknown format 'flaot16'"),
    (("run", "toy.yaml", "--set", "policy=params=float16,params=float32"), "'params' is given twice"),
    (("run", "toy.yaml", "--preset", "smok"), "no preset 'smok'; did you mean 'smoke'?"),
    (("run", "toy.yaml", "--arm", "flot16"), "no arm 'flot16' in toy; did you mean 'float16'?"),
    (("run", "toi.yaml"), "no config file or experiment folder 'toi.yaml'"),
    (("run", "toy.yaml", "--seeds", "a..b"), "expected numbers such as 0,1,2 or a range such as 0..4, got 'a..b'"),
    (("run", "toy.yaml", "--seeds", "1,4..0"), "the range '4..0' runs backwards; write 0..4"),
    (("run", "toy.yaml", "--import", "no_such_module"), "no module 'no_such_module'"),
    (
        ("check", "toy.yaml", "--set", "train.steps=-1"),
        "train.steps: input should be greater than or equal to 0, got -1",
    ),
    (("run", "toy.yaml", "--dry-run", "--executor", "serail"), "no executor 'serail'; did you mean 'serial'?"),
    (("run", "toy.yaml", "--dry-run", "--jobs", "0"), "jobs is how many runs at once, at least 1, got 0"),
    (
        ("run", "toy.yaml", "--dry-run", "--tracker", "tensorbord"),
        "no tracker 'tensorbord'; did you mean 'tensorboard'?",
    ),
    (("run", "toy.yaml", "--dry-run", "--distributed"), "--dry-run counts in one process; leave --distributed out"),
    (("run", "toy.yaml", "--axis", "optim.lrr=1"), "--axis: optim.lrr[0]: unknown key; did you mean 'lr'?"),
    (("run", "toy.yaml", "--seed=-1"), "seeds[0]: input should be greater than or equal to 0, got -1."),
    (("run", "toy.yaml", "--seeds", "1,1"), "seeds[1]: seed 1 is listed twice"),
    (("report", "toy.yaml"), "nothing of toy has run in runs"),
    (("show", "nothing"), "no run 'nothing' in runs"),
]


@pytest.mark.parametrize(("words", "message"), BAD_INPUT, ids=[" ".join(words) for words, _ in BAD_INPUT])
def test_bad_input_is_one_line_and_exit_code_2_and_nothing_is_written(cli, training, tmp_path, words, message):
    code, out, err = cli(*words)

    assert code == 2
    assert out == ""
    assert message in err
    assert err.startswith("precision-lab: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    assert files(tmp_path) == ["toy.yaml"]
    assert training.trained == []


def test_a_rule_that_matches_nothing_is_bad_input(cli, training, tmp_path):
    training.refused = {"float16": "1 of 1 rules matched no site: '**/haed/**'. Nearest: 'head'."}

    code, _, err = cli("run", "toy.yaml")

    assert code == 2
    assert "toy.yaml:" in err
    assert "arms.float16.policy: arm 'float16': 1 of 1 rules matched no site" in err
    assert files(tmp_path) == ["toy.yaml"]


def test_a_misspelt_command_is_met_with_the_nearest(cli):
    code, _, err = cli("rnu", "toy.yaml")

    assert code == 2
    assert "Did you mean 'run'" in err


def test_failures_and_divergence_have_their_own_exit_codes(cli, training):
    training.diverging = {"float16"}
    assert cli("run", "toy.yaml")[0] == 4

    training.failures = {"bfloat16": RuntimeError("boom")}
    code, out, err = cli("run", "toy.yaml", "--out", "other")

    assert code == 3
    assert "3 failed" in out
    assert "RuntimeError: boom" in err
    assert "Traceback" not in err


def test_an_interrupt_exits_130_and_says_how_to_go_on(cli, training):
    training.failures = {"float16": KeyboardInterrupt()}

    code, _, err = cli("run", "toy.yaml")

    assert code == 130
    assert "the same command continues" in err
    assert "Traceback" not in err


def test_smoke_is_the_preset_of_that_name(cli, training):
    cli("run", "toy.yaml", "--smoke")

    assert training.trained == [("float32", 0, 0), ("float16", 0, 0), ("bfloat16", 0, 0)]


def test_seeds_are_listed_or_counted(cli, training):
    cli("run", "toy.yaml", "--seed", "7", "--seeds", "3..4", "--arm", "float32")

    assert [seed for _, seed, _ in training.trained] == [7, 3, 4]
    assert parse_seeds("0,2..3") == [0, 2, 3]


def test_json_is_all_there_is_on_stdout(cli):
    _, out, _ = cli("run", "toy.yaml", "--json")
    run = json.loads(out)
    checked = json.loads(cli("check", "toy.yaml", "--json")[1])
    listed = json.loads(cli("ls", "--json")[1])
    shown = json.loads(cli("show", listed[0]["run_id"], "--json")[1])
    reported = json.loads(cli("report", "toy.yaml", "--json")[1])

    assert run["verdicts"][0]["verdict"] == "reproduced"
    assert (checked["runs"], checked["finished"]) == (9, 9)
    assert len(listed) == 9
    assert shown["config"]["train"]["steps"] == 10
    assert reported == run


def test_check_counts_and_writes_nothing(cli, tmp_path):
    code, out, _ = cli("check", "toy.yaml")

    assert code == 0
    assert "3 arms, 3 seeds, 9 runs, 0 of them finished" in out
    assert "policy=" in out
    assert files(tmp_path) == ["toy.yaml"]


def test_a_dry_run_counts_bytes_and_axes_and_runs_nothing(cli, training, tmp_path):
    code, out, _ = cli("run", "toy.yaml", "--axis", "optim.lr=0.1,0.2", "--dry-run")
    counted = json.loads(cli("run", "toy.yaml", "--axis", "optim.lr=0.1,0.2", "--dry-run", "--json")[1])

    parameters = 64 * 4 + 4 + 4 * 10 + 10  # of the toy's network; plain SGD keeps nothing else but counters
    assert (code, training.trained, files(tmp_path)) == (0, [], ["toy.yaml"])
    assert "axis lr: 0.1, 0.2" in out
    assert "6 arms, 3 seeds, 18 runs, 0 of them finished" in out
    assert (counted["runs"], counted["axes"]["lr"]) == (18, [0.1, 0.2])
    assert 4 * parameters <= counted["state_bytes"] < 4 * parameters + 64
    assert counted["disk_bytes"] > 18 * counted["state_bytes"]


def test_ls_and_show_tell_what_became_of_a_run(cli, training):
    training.failures = {"float16": RuntimeError("boom")}
    cli("run", "toy.yaml", "--smoke")

    listed = cli("ls")[1]
    run_id = next(word for word in listed.split() if "-float16" in word)
    shown = cli("show", run_id.split("-")[-1])[1]

    assert "done" in listed
    assert "failed" in listed
    assert "error: RuntimeError: boom" in shown
    assert "optim: {kind: sgd" in shown or "kind: sgd" in shown
    assert "no runs in empty" in cli("ls", "--out", "empty")[1]


def test_a_prefix_that_means_several_runs_is_refused(cli):
    cli("run", "toy.yaml")

    code, _, err = cli("show", "mlp")

    assert code == 2
    assert "may be any of" in err


def test_a_report_is_written_again_from_the_folder_of_results(cli, tmp_path):
    cli("run", "toy.yaml", "--out", "elsewhere")
    folder = next((tmp_path / "elsewhere").glob("toy-*"))
    (folder / "report.html").unlink()

    code, out, _ = cli("report", str(folder))

    assert code == 0
    assert "reproduced" in out
    assert (folder / "report.html").exists()


@pytest.mark.parametrize(("code", "out"), [(75, "told\n"), (130, "told\n"), (3, "told\nended as usual\n")])
def test_a_process_that_a_signal_stopped_ends_at_once_with_its_code(code, out):
    script = (
        "import atexit, importlib, sys\n"
        "cli = importlib.import_module('precision_lab.cli.app')\n"
        "atexit.register(print, 'ended as usual')\n"
        f"cli.app = lambda *args, **options: (print('told'), sys.exit({code}))\n"
        "cli.main()\n"
    )

    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)

    assert (done.returncode, done.stdout) == (code, out)

"""The shape of the project: which way imports point, what the linters say, and that the README's commands are CI's."""

import pathlib
import re
import subprocess
import sys
import tomllib

import pytest

ROOT = pathlib.Path(__file__).parents[1]
BIN = pathlib.Path(sys.executable).parent
ALLOWED = {
    *("pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "requirements.txt", "requirements-dev.txt"),
    *("precision_lab", "experiments", "tests", "notebooks"),
}


def run(*command):
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def tracked():
    listed = run("git", "ls-files", "--cached", "--others", "--exclude-standard")
    if listed.returncode:
        pytest.skip("not a git checkout")
    return listed.stdout.splitlines()


def test_imports_point_left():
    result = run(BIN / "lint-imports")

    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("command", [("check",), ("format", "--check")], ids=["lint", "format"])
def test_ruff_finds_nothing(command):
    result = run(BIN / "ruff", *command, "precision_lab", "tests")

    assert result.returncode == 0, result.stdout


def test_pyright_finds_nothing():
    result = run(BIN / "pyright", "--pythonpath", sys.executable)

    assert result.returncode == 0, result.stdout


def test_the_top_level_holds_what_the_map_shows_and_nothing_else():
    top = {path.split("/")[0] for path in tracked()}

    assert {name for name in top if not name.startswith(".")} <= ALLOWED


def test_no_file_of_the_package_holds_two_ideas():
    long = {path: len((ROOT / path).read_text().splitlines()) for path in tracked() if path.endswith(".py")}

    assert {path: lines for path, lines in long.items() if path.startswith("precision_lab/") and lines > 400} == {}


def test_dependency_files_pin_by_hash_and_name_no_address():
    for name in ("requirements.txt", "requirements-dev.txt"):
        text = (ROOT / name).read_text()

        pinned = re.findall(r"^[A-Za-z0-9_.-]+==", text, flags=re.MULTILINE)
        assert len(pinned) > 50
        assert text.count("--hash=sha256:") >= len(pinned)
        assert not re.search(r"https?://|file:|--(extra-)?index-url|--find-links", text)


def test_every_dependency_is_pinned():
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    pinned = (ROOT / "requirements.txt").read_text().lower().replace("_", "-")

    for requirement in declared:
        name = re.match(r"[A-Za-z0-9_.-]+", requirement)[0].lower().replace("_", "-")
        assert re.search(rf"^{re.escape(name)}==", pinned, flags=re.MULTILINE), name


def test_ci_runs_the_test_command_of_the_readme():
    commands = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    test_command = next(command for command in commands if "pytest" in command)

    assert test_command.strip() in (ROOT / ".ci/run").read_text()


def test_importing_the_package_and_asking_for_help_loads_no_jax():
    code = "import sys, precision_lab, precision_lab.formats, precision_lab.policy, precision_lab.training.config"
    code += "; import precision_lab.cli; sys.exit('jax' in sys.modules or 'flax' in sys.modules)"

    assert run(sys.executable, "-c", code).returncode == 0


def test_every_promised_name_exists_and_says_what_it_does():
    import precision_lab

    for name in precision_lab.__all__:
        promised = getattr(precision_lab, name)
        assert not callable(promised) or promised.__doc__, name

import importlib
import subprocess

import pytest

from precision_lab.data import DATASETS
from precision_lab.runner import environment
from precision_lab.training.config import RunConfig
from tests.runner.fakes import EXPERIMENT

PLUGIN = """\
from typing import Literal

from precision_lab.data import DataConfig, register_data


class OwnConfig(DataConfig):
    kind: Literal["own_data"] = "own_data"


register_data("own_data", OwnConfig, lambda config: None)
"""


def test_the_fingerprint_names_what_can_change_a_number():
    found = environment.fingerprint()

    assert {"python", "jax", "jaxlib", "numpy", "backend", "device", "cores", "xla_flags", "x64", "prng"} <= set(found)
    assert found["cores"] >= 1
    assert found["backend"] in {"cpu", "gpu", "tpu"}


def test_a_difference_is_said_in_words():
    stored = {"jax": "0.10.2", "cores": 2, "xla_flags": "", "commit": "0" * 40}
    current = {"jax": "0.12.0", "cores": 2, "xla_flags": "--xla_x", "commit": "1" * 40}

    assert environment.differences(stored, current) == [
        "jax 0.10.2, here 0.12.0",
        "xla_flags none, here --xla_x",
        "commit 000000000000, here 111111111111",
    ]
    assert environment.differences(current, current) == []


def test_git_that_is_missing_or_fails_is_no_error(monkeypatch, tmp_path):
    def no_git(*_, **__):
        raise FileNotFoundError("git")

    assert environment._git(tmp_path, "rev-parse", "HEAD") is None
    monkeypatch.setattr(subprocess, "run", no_git)
    assert environment._git(tmp_path, "rev-parse", "HEAD") is None


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    """Returns the file of an imported module that registers data of the user's own."""
    path = tmp_path / "own_plugin_module.py"
    path.write_text(PLUGIN)
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("own_plugin_module")
    yield path
    del DATASETS._entries["own_data"]
    monkeypatch.delitem(environment.sys.modules, module.__name__)


def test_an_edited_module_of_the_users_own_is_another_environment(plugin):
    keys = {key: EXPERIMENT[key] for key in ("model", "optim", "train")}
    own = RunConfig.model_validate({**keys, "data": {"kind": "own_data", "batch": 8}})
    before = environment.registered_code(own)
    plugin.write_text(PLUGIN + "# another line\n")

    [difference] = environment.differences(before, environment.registered_code(own))

    assert difference.startswith("source of own_plugin_module ")
    assert environment.registered_code(RunConfig.model_validate({**keys, "data": EXPERIMENT["data"]})) == {}

"""The experiments that are shipped, and the page that says how to write one."""

import pathlib
import re

import pytest
import yaml

from precision_lab import runner
from precision_lab.data import config as data_config
from precision_lab.models import config as models_config
from precision_lab.runner import claims
from precision_lab.runner.config import ExperimentConfig
from precision_lab.runner.known import metric_names
from precision_lab.training import ProbeRun
from precision_lab.training import config as training_config
from precision_lab.training import qat as qat_config
from precision_lab.training import start as start_config
from precision_lab.training import transforms as transforms_config
from precision_lab.training.probes import PROBES
from precision_lab.training.probes import config as probes_config

FOLDER = pathlib.Path(__file__).parents[1] / "experiments"
CONFIGS = sorted(FOLDER.glob("*/config.yaml"))
PAGE = (FOLDER / "README.md").read_text()


def names_in_code(text):
    """Every word that stands in code on the page."""
    code = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    return set(re.findall(r"[A-Za-z_0-9]+", " ".join(code)))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.parent.name)
def test_every_shipped_experiment_and_all_its_presets_are_valid(path):
    presets = yaml.safe_load(path.read_text()).get("presets", {})

    for name in (None, *presets):
        experiment = runner.load(path, presets=[name] if name else [])
        assert experiment.name == path.parent.name
    assert {"smoke", "full"} <= set(presets)


@pytest.mark.slow
@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.parent.name)
def test_the_smoke_preset_of_every_experiment_runs_to_its_end(path, tmp_path):
    results = runner.run(path, presets=["smoke"], out=tmp_path)

    assert {one.state for one in results.trials} <= {"done", "diverged"}
    assert results.experiment.claims == ()


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.parent.name)
def test_the_report_of_a_page_is_of_the_arms_and_claims_of_its_config(path):
    experiment = runner.load(path)
    report = re.search(r"<!-- report -->(.*)<!-- end of report -->", (path.parent / "README.md").read_text(), re.DOTALL)

    assert report is not None
    judged = re.findall(r"^\| [✓✗?] (?:reproduced|not reproduced|inconclusive) \| (.*?) \| ", report[1], re.MULTILINE)
    arms = re.findall(r"^\| (\S+) \| ", report[1].partition("## Arms")[2].partition("## Run")[0], re.MULTILINE)
    assert judged == [claim.sentence() for claim in experiment.claims]
    assert arms[2:] == list(experiment.arms)


def test_the_page_names_every_key_every_kind_and_every_metric():
    known = names_in_code(PAGE)
    fields = set(ExperimentConfig.written_keys())
    configs = (models_config, data_config, training_config, probes_config, qat_config, start_config)
    configs += (transforms_config, claims)
    for module in configs:
        for cls in vars(module).values():
            if isinstance(cls, type) and cls.__module__ == module.__name__ and hasattr(cls, "model_fields"):
                fields |= set(cls.model_fields) - {"seed"}
                kind = cls.model_fields.get("kind")
                fields |= {kind.default} if kind is not None and not kind.is_required() else set()
    example = runner.load(FOLDER / "mixed_precision")
    run = next(iter(example.runs["float32"].values()))
    probes = [ProbeRun.model_validate({"probe": {"kind": kind}}) for kind in PROBES.kinds() if "test" not in kind]
    fields |= {part for one in (run, *probes) for name in metric_names(one) for part in name.split("/")}

    assert sorted(fields - known - {"arms", "claims", "seeds"}) == []


def test_the_example_of_the_page_is_valid(tmp_path):
    (tmp_path / "config.yaml").write_text(re.search(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)[1])

    experiment = runner.load(tmp_path)

    assert experiment.size() == 9

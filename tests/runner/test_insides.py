"""A report that looks into real checkpoints, once."""

import json

import pytest

from precision_lab import runner
from precision_lab.runner.insides import FILE
from tests.runner.test_report import html_of

EXPERIMENT = {
    "name": "inside",
    "model": {"kind": "mlp", "hidden": [8]},
    "data": {"kind": "digits", "batch": 32},
    "optim": {"kind": "sgd", "lr": 0.1},
    "train": {"steps": 2},
    "arms": {"float32": {}, "int4": {"policy": "weight=int4@channel"}},
}


@pytest.mark.slow
def test_a_report_looks_into_the_final_checkpoint_of_each_arm_once(tmp_path, monkeypatch):
    results = runner.run(EXPERIMENT, out=tmp_path, say=lambda line: None)
    assert "Signal to noise in dB" not in html_of(results)

    results.report(look_inside=True)
    monkeypatch.setattr("precision_lab.training.insides.look_inside", lambda *_: pytest.fail("looked again"))
    results.report(look_inside=True)

    text = html_of(results)
    kept = json.loads((results.trial("int4", 0).path / FILE).read_text())
    assert [row["site"] for row in kept["sites"]] == ["layers/0/kernel", "head/kernel"]
    assert "Signal to noise in dB of each site" in text
    assert "Exponents of weights and gradients by arm" in text
    assert "int4, scaled" in text

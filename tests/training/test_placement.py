"""Runs on several devices, virtual ones of the CPU, each in a process of its own (checks 21 and 22)."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from precision_lab import training
from precision_lab.training.placement import _tensor_axes
from tests.training.runs import config

ROOT = Path(__file__).parents[2]
RUN = {
    "model": {"kind": "mlp", "hidden": [64, 64]},
    "optim": {"kind": "adam", "lr": 1e-3},
    "train": {"steps": 12, "log_every": 1, "eval_every": None, "checkpoint_every": None},
}


def placed(folder, devices, *, stop=0, **mesh):
    """Returns what a run on so many devices tells."""
    flags = {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
    }
    script = str(Path(__file__).with_name("placed_run.py"))
    command = [sys.executable, script, config(**RUN, mesh=mesh).model_dump_json(), str(folder), str(stop)]
    done = subprocess.run(command, env=os.environ | flags, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
def test_parameters_divided_over_eight_devices_take_an_eighth_and_give_the_same_losses(tmp_path):
    """Check 22: FSDP against one device, and against whole parameters on each."""
    one = placed(tmp_path / "one", 1)
    replicated = placed(tmp_path / "data", 8, data=-1)
    divided = placed(tmp_path / "fsdp", 8, fsdp=-1)
    mixed = placed(tmp_path / "mixed", 8, data=2, fsdp=2, tensor=2)

    assert divided["mesh"] == {"data": 1, "fsdp": 8, "tensor": 1}
    for what in ("params", "moments"):
        share = {name: run["bytes"][what][0] / run["bytes"][what][1] for name, run in runs(locals()).items()}
        assert share["one"] == share["replicated"] == 1
        assert 1 / 8 <= share["divided"] < 1.02 / 8  # the bias of the head has 10 elements, and is whole
        assert 1 / 4 <= share["mixed"] < 1.1 / 4
    for other in (replicated, divided, mixed):
        assert other["digest"] == one["digest"]  # the same bits to begin with
        np.testing.assert_allclose(list(other["losses"].values()), list(one["losses"].values()), rtol=1e-5)
        assert other["result"][2]["eval/loss"] == pytest.approx(one["result"][2]["eval/loss"], rel=1e-5)


def runs(names):
    return {name: names[name] for name in ("one", "replicated", "divided", "mixed")}


@pytest.mark.slow
def test_a_checkpoint_of_eight_devices_is_restored_on_two_and_on_one(tmp_path):
    """Check 21."""
    first = placed(tmp_path / "run", 8, stop=7, fsdp=-1)
    copies = {devices: tmp_path / f"on{devices}" for devices in (1, 2, 8)}
    for copy in copies.values():
        subprocess.run(["cp", "-r", str(tmp_path / "run"), str(copy)], check=True)
    after = {devices: placed(copy, devices, fsdp=-1) for devices, copy in copies.items()}

    assert first["result"][:2] == ["stopped", 7]
    assert [after[devices]["mesh"]["fsdp"] for devices in (1, 2, 8)] == [1, 2, 8]
    assert {one["start"] for one in after.values()} == {7}
    assert len({one["digest"] for one in after.values()}) == 1
    assert after[2]["bytes"]["params"][0] / after[2]["bytes"]["params"][1] < 0.51
    for devices in (1, 2):
        assert after[devices]["result"][2]["eval/loss"] == pytest.approx(after[8]["result"][2]["eval/loss"], rel=1e-5)


def test_a_mesh_that_does_not_fit_is_refused_before_anything_runs():
    have = len(jax.devices())
    with pytest.raises(ValueError, match=rf"mesh data {have + 1}, .* needs {have + 1} devices, but there are {have}"):
        training.check(config(mesh={"data": have + 1}, data={"batch": have + 1}))
    with pytest.raises(ValueError, match="at least one device"):
        config(mesh={"fsdp": 0})
    with pytest.raises(ValueError, match="only one axis of a mesh can take all"):
        config(mesh={"data": -1, "fsdp": -1})


def test_rules_of_a_config_are_written_as_a_mapping_and_come_back_as_they_are():
    rules = {"**/up/kernel": ["fsdp", "tensor"], "**/embedding": [None, "tensor"]}
    one = config(mesh={"sharding": rules})

    assert one.mesh.sharding == (("**/up/kernel", ("fsdp", "tensor")), ("**/embedding", (None, "tensor")))
    assert type(one).model_validate_json(one.model_dump_json()) == one
    with pytest.raises(ValueError, match="'fsdp' or 'tensor'"):
        config(mesh={"sharding": {"**": ["rows"]}})


def test_the_mesh_of_one_device_changes_no_identity_and_others_do():
    from precision_lab.runner.identity import run_id

    assert run_id(config(mesh={})) == run_id(config()) == run_id(config(mesh={"data": 1}))
    assert len({run_id(config(mesh=mesh)) for mesh in ({}, {"data": -1}, {"fsdp": 2}, {"tensor": 2})}) == 4


@pytest.mark.parametrize(
    ("path", "rank", "axes"),
    [
        ("blocks/0/up/kernel", 2, [None, "tensor"]),
        ("blocks/0/up/bias", 1, ["tensor"]),
        ("blocks/0/down/kernel", 2, ["tensor", None]),
        ("blocks/0/down/bias", 1, [None]),
        ("blocks/0/attention/query/kernel", 2, [None, "tensor"]),
        ("blocks/0/attention/out/kernel", 2, ["tensor", None]),
        ("layers/1/kernel", 2, [None, "tensor"]),
        ("norm/scale", 1, [None]),
    ],
)
def test_the_first_product_of_a_block_is_divided_by_outputs_and_the_second_by_inputs(path, rank, axes):
    """As Shoeybi et al. do, so that a block needs one sum over devices in each direction."""
    assert _tensor_axes(path, rank) == axes

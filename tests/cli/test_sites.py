"""The command `sites`: what it lists, of what, and how bad input ends."""

import json

import pytest

from precision_lab.runner.yaml12 import dump
from tests.cli.test_app import cli, files
from tests.runner.fakes import EXPERIMENT

__all__ = ["cli"]

LAYERS = {"layers/0/kernel": (64, 4), "head/kernel": (4, 10)}
"""The products of the toy's network, digits of 64 pixels through 4 neurons to 10 classes."""


def sites(cli, *words):
    """Returns the sites that the command lists as JSON."""
    code, out, err = cli("sites", *words, "--json")
    assert code == 0, err
    return json.loads(out)


def test_sites_lists_every_product_with_shapes_work_and_formats(cli, tmp_path):
    found = sites(cli, "toy.yaml", "--arm", "float16")
    code, out, _ = cli("sites", "toy.yaml", "--arm", "float16")

    by_name = {row["name"]: row for row in found["sites"]}
    assert list(by_name) == list(LAYERS)
    for name, (rows, columns) in LAYERS.items():
        assert by_name[name]["operands"] == [f"float32[8,{rows}]", f"float32[{rows},{columns}]"]
        assert by_name[name]["flops"] == 2 * 8 * rows * columns
        assert (by_name[name]["op"], by_name[name]["compute"]) == ("dot_general", "float16")
    assert code == 0
    assert "toy, arm float16" in out
    assert all(name in out for name in LAYERS)
    assert "2 sites, 2 of them products; of the work of the products 100 % in float16." in out
    assert files(tmp_path) == ["toy.yaml"]


def test_a_policy_on_the_command_line_and_a_setting_take_the_place_of_the_files(cli):
    found = sites(cli, "toy.yaml", "--policy", "bfloat16_mixed;head/**:compute=float32", "--set", "data.batch=5")

    assert [row["compute"] for row in found["sites"]] == ["bfloat16", "float32"]
    assert [row["out"] for row in found["sites"]] == ["float32[5,4]", "float32[5,10]"]
    _, out, _ = cli("sites", "toy.yaml", "--policy", "bfloat16_mixed;head/**:compute=float32")
    share = 100 * 64 * 4 / (64 * 4 + 4 * 10)
    assert f"{share:.3g} % in bfloat16, {100 - share:.3g} % in float32." in out


def test_all_lists_every_operation_and_its_category(cli):
    products, everything = sites(cli, "toy.yaml"), sites(cli, "toy.yaml", "--all", "-p", "bfloat16_mixed,ops=autocast")

    ops = {row["op"] for row in everything["sites"]}
    assert {row["op"] for row in products["sites"]} == {"dot_general"}
    assert {"dot_general", "add"} <= ops
    assert {row["category"] for row in everything["sites"] if row["op"] == "add"} == {"promote"}


def test_sites_of_a_model_of_the_project(cli):
    """Two blocks of six products and the head with weights; two more each of attention alone; two embeddings."""
    found = sites(cli, "transformer:width=16,depth=2,heads=2")["sites"]

    ops = [row["op"] for row in found]
    assert (ops.count("dot_general"), ops.count("gather")) == (2 * (6 + 2) + 1, 2)
    shown = cli("sites", "transformer:width=16,depth=2,heads=2")[1]
    assert sum("lookup" in line for line in shown.splitlines()) == 2


def test_sites_of_a_run_that_has_run(cli):
    cli("run", "toy.yaml", "--smoke")
    run = next(row for row in json.loads(cli("ls", "--json")[1]) if row["policy"] == "float16_mixed")
    name, hashed = run["run_id"], run["run_id"].split("-")[-1][:8]

    by_id, by_hash, by_folder = (sites(cli, word) for word in (name, hashed, run["path"]))

    assert by_id == by_hash == by_folder
    assert {row["compute"] for row in by_id["sites"]} == {"float16"}
    assert "--arm is for experiments" in cli("sites", name, "--arm", "float16")[2]


def test_adapters_have_sites_of_their_own(cli, tmp_path):
    lora = {**EXPERIMENT, "arms": {"float32": {}, "lora": {"lora": {"rank": 2}}}, "claims": []}
    (tmp_path / "lora.yaml").write_text(dump(lora))

    found = sites(cli, "lora.yaml", "--arm", "lora")["sites"]

    assert sum(row["flops"] for row in found if row["name"] in LAYERS) == sum(2 * 8 * m * n for m, n in LAYERS.values())


def test_an_arm_can_be_looked_at_without_those_that_the_file_speaks_of(cli, tmp_path):
    """A metric that only some arms have made the file invalid with any other arm alone."""
    arms = {"float32": {}, "int4": {"policy": "weight=int4@channel"}}
    metrics = ["eval/loss", "weights/relative_mse"]
    (tmp_path / "some.yaml").write_text(dump({**EXPERIMENT, "arms": arms, "claims": [], "metrics": metrics}))

    assert len(sites(cli, "some.yaml", "--arm", "float32")["sites"]) == 2


def test_a_model_of_ones_own_joins_by_import(cli, tmp_path, monkeypatch):
    (tmp_path / "wide_module.py").write_text(
        "from typing import Literal\n"
        "from flax import nnx\n"
        "import precision_lab as pl\n"
        "from precision_lab.models.config import ModelConfig\n"
        "class Wide(ModelConfig):\n"
        "    kind: Literal['wide_of_test'] = 'wide_of_test'\n"
        "    width: int = 3\n"
        "class Net(nnx.Module):\n"
        "    def __init__(self, config, spec, rngs):\n"
        "        self.one = nnx.Linear(64, config.width, rngs=rngs)\n"
        "    def __call__(self, x):\n"
        "        return self.one(x.reshape(-1, 64))\n"
        "pl.register_model('wide_of_test', Wide, Net)\n"
    )
    from precision_lab.models.config import MODELS

    monkeypatch.setattr(MODELS, "_entries", dict(MODELS._entries))

    found = sites(cli, "wide_of_test:width=5", "--import", "wide_module")

    assert [(row["name"], row["out"]) for row in found["sites"]] == [("one/kernel", "float32[64,5]")]


BAD = [
    (("toi",), "no config file or experiment folder 'toi'"),
    (("toi",), "Nor is it a run in runs, or a model: char_resmlp, convnet, mlp, transformer."),
    (("toy.yaml", "--arm", "flot16"), "no arm 'flot16' in toy; did you mean 'float16'?"),
    (("toy.yaml", "-p", "bflot16"), "Nearest: 'bfloat16'"),
    (("toy.yaml", "-p", "float32;haed/**:compute=bfloat16"), "matched no site: 'haed/**'"),
    (("mlp", "--arm", "float16"), "--arm is for experiments; 'mlp' is a model."),
    (("mlp:hiden=3",), "model 'mlp:hiden=3': hiden:"),
    (("probe.yaml",), "probe, arm a is a probe, which has no model"),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=[" ".join(words) for words, _ in BAD])
def test_bad_input_is_one_line_and_exit_code_2(cli, tmp_path, words, message):
    probe = {"name": "probe", "probe": "dot_product", "arms": {"a": {}}, "seeds": [0]}
    (tmp_path / "probe.yaml").write_text(dump(probe))

    code, out, err = cli("sites", *words)

    assert (code, out) == (2, "")
    assert message in err
    assert (err.startswith("precision-lab: "), err.count("\n")) == (True, 1)

"""The command `doctor`: findings first, JSON, and how bad input ends. What it finds: tests/telemetry/test_doctor.py."""

import json

import ml_dtypes
import numpy as np
import pytest

from tests.cli.test_compare import cli, saved_run

__all__ = ["cli"]


@pytest.fixture
def weights(tmp_path):
    """Files of weights: as they are, as float16, and with bfloat16's bits under float16's name."""
    w = np.random.default_rng(0).normal(0, 0.02, (64, 64)).astype(np.float32)
    w[0, :3] = 1e6, 1e-9, 2.0**-13
    np.savez(tmp_path / "w.npz", w=w)
    with np.errstate(over="ignore"):
        np.savez(tmp_path / "half.npz", w=w.astype(np.float16))
    np.savez(tmp_path / "wrong.npz", w=w[1:].astype(ml_dtypes.bfloat16).view(np.float16))
    return w


def test_findings_come_in_words_and_then_the_table(cli, weights):
    code, out, _ = cli("doctor", "w.npz", "--format", "float16")

    lines = out.splitlines()
    zero = np.sum((weights != 0) & (np.abs(weights) <= 2.0**-25))
    assert code == 0
    assert lines[0] == "1 array, 4,096 values, 16,384 bytes."
    assert "- float16: 1 value would overflow (beyond 65504), in 1 tensor: w (0.0244 %)." in lines
    assert any(line.startswith(f"- float16: {zero} value") and "become zero" in line for line in lines)
    table = next(i for i, line in enumerate(lines) if line.split() == ["array", "dtype", "shape", "bytes", "amax",
                                                                       "exponents", "float16"])  # fmt: skip
    assert table > max(i for i, line in enumerate(lines) if line.startswith("- "))
    assert "64x64" in lines[table + 2]


def test_json_has_findings_and_counts(cli, weights):
    found = json.loads(cli("doctor", "w.npz", "-f", "fp16", "-f", "e4m3fn", "--json")[1])
    wrong = json.loads(cli("doctor", "wrong.npz", "--json")[1])

    array = found["arrays"][0]
    assert (found["path"], found["formats"]) == ("w.npz", ["float16", "float8_e4m3fn"])
    assert (array["float16_overflow"], array["float8_e4m3fn_overflow"]) == (1, 1)
    assert (array["path"], array["shape"], array["dtype"]) == ("w", [64, 64], "float32")
    assert wrong["findings"][0]["kind"] == "misread"
    assert wrong["formats"] == ["float16", "bfloat16"]


def test_against_another_file_the_casts_are_told_first(cli, weights):
    out = cli("doctor", "half.npz", "--against", "w.npz")[1]
    found = json.loads(cli("doctor", "half.npz", "--against", "w.npz", "--json")[1])

    with np.errstate(over="ignore"):
        changed = np.sum(weights.astype(np.float16).astype(np.float32) != weights)
    assert found["arrays"][0]["change_changed"] == changed
    assert found["findings"][0]["kind"] == "cast"
    first = next(line for line in out.splitlines() if line.startswith("- "))
    assert first.startswith(
        f"- cast float32 -> float16 in 1 tensor, 1 of them lost bits: w ({changed:,} of 4,096 values"
    )
    assert "1 overflowed" in first


def test_a_run_is_looked_at_by_its_name_its_arm_or_any_of_its_folders(cli, tmp_path):
    name, params = saved_run(tmp_path, policy="float16_mixed")
    folder = f"runs/trials/{name}"

    words = (
        name,
        "toy.yaml::float16::0",
        name.split("-")[-1],
        folder,
        f"{folder}/checkpoints",
        f"{folder}/checkpoints/10",
    )
    found = [json.loads(cli("doctor", word, "--json")[1])["arrays"] for word in words]

    assert all(one == found[0] for one in found)
    by_path = {row["path"]: row for row in found[0]}
    kernel = params["layers"][0]["kernel"]
    assert by_path["params/layers/0/kernel"]["shape"] == list(kernel.shape)
    assert by_path["params/layers/0/kernel"]["amax"] == np.max(np.abs(kernel))


def test_only_some_arrays_are_looked_at(cli, tmp_path):
    name, _ = saved_run(tmp_path)

    found = json.loads(cli("doctor", name, "--only", "params/**/bias", "--against", name, "--json")[1])

    assert [row["path"] for row in found["arrays"]] == ["params/head/bias", "params/layers/0/bias"]
    assert found["findings"][0]["kind"] == "same"


BAD = [
    (("w.npz", "--only", "v*"), "--only v* matches no array of w.npz; the first of 1 is w."),
    (("nothing",), "no file or folder 'nothing', and no run of that name in runs."),
    (("w.npz", "--against", "nothing"), "no file or folder 'nothing'"),
    (("w.npz", "-f", "mxfp4"), "mxfp4 has no range of its own"),
    (("w.npz", "-f", "flaot16"), "unknown format 'flaot16'"),
    (("toy.yaml",), "toy.yaml is not a .npy, .npz or .safetensors file"),
    (("empty",), "holds no Orbax checkpoint of a tree"),
]


@pytest.mark.parametrize(("words", "message"), BAD, ids=[" ".join(words) for words, _ in BAD])
def test_bad_input_is_one_line_and_exit_code_2(cli, weights, tmp_path, words, message):
    (tmp_path / "empty").mkdir()

    code, out, err = cli("doctor", *words)

    assert (code, out) == (2, "")
    assert message in err
    assert (err.startswith("precision-lab: "), err.count("\n")) == (True, 1)

"""The commands formats, bits and memory: what they print, their JSON, and how bad input ends."""

import json
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from precision_lab import formats
from precision_lab.cli import numbers


@pytest.fixture
def run():
    app = typer.Typer()
    numbers.register(app)

    def invoke(*arguments: str):
        return CliRunner().invoke(app, list(arguments))

    return invoke


def data(result):
    """Returns what a successful command printed as JSON."""
    assert result.exit_code == 0, result.output
    return json.loads(result.output)


def test_formats_lists_the_whole_catalogue(run):
    text = run("formats")
    rows = data(run("formats", "--json"))

    assert [row["name"] for row in rows] == [*formats.FORMATS, *formats.REGISTERED]
    assert all(name in text.output for name in formats.FORMATS)
    assert text.exit_code == 0


@pytest.mark.parametrize("name", formats.FORMATS)
def test_formats_shows_one_format_with_its_source(run, name):
    fmt = formats.format(name)

    shown, row = run("formats", name), data(run("formats", name, "--json"))

    assert shown.exit_code == 0
    assert fmt.source[:30] in shown.output
    assert (row["max"], row["min_subnormal"], row["source"]) == (fmt.max, fmt.min_subnormal, fmt.source)
    assert ("values, to scale" in shown.output) == (fmt.bits <= 8)


@pytest.mark.parametrize("name", ["fixed8.4", "uint3", "int5:full", "e5m3", "p3109_k8p2"])
def test_formats_shows_formats_outside_the_catalogue(run, name):
    shown, row = run("formats", name), data(run("formats", name, "--json"))

    assert shown.exit_code == 0
    assert (row["name"], row["min"], row["max"]) == (name, formats.format(name).min, formats.format(name).max)


def test_formats_shows_registered_formats(run):
    assert {"nf4", "mxfp4", "nvfp4"} <= set(formats.REGISTERED)
    for name, fmt in formats.REGISTERED.items():
        assert data(run("formats", name, "--json"))["source"] == fmt.source
        assert run("formats", name).exit_code == 0


def test_bits_honours_subnormals_and_formats_without_sign(run):
    flushed = data(run("bits", "1e-3", "--format", "e4m3fn", "--subnormals", "flush", "--json"))
    scale = data(run("bits", "3", "--format", "e8m0fnu", "--rounding", "nearest_away", "--json"))

    assert (flushed["value"], flushed["category"]) == (0, "zero")
    assert (scale["sign"], scale["exponent"], scale["value"]) == ("", f"{127 + 2:08b}", 4)
    assert (scale["below"], scale["above"]) == (2, 8)


def test_bits_shows_fields_and_neighbours(run):
    """0.1 in float16, worked by hand in tests/formats/test_inspect.py."""
    text, row = run("bits", "0.1", "--format", "float16"), data(run("bits", "0.1", "--format", "float16", "--json"))

    assert "0 01011 1001100110" in text.output
    assert "819 * 2^-13" in text.output
    assert (row["sign"], row["exponent"], row["mantissa"], row["code"]) == ("0", "01011", "1001100110", "0x2e66")
    assert (row["value"], row["below"], row["above"]) == (0.0999755859375, 0.09991455078125, 0.10003662109375)


def test_bits_takes_negative_numbers_and_specials(run):
    assert data(run("bits", "-0.1", "--format", "bf16", "--json"))["sign"] == "1"
    assert data(run("bits", "-inf", "--format", "bf16", "--json"))["value"] == "-inf"
    assert data(run("bits", "1e9", "--format", "e4m3fn", "--json"))["category"] == "nan"
    assert data(run("bits", "1e9", "--format", "e4m3fn", "--overflow", "saturate", "--json"))["value"] == 448
    assert data(run("bits", "0.1", "--format", "f16", "--rounding", "up", "--json"))["value"] == 0.10003662109375
    assert "beyond the largest value" in run("bits", "300", "--format", "int8").output
    assert run("bits", "nan", "--format", "f32").exit_code == 0


def test_memory_of_70_billion_parameters(run):
    rows = data(run("memory", "--params", "70e9", "--json"))

    values = {row["format"]: row["values_gb"] for row in rows["weights"]}
    totals = {row["format"]: row["total_gb"] for row in rows["weights"]}
    assert values == {"float32": 280, "bfloat16": 140, "float16": 140, "float8_e4m3fn": 70, "int8": 70, "int4": 35}
    assert (totals["float32"], totals["int4"]) == (280, 43.75)
    assert "43.75" in run("memory", "--params", "70B").output


def test_memory_of_formats_with_scales_of_their_own(run):
    """A byte per 32 values is 70 / 32 GB; 16 x 16 tiles have one per 256; 5 trits a byte are 14 GB."""
    names = ["mxfp4", "nvfp4", "nvfp4_2d", "nf4", "ternary"]
    rows = data(run("memory", "-n", "70B", *(f"--format={name}" for name in names), "--group", "64", "--json"))

    found = {row["format"]: (row["values_gb"], row["scales"], row["total_gb"]) for row in rows["weights"]}
    assert found["mxfp4"] == (35, "float8_e8m0fnu per 32", 35 + 70 / 32)
    assert found["nvfp4"] == (35, "float8_e4m3fn per 16", 35 + 70 / 16 + 4e-9)
    assert found["nvfp4_2d"] == (35, "float8_e4m3fn per 16x16", pytest.approx(35 + 70 / 256, abs=1e-8))
    assert found["nf4"] == (35, "float32 per 64", 35 + 4 * 70 / 64)
    assert found["ternary"] == (14, "float32 per 64", 14 + 4 * 70 / 64)
    assert [row["bits_per_parameter"] for row in rows["weights"]] == [4, 4, 4, 4, 1.6]
    assert run("memory", "-n", "70B", "--format", "mxfp4").exit_code == 0


def test_memory_of_training_follows_the_policy(run):
    """16 bytes per parameter are ZeRO's figure for float16 with a float32 master under Adam."""
    chosen = run("memory", "-n", "1.5B", "--policy", "float16_pure", "--master", "float32", "--json")
    text = run("memory", "-n", "1.5B", "--format", "int4", "--group", "128", "--scale-format", "f16")

    [row] = data(chosen)["training"]
    assert (row["total_gb"], row["bytes_per_parameter"]) == (24, 16)
    assert "4.125" in text.output


def test_memory_of_a_model_counts_its_parameters_and_activations(run):
    """Layers of 64, 128, 128 and 10; bfloat16 halves the inputs of the three products, 320 numbers an example."""
    rows = data(run("memory", "--model", "mlp", "--batch", "50", "--json"))
    text = run("memory", "--model", "mlp", "--policy", "float32").output

    kept = {row["policy"]: row["activations_gb"] * 1e9 for row in rows["training"]}
    assert rows["parameters"] == 65 * 128 + 129 * 128 + 129 * 10
    assert kept["float32"] - kept["bfloat16_mixed"] == pytest.approx(50 * 320 * 2)
    assert kept["float32"] >= 50 * 320 * 4
    assert "digits" in text
    assert "total MB" in text


def test_memory_of_a_model_takes_sizes(run):
    """Twelve squares of the width in a block; embeddings, positions, norms and biases besides."""
    small, wide = (
        data(run("memory", "--model", f"transformer:width={width},depth=1", "--policy", "float32", "--json"))
        for width in (64, 128)
    )

    assert wide["parameters"] - 2 * small["parameters"] == pytest.approx(12 * (128**2 - 2 * 64**2), abs=100)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["formats", "flaot16"], "unknown format 'flaot16'. Nearest: .*'float16'"),
        (["bits", "0.1", "--format", "bfloat61"], "unknown format 'bfloat61'. Nearest: .*'bfloat16'"),
        (["bits", "zero", "--format", "bf16"], "expected a number such as 0.1"),
        (["bits", "1", "--rounding", "nearest"], "rounding must be one of nearest_even"),
        (["memory", "--params", "many"], "expected a positive number of parameters"),
        (["memory"], "give the number of parameters, --params 70e9, or --model transformer"),
        (["memory", "--params", "7B", "--model", "mlp"], "one of them"),
        (["memory", "--model", "gpt5"], "gpt5"),
        (["memory", "--model", "transformer:width=wide"], "expected sizes such as width=256"),
        (["bits", "0.1", "--format", "mxfp4"], "mxfp4 is a block format: .* elements' format, float4_e2m1fn"),
        (["bits", "0.1", "--format", "nf4"], "nf4 is a codebook"),
        (["memory", "--params", "7B", "--format", "int44"], "unknown format 'int44'"),
        (["memory", "--params", "7B", "--optimizer", "lion"], "optimizer must be one of sgd, momentum, adam"),
        (["memory", "--params", "7B", "--policy", "compute=bf61"], "bf61"),
    ],
)
def test_bad_input_raises_one_line_and_prints_nothing(run, arguments, message):
    result = run(*arguments)

    assert isinstance(result.exception, ValueError)
    assert result.output == ""
    with pytest.raises(ValueError, match=message):
        raise result.exception


def test_commands_do_not_import_jax():
    code = "import sys; from precision_lab.cli import numbers; assert 'jax' not in sys.modules"

    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)

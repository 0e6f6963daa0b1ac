"""The benchmark: ratios are ratios, slow candidates are called less, and the command prints and writes them."""

import json
import time

import pytest
import typer
from typer.testing import CliRunner

from precision_lab.bench import formats as benchmark
from precision_lab.bench.interleaved import time_interleaved
from precision_lab.cli import bench


def test_a_candidate_that_takes_thrice_as_long_has_about_that_ratio():
    calls = {"base": lambda: time.sleep(0.002), "thrice": lambda: time.sleep(0.006)}

    base, thrice = time_interleaved(calls, rounds=5, budget_s=1.0)

    assert base.name == "base"
    assert 0.3 < base.ratio < 3
    assert 1.5 < thrice.ratio < 6
    assert thrice.low <= thrice.ratio <= thrice.high


def test_slow_candidates_are_called_less_often():
    calls = []
    time_interleaved({"base": lambda: None, "slow": lambda: calls.append(time.sleep(0.02))}, rounds=50, budget_s=0.05)

    # Once to warm up and once to learn its time; then, in each of three rounds, once untimed and once timed.
    assert len(calls) == 2 + 3 * 2


def test_quartiles_need_three_rounds():
    with pytest.raises(ValueError, match="rounds must be at least 3, got 2"):
        time_interleaved({"base": lambda: None}, rounds=2, budget_s=1.0)


def test_every_target_is_one_of_the_candidates():
    assert set(benchmark.TARGETS) <= set(benchmark.candidates(1024))


def test_the_command_prints_json_and_writes_both_files(tmp_path, monkeypatch):
    copies = {"copy": lambda: None, "mxfp4": lambda: time.sleep(0.001)}
    monkeypatch.setattr(benchmark, "candidates", lambda count: copies)
    app = typer.Typer()
    bench.register(app)
    app.callback()(lambda: None)

    options = ["bench", "formats", "--count", "2000", "--rounds", "3", "--json", "--write", str(tmp_path)]
    result = CliRunner().invoke(app, options)

    assert result.exit_code == 0, result.output
    printed = json.loads(result.output)
    data, page = sorted(tmp_path.iterdir())
    assert (data.suffix, page.suffix) == (".json", ".md")
    assert json.loads(data.read_text()) == printed
    assert printed["elements"] == 2048
    assert [row["name"] for row in printed["rows"]] == list(copies)
    assert printed["versions"]["jax"]
    assert "| mxfp4 |" in page.read_text()
    assert "precision-lab bench formats --count 2000 --rounds 3" in page.read_text()

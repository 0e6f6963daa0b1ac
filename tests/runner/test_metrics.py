import json
import math

import jax.numpy as jnp
import numpy as np
import pytest

from precision_lab.runner.metrics import JsonlSink, Series, read_rows, series


def row(step, **metrics):
    return {"step": step, "split": "train", **metrics}


def test_rows_come_back_as_written_with_their_attempt(tmp_path):
    path = tmp_path / "metrics.jsonl"

    with JsonlSink(path, attempt=3) as sink:
        sink.write(row(1, loss=0.5))
        sink.write(row(2, loss=0.25))

    assert read_rows(path) == [row(1, loss=0.5, attempt=3), row(2, loss=0.25, attempt=3)]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_legal_json_and_come_back(tmp_path, value):
    path = tmp_path / "metrics.jsonl"

    with JsonlSink(path, attempt=1) as sink:
        sink.write(row(1, loss=value))

    json.loads(path.read_text(), parse_constant=lambda text: pytest.fail(f"bare {text} in JSON"))
    assert str(read_rows(path)[0]["loss"]) == str(value)


@pytest.mark.parametrize(
    "scalar", [np.float32(0.1), np.int64(3), jnp.float32(0.1), jnp.bfloat16(1.5), np.float64(1e-300)]
)
def test_scalar_arrays_are_written_as_their_exact_numbers(tmp_path, scalar):
    path = tmp_path / "metrics.jsonl"

    with JsonlSink(path, attempt=1) as sink:
        sink.write(row(1, loss=scalar))

    assert read_rows(path)[0]["loss"] == float(scalar)


@pytest.mark.parametrize("torn", ['{"step": 3, "spl', "{", '{"step": 3, "split": "train", "loss": 1e', "garbage", "{}"])
def test_a_torn_last_line_is_passed_over_and_repaired_on_opening(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    whole = '{"step":1,"split":"train","loss":1.0,"attempt":1}\n'
    path.write_text(whole + torn)

    before = read_rows(path)
    JsonlSink(path, attempt=2).close()

    assert [one["step"] for one in before] == [1]
    assert path.read_text() == whole


def test_a_whole_last_line_without_its_newline_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step":1,"split":"train","loss":1.0}')

    with JsonlSink(path, attempt=2) as sink:
        sink.write(row(2, loss=2.0))

    assert [one["step"] for one in read_rows(path)] == [1, 2]


def test_every_cut_of_a_file_leaves_whole_rows_only(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with JsonlSink(path, attempt=1) as sink:
        for step in range(1, 4):
            sink.write(row(step, loss=math.inf if step == 2 else 0.5))
    content = path.read_bytes()

    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        JsonlSink(path, attempt=2).close()
        steps = [one["step"] for one in read_rows(path)]
        whole = content[:length].count(b"}")
        assert steps == list(range(1, whole + 1))
        assert path.read_bytes() == content[: len(path.read_bytes())]


def test_a_broken_line_in_the_middle_is_an_error_that_names_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step":1,"split":"train"}\noops\n{"step":2,"split":"train"}\n')

    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not a metrics row"):
        read_rows(path)


def test_restarting_drops_what_lies_past_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with JsonlSink(path, attempt=1) as sink:
        for step in range(6):
            sink.write(row(step, loss=float(step)))

    with JsonlSink(path, attempt=2) as sink:
        sink.restart(3)
        sink.write(row(4, loss=40.0))

    rows = read_rows(path)
    assert [(one["step"], one["attempt"]) for one in rows] == [(0, 1), (1, 1), (2, 1), (3, 1), (4, 2)]
    assert len(path.read_text().splitlines()) == 5
    assert sorted(one.name for one in tmp_path.iterdir()) == ["clock.txt", "metrics.jsonl"]


def test_the_last_row_of_a_step_and_split_wins(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"step":1,"split":"train","loss":1}\n{"step":1,"split":"eval","loss":3}\n{"step":1,"split":"train","loss":2}\n'
    )

    found = series(read_rows(path))

    assert found["train/loss"].values == [2.0]
    assert found["eval/loss"].values == [3.0]


def test_a_missing_file_has_no_rows(tmp_path):
    assert read_rows(tmp_path / "none") == []


def test_reductions_are_what_they_say():
    one = Series([1, 2, 3], [4.0, -1.0, 3.0])

    assert [one.reduce(how) for how in ("last", "mean", "max", "min")] == [3.0, 2.0, 4.0, -1.0]


def test_a_nan_anywhere_is_seen_by_every_reduction_but_the_last():
    one = Series([1, 2, 3], [4.0, math.nan, 3.0])

    assert one.reduce("last") == 3.0
    assert all(math.isnan(one.reduce(how)) for how in ("mean", "max", "min"))


def test_an_infinite_loss_is_the_largest_and_makes_the_mean_infinite():
    one = Series([1, 2], [1.0, math.inf])

    assert (one.reduce("max"), one.reduce("mean"), one.reduce("min")) == (math.inf, math.inf, 1.0)

"""Which arm is best and which are on the frontier, against plain recomputation from the records."""

import csv
import io
import json
import math
import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from precision_lab import runner
from precision_lab.runner import latex, markdown
from precision_lab.runner.clock import StepClock, read_clock
from precision_lab.runner.insides import FILE, Inside, different
from precision_lab.runner.ranking import best_arms, frontier, pareto, sense
from tests.runner.fakes import EXPERIMENT
from tests.runner.test_report import Page, html_of, interval, last_values

STORED = {
    "float32": {},
    "float16": {"policy": "params=float16,compute=float16,output=float32"},
    "bfloat16": {"policy": "params=bfloat16,compute=bfloat16,output=float32"},
}


@pytest.fixture
def undrawn(training, monkeypatch):
    """As `training`, without a report."""
    monkeypatch.setattr("precision_lab.runner.results.Results.report", lambda self, *_, **__: self.folder)
    return training


def run(**changes):
    return runner.run({**EXPERIMENT, "arms": STORED, **changes}, say=lambda line: None)


@given(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), max_size=12))
def test_the_frontier_is_what_nothing_beats(points):
    on = frontier(points)

    for i, (x, y) in enumerate(points):
        beaten = [(u, v) for u, v in points if u <= x and v <= y and (u < x or v < y)]
        assert (i in on) == (not beaten)
    assert bool(on) == bool(points)


def test_an_arm_that_is_not_there_is_refused_with_the_nearest(undrawn):
    with pytest.raises(ValueError, match=r"no arm 'flot32' in .*; did you mean 'float32'"):
        runner.run(EXPERIMENT, say=str).of_arm("flot32")


def test_errors_of_weights_and_what_a_policy_costs_are_better_small():
    assert [sense(name) for name in ("weights/relative_mse", "eval_int4/excess", "probe/max_error")] == [-1, -1, -1]


def test_less_loss_and_more_accuracy_are_better_and_a_loss_scale_is_neither():
    assert [sense(name) for name in ("eval/loss", "eval/accuracy", "train/loss_scale", "train/skipped_steps")] == [
        -1,
        1,
        0,
        0,
    ]


def test_the_best_arm_has_the_best_mean_of_the_logs(undrawn):
    results = run()

    for metric, best in (("eval/loss", min), ("eval/accuracy", max)):
        means = {arm: interval(last_values(results, arm, metric))[0] for arm in STORED}
        assert best_arms(results, metric) == {arm for arm, mean in means.items() if mean == best(means.values())}
    assert best_arms(results, "train/loss_scale") == set()


def test_differences_in_a_sweep_are_to_the_baseline_at_the_same_point(undrawn):
    results = run(sweep={"train.steps": [5, 10]}, claims=[])

    for arm in ("float16", "bfloat16"):
        for steps in (5, 10):
            row = next(row for row in results.rows if row.arm == f"{arm},steps={steps}")
            own = last_values(results, row.arm, "eval/loss")
            base = last_values(results, f"float32,steps={steps}", "eval/loss")
            expected = interval([a - b for a, b in zip(own, base, strict=True)])
            assert row.cells["eval/loss"].difference.mean == pytest.approx(expected[0], rel=1e-9)
    assert "vs float32 " in str(results.table())


def test_histograms_that_look_alike_are_drawn_once():
    def inside(fmt, zero, top):
        tensor = {"format": fmt, "zero": zero, "below": 0.0, "above": 0.0, "binades": {str(top): 3}}
        return Inside(0, 1, [], {"gradients": tensor})

    found = {"a": inside("float16", 0.1, -3), "b": inside("float16", 0.12, -4), "c": inside("float16", 1.0, -3),
             "d": inside("int4", 0.1, -3), "e": inside("float16", 0.1, -30)}  # fmt: skip

    assert list(different(found, 8)) == ["a", "c", "d", "e"]
    assert list(different(found, 2)) == ["a", "c"]


def test_an_arm_with_a_failed_run_is_not_best(undrawn):
    undrawn.diverging = {"float32"}

    assert best_arms(run(), "eval/loss") == {"bfloat16"}


def test_bits_and_frontier_follow_from_storage_and_logs(training):
    results = run()

    points = {point.arm: point for point in pareto(results, "eval/loss")}
    losses = {arm: interval(last_values(results, arm, "eval/loss"))[0] for arm in STORED}
    stored = {"float32": 32, "float16": 16, "bfloat16": 16}
    assert {arm: point.bits for arm, point in points.items()} == stored
    assert {arm for arm, point in points.items() if point.on_frontier} == {
        arm for arm in STORED if not any(stored[o] <= stored[arm] and losses[o] < losses[arm] for o in STORED)
    }
    assert "On the frontier, where no arm is both smaller and better: bfloat16, float32." in html_of(results)


def test_arms_that_the_picture_of_bits_leaves_out_are_named_under_it(training):
    training.diverging = {"float16"}

    page = html_of(run())

    assert page.count("Left out, since bits or a finite number are missing: float16.") == 2


def test_true_bits_count_scales(undrawn):
    """The toy's network: kernels 64 x 4 and 4 x 10 with a scale per column, 14 biases, all in float32 but the codes."""
    arms = {"float32": {}, "int4": {"policy": "weight=int4@channel"}}

    results = runner.run({**EXPERIMENT, "arms": arms, "claims": []}, say=lambda line: None)

    parameters = 64 * 4 + 4 * 10 + 14
    codes = 4 * (64 * 4 + 4 * 10)
    assert results.bits["int4"] == (codes + 32 * (4 + 10) + 32 * 14) / parameters


def test_the_table_as_csv_has_every_digit_of_the_logs(training):
    results = run()

    rows = {row["arm"]: row for row in csv.DictReader(io.StringIO((results.folder / "table.csv").read_text()))}

    for arm in STORED:
        own, base = last_values(results, arm, "eval/loss"), last_values(results, "float32", "eval/loss")
        mean, half = interval(own)
        assert float(rows[arm]["eval/loss"]) == pytest.approx(mean, rel=1e-12)
        assert float(rows[arm]["eval/loss half_width"]) == pytest.approx(half, rel=1e-9)
        if arm != "float32":
            paired = interval([a - b for a, b in zip(own, base, strict=True)])
            assert float(rows[arm]["eval/loss difference"]) == pytest.approx(paired[0], rel=1e-9)
        assert rows[arm]["bits_per_parameter"] == ("32.0" if arm == "float32" else "16.0")
    assert [arm for arm, row in rows.items() if row["eval/loss best"] == "1"] == ["float32"]


def test_best_means_are_bold_in_every_twin_and_no_others(training):
    results = run(metrics=["eval/loss"])
    mean = results.rows[0].cells["eval/loss"].mean.text()

    assert re.findall(r"\*\*(\d.*?)\*\*", markdown.result_table(results)) == [mean]
    assert f"<b>{mean}</b>" in html_of(results)
    assert latex.table(results).count(r"\mathbf") == 1
    assert mean.replace("±", r"\pm") in latex.table(results)


def test_latex_has_as_many_cells_as_columns_and_no_bare_command(undrawn):
    undrawn.failures = {"float16": RuntimeError("50% & more_")}
    results = run(name="a_b")

    text = latex.table(results)
    body = [line for line in text.splitlines() if line.endswith(r"\\")]

    columns = re.search(r"\\begin{tabular}{(\w+)}", text)[1]
    assert {len(re.findall(r"(?<!\\)&", line)) + 1 for line in body} == {len(columns)}
    assert r"float16 (3 failed)" in text
    assert r"$\times$" in text
    assert not re.search(r"(?<!\\)_(?![^$]*\$)", re.sub(r"%.*precision-lab.*", "", text))


def test_every_plot_is_well_formed(training):
    results = run(sweep={"optim.lr": [0.1, 0.2, 1.0]}, claims=[])

    drawn = re.findall(r"<svg.*?</svg>", html_of(results), flags=re.DOTALL)

    for svg in drawn:
        ET.fromstring(svg.replace("xlink:href", "href"))
    assert {"Along the axes", "Bits and quality", "Learning curves"} <= {
        text for text in Page(html_of(results)).text if text
    }


def test_what_was_found_inside_is_shown_with_the_window_of_the_format(training):
    results = run()
    for one in results.trials:
        inside = {
            "step": 10,
            "sites": [{"site": "layers/0/kernel", "sqnr_db": 31.0}, {"site": "head/kernel", "sqnr_db": "inf"}],
            "tensors": {
                "weights": {"binades": {"-3": 5, "-2": 7}, "format": "float16", "window": [-24, -14, 15], "zero": 0.25,
                            "below": 0.0, "above": 0.0},
                "gradients": {"binades": {}, "format": "float16", "window": [-24, -14, 15], "zero": 1.0, "below": 0.0,
                              "above": 0.0},
            },
        }  # fmt: skip
        (one.path / FILE).parent.mkdir()
        (one.path / FILE).write_text(json.dumps(inside))

    results.report()
    text = html_of(results)

    assert "float16: layers/0/kernel at 31 dB" in text
    assert "25.00% zero" in text
    assert "all zero" in text
    assert ">exact<" in text


def test_a_broken_file_of_insides_is_no_reason_to_have_no_report(training):
    results = run()
    one = results.trial("float32", 0)
    (one.path / FILE).parent.mkdir()
    (one.path / FILE).write_text('{"step": 1}')

    assert results.report(look_inside=True).exists()


def test_the_best_arm_is_explained_against_the_baseline(training):
    results = run(arms=EXPERIMENT["arms"], baseline="float16")

    text = "".join(Page(html_of(results)).text)

    assert "Best by eval/loss: float32" in text
    assert "policy=float32" in text
    assert "--arm float32" in text


def test_of_many_arms_the_baseline_and_the_best_are_drawn(undrawn):
    from precision_lab.runner.plots import shown_arms

    results = run(arms=EXPERIMENT["arms"], sweep={"optim.lr": [0.1, 0.2, 0.3]}, baseline="float16", claims=[])

    shown = shown_arms(results, most=4)

    losses = {arm: interval(last_values(results, arm, "eval/loss"))[0] for arm in results.experiment.arms}
    best = sorted(losses, key=losses.get)[:3]
    assert set(shown) == {"float16,lr=0.1", *best}
    assert shown == [arm for arm in results.experiment.arms if arm in shown]


def test_pictures_show_in_a_notebook_and_can_be_saved(undrawn, tmp_path):
    results = run()

    for picture in (results.plot("eval/loss"), results.plot(), results.pareto("eval/loss")):
        assert picture._repr_html_().startswith("<svg")
        assert ET.parse(picture.save(tmp_path / "p.svg")).getroot().tag.endswith("svg")
    assert results.pareto().save(tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"no run logged 'eval/los'; did you mean 'eval/loss'\?"):
        results.plot("eval/los")
    with pytest.raises(ValueError, match=r"pareto\('train/loss_scale'\) needs a metric with a better direction"):
        results.pareto("train/loss_scale")


def test_the_frame_of_metrics_has_a_row_for_each_step(undrawn, monkeypatch):
    class Pandas:
        """Keeps rows as they are."""

        DataFrame = staticmethod(lambda rows: rows)

    monkeypatch.setitem(__import__("sys").modules, "pandas", Pandas)
    results = run(sweep={"optim.lr": [0.1, 0.2]}, claims=[])

    rows = results.metrics_frame()

    assert len(rows) == 6 * 3 * 11
    row = next(row for row in rows if row["arm"] == "float16,lr=0.2" and row["seed"] == 1 and row["step"] == 4)
    assert row["lr"] == 0.2
    series = results.trial("float16,lr=0.2", 1).series["eval/loss"]
    assert row["eval/loss"] == series.values[series.steps.index(4)]
    assert results.frame()[0]["base"] == "float32"


def test_the_clock_counts_training_only_and_never_runs_backwards(tmp_path):
    now = iter([100.0, 101.0, 103.0, 107.0]).__next__
    clock = StepClock(tmp_path, now)
    for step in (0, 0, 10, 20):
        clock.note(step)
    later = StepClock(tmp_path, iter([5000.0, 5002.0]).__next__)
    later.restart(10)
    later.note(15)

    assert read_clock(tmp_path) == {0: 1.0, 10: 3.0, 15: 5.0}
    (tmp_path / "clock.txt").write_text("0 1.0\n10 3.")
    assert read_clock(tmp_path) == {0: 1.0, 10: 3.0}
    (tmp_path / "clock.txt").write_text("0 1.0\n10")
    assert read_clock(tmp_path) == {0: 1.0}
    assert read_clock(tmp_path / "nowhere") == {}
    assert all(map(math.isfinite, read_clock(tmp_path).values()))

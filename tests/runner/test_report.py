"""The report is checked against a recomputation from metrics.jsonl that shares no code with it."""

import csv
import dataclasses
import io
import json
import math
import re
import statistics
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest
from scipy import stats as oracle

from precision_lab import runner
from precision_lab.runner import html, latex, markdown
from precision_lab.runner.drawing import Picture, figure_of
from precision_lab.runner.metrics import Series
from precision_lab.runner.pairing import unpaired
from precision_lab.runner.plots import band
from precision_lab.runner.summary import shared, varied
from tests.runner.fakes import EXPERIMENT, FakeTraining, install

PAPER = {
    "title": "Some & Others 2018",
    "arxiv": "1710.03740",
    "where": "Table 2",
    "claim": "<b>half</b> is enough",
    "status": "secondary",
    "table": {"SSD": {"fp32": 76.9, "fp16": "diverges"}},
}
HOSTILE = '"><script>alert(1)</script>&'


@pytest.fixture
def training(monkeypatch, tmp_path):
    """Training that takes no time, with the plots drawn."""
    fake = FakeTraining()
    install(monkeypatch, fake, plots=True)
    monkeypatch.chdir(tmp_path)
    return fake


@pytest.fixture
def results(training):
    claims = [{**EXPERIMENT["claims"][0], "say": "16 bits <cost> something", "paper": "0.5 & more"}]
    notes = f"Does it matter?\n\nSecond paragraph {HOSTILE}."
    return runner.run({**EXPERIMENT, "notes": notes, "paper": PAPER, "claims": claims}, say=lambda line: None)


def last_values(results, arm, metric):
    """Returns the last value of a metric for every seed of an arm, read from the files by hand."""
    split, name = metric.split("/")
    values = []
    for seed in results.experiment.seeds:
        lines = (results.trial(arm, seed).path / "metrics.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        values.append(max((row["step"], row[name]) for row in rows if row["split"] == split and name in row)[1])
    return [float(value) for value in values]


def interval(values):
    """Returns the mean and half of the 95 % interval, as scipy has them."""
    low, high = oracle.t.interval(0.95, len(values) - 1, loc=statistics.fmean(values), scale=oracle.sem(values))
    return statistics.fmean(values), (high - low) / 2


class Page(HTMLParser):
    """Collects the table rows, the tags and the attributes of a page."""

    def __init__(self, text):
        super().__init__()
        self.rows, self.tags, self.fetches, self.text, self._cell = [], [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetches += [(tag, name, value) for name, value in attrs if name in {"src", "srcset", "data", "action"}]
        self.fetches += [(tag, name, value) for name, value in attrs if name == "href" and tag != "a"]
        if tag == "tr":
            self.rows.append([])
        self._cell = tag in {"td", "th"} or self._cell

    def handle_endtag(self, tag):
        self._cell = False if tag in {"td", "th"} else self._cell

    def handle_data(self, data):
        self.text.append(data)
        if self._cell and self.rows:
            self.rows[-1].append(data)


def html_of(results):
    """Returns the report's text."""
    return (results.folder / "report.html").read_text()


def table_of(results):
    """Returns the rows of the result table, the first one on the page, by arm."""
    rows: dict[str, list[str]] = {}
    for row in Page(html_of(results)).rows:
        rows.setdefault(row[0] if row else "", row)
    return rows


@pytest.mark.parametrize("columns", [("eval/loss", "eval/accuracy"), ("train/loss", "eval/accuracy", "eval/loss")])
def test_the_numbers_in_the_table_are_those_of_the_logs(training, columns):
    results = runner.run({**EXPERIMENT, "metrics": columns}, say=lambda line: None)

    rows = table_of(results)

    for arm in EXPERIMENT["arms"]:
        shown = [cell for cell in rows[arm] if "±" in cell]
        expected = []
        for metric in columns:
            own, base = last_values(results, arm, metric), last_values(results, "float32", metric)
            expected.append(interval(own))
            if arm != "float32":
                expected.append(interval([a - b for a, b in zip(own, base, strict=True)]))
        assert len(shown) == len(expected)
        for cell, (mean, half_width) in zip(shown, expected, strict=True):
            found_mean, found_half = (float(part) for part in cell.split("±"))
            # Two digits of the half width are printed: no more than half a unit of the second is lost.
            unit = 10.0 ** (math.floor(math.log10(max(half_width, 1e-16))) - 1)
            assert found_mean == pytest.approx(mean, abs=0.51 * max(unit, 1e-4 * abs(mean)))
            assert found_half == pytest.approx(half_width, abs=0.51 * unit)


def test_every_twin_has_the_same_numbers(results):
    rows = list(csv.DictReader(io.StringIO((results.folder / "results.csv").read_text())))
    markdown = (results.folder / "report.md").read_text()
    cells = [cell.strip() for line in markdown.splitlines() if line.startswith("| float16") for cell in line.split("|")]

    assert len(rows) == 9
    for row in rows:
        values = last_values(results, row["arm"], "eval/loss")
        assert float(row["eval/loss"]) == values[int(row["seed"])]
    html_row = next(row for row in Page(html_of(results)).rows if row and row[0] == "float16")
    assert [cell for cell in html_row if "±" in cell] == [cell for cell in cells if "±" in cell]


def test_verdicts_are_kept_with_their_numbers(results):
    verdicts = json.loads((results.folder / "verdicts.json").read_text())

    own, base = last_values(results, "float16", "eval/loss"), last_values(results, "float32", "eval/loss")
    assert verdicts[0]["verdict"] == "reproduced"
    assert verdicts[0]["numbers"]["float16 - float32"] == [a - b for a, b in zip(own, base, strict=True)]


def test_the_page_fetches_nothing_and_runs_nothing(results):
    text = html_of(results)
    page = Page(text)

    for svg in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL):
        ET.fromstring(svg.replace("xlink:href", "href"))
    assert page.fetches == [] or all(name == "href" and value.startswith("#") for _, name, value in page.fetches)
    assert not {"script", "link", "iframe", "img", "object", "embed"} & set(page.tags)
    assert "@import" not in text
    assert all(link.startswith("#") for link in re.findall(r"url\(([^)]*)\)", text))
    assert re.findall(r"https?://[^\s\"<]*", text) == ["https://arxiv.org/abs/1710.03740"]


def test_text_from_a_config_cannot_become_markup(results):
    text = html_of(results)

    assert "<script" not in text
    assert "<b>half" not in text
    assert "<cost>" not in text
    assert HOSTILE in "".join(Page(text).text)


def test_the_page_has_everything_a_reader_looks_for(results):
    page = Page(html_of(results))
    text = "".join(page.text)

    assert page.tags.count("svg") == 4  # curves over steps and over time, every run, what the numbers did
    assert "1 of 1 claims reproduced" in text
    assert "Some & Others 2018" in text
    assert "diverges" in text
    assert "policy=" in text
    assert f"precision-lab run {results.folder} --arm float16" in text
    assert "1.2.3" in text


def test_writing_the_report_again_changes_no_byte(results):
    before = {path.name: path.read_bytes() for path in results.folder.iterdir()}

    runner.read(results.experiment).report()

    assert {path.name: path.read_bytes() for path in results.folder.iterdir()} == before


def test_runs_that_did_not_finish_are_shown(training):
    training.failures, training.diverging = {"float16": RuntimeError("boom")}, {"bfloat16"}

    results = runner.run(EXPERIMENT, say=lambda line: None)

    rows = table_of(results)
    assert rows["float16"][1:] == ["0 of 3", "✗", "✗", "3 failed"]
    assert rows["bfloat16"][1:] == ["0 of 3", "✗", "✗", "3 diverged"]
    assert "0 of 3" in (results.folder / "report.md").read_text()
    assert "inconclusive" in str(results)


def test_an_experiment_that_never_ran_still_has_a_report(training, tmp_path):
    path = runner.read(runner.load(EXPERIMENT)).report(tmp_path / "r.html")

    assert "not run" in path.read_text()


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_curve_with_holes_can_be_drawn(training, value):
    training.last_loss = {"float16": value}

    results = runner.run(EXPERIMENT, say=lambda line: None)

    assert "nan" in html_of(results) or "inf" in html_of(results)


def test_one_file_or_all_of_them(results, tmp_path):
    assert results.report(tmp_path / "a" / "x.md").read_text().startswith("# toy")
    assert results.report(tmp_path / "all") == tmp_path / "all" / "report.html"
    with pytest.raises(ValueError, match=r"written as \.html, \.md, \.csv or \.tex.*'.*report\.pdf'"):
        results.report(tmp_path / "report.pdf")


def test_the_band_is_median_and_extremes_over_the_runs_that_got_there():
    runs = [Series([0, 1], [1.0, 5.0]), Series([0, 1], [2.0, math.nan]), Series([0], [9.0])]

    steps, low, middle, high = band(runs)

    assert (steps, low, middle, high) == ([0, 1], [1.0, 5.0], [2.0, 5.0], [9.0, 5.0])


def test_a_notebook_shows_the_table(results):
    assert "<table" in results._repr_html_()
    assert "<script" not in results._repr_html_()


def test_what_was_varied_is_said_as_it_would_be_set():
    scaled = {"policy": "float16_pure", "loss_scale": {"kind": "static", "scale": 8}, "optim": {"kind": "adam"}}
    experiment = {**EXPERIMENT, "arms": {"float32": {}, "scaled": scaled}, "claims": []}
    experiment["optim"] = {"kind": "sgd", "lr": 0.1, "momentum": 0.9}
    found = runner.read(runner.load(experiment))

    changes = varied(found)

    assert changes["float32"] == {}
    assert changes["scaled"] == {
        "policy": "float16_pure",
        "loss_scale": "static",
        "loss_scale.scale": 8.0,
        "optim": "adam",
    }
    assert "loss_scale" not in "".join(shared(found))
    assert shared(found)["model"] == "mlp"
    assert shared(found)["train.steps"] == 10


def test_what_never_moved_is_not_drawn(training):
    results = runner.run({**EXPERIMENT, "metrics": ["eval/loss"]}, say=lambda line: None)

    assert "train/loss_scale" in html_of(results)
    assert "train/skipped_steps" not in html_of(results)


def test_a_readme_keeps_its_own_text_around_the_report(results, tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("# Mine\n<!-- report -->\nold numbers\n<!-- end of report -->\nlearnt\n")

    results.report(readme)
    once = readme.read_text()
    results.report(readme)

    assert readme.read_text() == once
    assert once.startswith("# Mine\n<!-- report -->\n")
    assert once.endswith("<!-- end of report -->\nlearnt\n")
    assert "old numbers" not in once
    assert "| float32 |" in once


def test_a_markdown_file_without_the_marks_is_not_overwritten(results, tmp_path):
    (tmp_path / "README.md").write_text("# Mine\n")

    with pytest.raises(ValueError, match="put the lines '<!-- report -->' and '<!-- end of report -->'"):
        results.report(tmp_path / "README.md")

    assert (tmp_path / "README.md").read_text() == "# Mine\n"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": {"batch": 16}}, "; not paired: data.batch differs"),
        ({"data": {"batch": 16}, "model": {"hidden": [5]}}, "; not paired: data.batch, model.hidden differ"),
        ({"optim": {"lr": 0.2}}, ""),
    ],
)
def test_a_verdict_on_arms_that_share_no_batches_or_initialisation_says_so(training, change, words):
    arms = {"float32": {}, "float16": {"policy": "float16_mixed", **change}}

    results = runner.run({**EXPERIMENT, "arms": arms}, say=lambda line: None)

    because = results.verdicts[0].because
    assert because.partition(" at the least")[2] == words


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ({}, {"policy": "bfloat16_mixed"}, ""),
        ({}, {"data": {"batch": 16}}, "; not paired: start.data.batch differs"),
        ({"model": {"hidden": [5]}}, {"model": {"hidden": [5]}}, ""),
    ],
)
def test_a_verdict_on_arms_that_begin_from_others_is_paired_by_the_seeds_of_those(training, first, second, words):
    model = {"model": first["model"]} if "model" in first else {}
    arms = {
        "first": first,
        "second": second,
        "float32": {**model, "start": {"arm": "first"}},
        "float16": {**model, "start": {"arm": "second"}, "policy": "float16_mixed"},
    }

    results = runner.run({**EXPERIMENT, "arms": arms, "baseline": "float32"}, say=lambda line: None)

    assert results.verdicts[0].because.partition(" at the least")[2] == words


def test_a_run_is_paired_with_the_beginning_of_another_if_both_were_initialised_alike():
    arms = {"one": {}, "two": {"start": {"arm": "one"}}, "three": {"start": {"arm": "two"}}}
    other = {"other": {"data": {"batch": 16}}, "moved": {"start": {"arm": "other"}}}
    found = runner.load({**EXPERIMENT, "arms": arms | other, "baseline": "one", "claims": []}).runs
    runs = {arm: seeds[0] for arm, seeds in found.items()}

    assert unpaired([runs["one"], runs["two"], runs["three"]]) == []
    assert unpaired([runs["one"], runs["moved"]]) == ["start.data.batch"]
    assert unpaired([runs["other"], runs["moved"]]) == ["data.batch"]
    assert unpaired([runs["three"], runs["moved"]]) == ["start.data.batch", "start.start.data.batch"]


def test_a_run_that_trains_nothing_is_paired_as_the_one_that_it_evaluates():
    evaluated, other = {"train": {"steps": 0, "eval_every": None}}, {"data": {"batch": 16}}
    arms = {"one": {}, "tuned": {"start": {"arm": "one"}, **other}, "more": {"start": {"arm": "one"}, **other}}
    arms["judged"] = {"start": {"arm": "tuned"}, **other, **evaluated}
    arms["elsewhere"] = {"start": {"arm": "tuned"}, **evaluated}
    found = runner.load({**EXPERIMENT, "arms": arms, "baseline": "one", "claims": []}).runs
    runs = {arm: seeds[0] for arm, seeds in found.items()}

    assert unpaired([runs["judged"], runs["more"]]) == []
    assert unpaired([runs["judged"], runs["tuned"]]) == []
    assert unpaired([runs["judged"], runs["one"]]) == ["data.batch"]
    assert unpaired([runs["elsewhere"], runs["more"]]) == ["data.batch", "start.data.batch"]


@pytest.fixture
def mixed(training):
    """Two trainings and a probe, all finished, with numbers that are made up."""
    arms = {
        "float32": {},
        "narrow": {"policy": "float16_mixed"},
        "dot": {"probe": {"kind": "dot_product", "length": 8}},
    }
    claims = [{"kind": "ratio", "a": "narrow", "b": "float32", "metric": "eval/loss", "factor": 2.0}]
    read = runner.read(runner.load({**EXPERIMENT, "arms": arms, "claims": claims}))
    made = {"float32": ("eval/loss", 1.0), "narrow": ("eval/loss", 1.5), "dot": ("probe/error", 0.25)}
    trials = [
        dataclasses.replace(one, state="done", series={metric: Series([10], [value + one.seed])})
        for one in read.trials
        for metric, value in [made[one.arm]]
    ]
    return runner.Results(read.experiment, trials, read.out)


def test_a_probe_among_trainings_has_empty_cells_and_the_trainings_their_numbers(mixed):
    rows = {row[0]: row for row in csv.reader(io.StringIO(markdown.table_csv(mixed)))}
    dot = next(line for line in markdown.result_table(mixed).splitlines() if line.startswith("| dot "))

    assert mixed.experiment.columns == ("eval/loss", "eval/accuracy")
    assert float(rows["narrow"][rows["arm"].index("eval/loss difference")]) == 0.5
    assert dot.split("|")[3].strip() == ""
    assert "✗" not in dot + str(mixed.table()).split("dot")[1] + latex.table(mixed)
    assert "✗" in str(runner.read(mixed.experiment).table())  # nothing has run there


def test_what_a_probe_among_trainings_changes_and_what_the_trainings_share(mixed):
    assert varied(mixed)["dot"] == {"probe": "dot_product", "probe.length": 8}
    assert shared(mixed)["model"] == "mlp"
    assert "All trainings: <code>model=mlp</code>" in html.page(mixed)


def test_a_ratio_shows_the_numbers_of_all_its_terms(mixed):
    page = html.page(mixed)

    assert "narrow by seed: 1.5, 2.5, 3.5" in page
    assert "float32 by seed: 1, 2, 3" in page


def test_exponents_are_mathematics_in_latex(mixed):
    tiny = [dataclasses.replace(one, series={name: Series(s.steps, [1 + v * 1e-7 for v in s.values]) for name, s in
                                             one.series.items()}) for one in mixed.trials]  # fmt: skip

    text = latex.table(runner.Results(mixed.experiment, tiny, mixed.out))

    assert r"$1.0000002 \pm 2.5 \times 10^{-7}$" in text
    assert not re.search(r"\de[-+]\d", text)


def test_a_picture_is_refused_a_format_that_it_cannot_be_saved_in(tmp_path):
    with figure_of(1, 1, 2.0, "line") as (figure, [panel]):
        panel.plot([1, 2])
        picture = Picture(figure, "a line")

    for name in ("line.docx", "line"):
        with pytest.raises(ValueError, match=r"saved as one of .*\.pdf, .*\.png, .*\.svg"):
            picture.save(tmp_path / name)
    assert picture.save(tmp_path / "line.PNG").read_bytes().startswith(b"\x89PNG")

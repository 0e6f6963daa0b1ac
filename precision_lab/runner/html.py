"""The report as one HTML file: no script, no network, readable on paper."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from typing import TYPE_CHECKING, Any

from precision_lab.runner import drawing, html_numbers, plots
from precision_lab.runner.html_parts import breakable, changes_code, figure, prose
from precision_lab.runner.ranking import best_arms, bits_differ, bits_text
from precision_lab.runner.summary import (
    TIMELINES,
    claimed,
    command,
    environment_spread,
    environments,
    run_count,
    shared,
    sharing,
    varied,
)
from precision_lab.runner.terminal import MARKS, stacked

if TYPE_CHECKING:
    from precision_lab.runner.claim import Verdict
    from precision_lab.runner.results import Results
    from precision_lab.runner.rows import Cell, Row

_STATUS = {
    "primary": "numbers checked against the paper",
    "secondary": "numbers from a source that quotes the paper",
    "memory": "numbers from memory, not checked",
}


_MOST_NUMBERS = 6
"""Terms of one claim whose numbers are shown seed by seed."""


def page(results: "Results") -> str:
    """Returns the whole report."""
    experiment = results.experiment
    parts = [
        _header(results),
        _section("Claims", _claims(results.verdicts)) if results.verdicts else "",
        _section("Results", _table(results) + _finals(results)),
        _section("Along the axes", html_numbers.axes(results)),
        _section("Bits and quality", html_numbers.bits_and_quality(results)),
        _section("Learning curves", _curves(results)),
        _section("The numbers themselves", _timelines(results) + html_numbers.inside(results)),
        _section("What was varied", html_numbers.best_against_baseline(results) + _varied(results)),
        _section("The paper's numbers", _paper_table(results)),
        _section("Run it again", _commands(results)),
        _section("Environment", _environment(results)),
    ]
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(experiment.name)} - precision_lab</title>\n<style>\n{_css()}</style>\n</head>\n"
        f"<body>\n<main>\n{''.join(part for part in parts if part)}</main>\n</body>\n</html>\n"
    )


def fragment(results: "Results") -> str:
    """Returns the result table and the verdicts, for a notebook cell."""
    claims = _claims(results.verdicts) if results.verdicts else ""
    # Nested under a class of ours, the rules cannot touch the rest of the notebook.
    style = f"<style>.pl-report {{ {_css()} }}</style>"
    return f'{style}<div class="pl-report">{_table(results)}{claims}</div>'


def _css() -> str:
    """Returns the style sheet, which stands in the file."""
    return resources.files("precision_lab.runner").joinpath("report.css").read_text(encoding="utf-8")


def _section(title: str, body: str) -> str:
    """Returns a section, nothing where there is no body."""
    return f"<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>\n" if body else ""


def _header(results: "Results") -> str:
    """Returns the title, the question, the paper and the outcome in one line each."""
    experiment = results.experiment
    notes = "".join(f"<p>{prose(text)}</p>" for text in experiment.notes.strip().split("\n\n") if text)
    return (
        f"<header>\n<h1>{escape(experiment.name)}</h1>\n{_paper_line(results)}"
        f'<p class="outcome">{escape(claimed(results))} <span>· {escape(run_count(results))}'
        f"{escape(environment_spread(results))}</span></p>\n"
        f'<div class="notes">{notes}</div>\n</header>\n'
    )


def _paper_line(results: "Results") -> str:
    """Returns where the claims come from."""
    paper = results.experiment.paper
    if paper is None:
        return ""
    arxiv = f'<a href="https://arxiv.org/abs/{escape(paper.arxiv)}">arXiv:{escape(paper.arxiv)}</a>'
    parts = [escape(paper.title), arxiv if paper.arxiv else "", escape(paper.where), escape(_STATUS[paper.status])]
    claim = f'<p class="claim">{escape(paper.claim)}</p>\n' if paper.claim else ""
    return f'<p class="paper">{" · ".join(part for part in parts if part)}</p>\n{claim}'


def _claims(verdicts: Iterable["Verdict"]) -> str:
    """Returns one block per claim: the verdict, the claim, our numbers, the paper's."""
    return '<div class="claims">\n' + "\n".join(_claim(one) for one in verdicts) + "\n</div>"


def _claim(one: "Verdict") -> str:
    """Returns one claim."""
    # The last numbers of these are what they judge, made from the others.
    values = list(one.numbers.items())[-1 if one.kind in ("gt", "close", "equal", "trend") else -_MOST_NUMBERS :]
    seeds = "".join(
        f'<p class="by-seed">{escape(name)} by seed: {", ".join(f"{number:.4g}" for number in numbers)}</p>'
        for name, numbers in values
    )
    paper = f'<p class="said">Paper: {escape(one.paper)}</p>' if one.paper else ""
    return (
        f'<article class="{escape(one.verdict)}"><p class="verdict">{MARKS[one.verdict]} '
        f'{escape(one.verdict.replace("_", " "))}</p><p class="say">{escape(one.say)}</p>'
        f'<p class="because">{escape(one.because)}</p>{seeds}{paper}</article>'
    )


def _table(results: "Results") -> str:
    """Returns the result table."""
    experiment = results.experiment
    baseline = escape(experiment.baseline_name)
    bits = results.bits if bits_differ(results) else {}
    best = {metric: best_arms(results, metric) for metric in experiment.columns}
    beside = "" if stacked(results) else f'<th class="n">vs {baseline}</th>'
    heads = "".join(f'<th class="n">{breakable(metric)}</th>{beside}' for metric in experiment.columns)
    below = f" Second lines are differences to {baseline}." if stacked(results) else ""
    below += " Each is compared with the baseline at its own point." if baseline != experiment.baseline_arm else ""
    heads = ('<th class="n">bits</th>' if bits else "") + heads
    shown = plots.shown_arms(results)
    rows = "\n".join(_row(results, row, bits, best, shown) for row in results.rows)
    bold = " Best means are bold." if any(best.values()) else ""
    stored = " Bits are true bits per parameter, scales included, as convert stores the model." if bits else ""
    dense = " dense" if len(experiment.columns) > 3 else ""
    return (
        f'<div class="wide"><table class="results{dense}"><thead><tr><th>arm</th><th class="n">seeds</th>{heads}'
        "<th></th></tr></thead>\n"
        f"<tbody>\n{rows}\n</tbody></table></div>\n"
        '<p class="fine">Mean over seeds ± half of its 95 % interval (Student). Differences are paired by seed: the '
        f"arms of one seed share initialisation and batch order.{below}{bold}{stored}</p>\n"
    )


def _row(
    results: "Results", row: "Row", bits: Mapping[str, Any], best: Mapping[str, set[str]], shown: Sequence[str]
) -> str:
    """Returns one arm; what did not finish is shown, not left out."""
    swatch = ""
    if row.arm in shown:
        swatch = f'<i class="swatch" style="background:{drawing.look(shown.index(row.arm))["color"]}"></i>'
    stack = stacked(results)
    cells = "".join(_cell(cell, stack=stack, bold=row.arm in best[metric]) for metric, cell in row.cells.items())
    if bits:
        cells = f'<td class="n">{bits_text(bits[row.arm])}</td>{cells}'
    trouble = f'<td class="trouble">{escape(row.trouble_text())}</td>' if row.troubles else "<td></td>"
    seeds = f"{row.finished} of {row.total}" if row.troubles else str(row.finished)
    return f'<tr><th scope="row">{swatch}{escape(row.arm)}</th><td class="n">{seeds}</td>{cells}{trouble}</tr>'


def _cell(cell: "Cell", *, stack: bool, bold: bool) -> str:
    """Returns a mean and a difference, in two cells or one above the other."""
    mean = escape(cell.text) if cell.mean or not cell.expected else f'<b class="missing">{cell.text}</b>'
    mean = f"<b>{mean}</b>" if bold else mean
    difference = escape(cell.difference.text(signed=True)) if cell.difference else ""
    if stack:
        return f'<td class="n">{mean}<div class="dim">{difference}</div></td>'
    return f'<td class="n">{mean}</td><td class="n dim">{difference}</td>'


def _finals(results: "Results") -> str:
    """Returns the plot of every run's last values."""
    svg = plots.finals(results, results.experiment.columns)
    return figure(svg, "Every run: one mark per seed, a bar at the mean, a line over its 95 % interval.")


def _curves(results: "Results") -> str:
    """Returns the learning curves: the columns of the table, each beside the same metric in training."""
    columns = results.experiment.columns
    logged = {name for one in results.trials for name in one.series}
    metrics: dict[str, None] = {}
    for column in columns:
        name = column.partition("/")[2]
        twin = next((f"{split}/{name}" for split in ("train", "eval_train") if f"{split}/{name}" in logged), column)
        metrics |= dict.fromkeys((twin, column))
    drawn = [metric for metric in metrics if metric not in TIMELINES]
    few = len(plots.shown_arms(results)) < len(results.experiment.arms)
    chosen = f" Of {len(results.experiment.arms)} arms, the baseline and those best by {columns[0]}." if few else ""
    caption = f"Median over seeds; the band reaches from the smallest to the largest.{chosen}"
    timed = plots.curves(results, drawn[-2:], name="clock", over="seconds") if _timed(results) else None
    return figure(plots.curves(results, drawn, name="curves"), caption) + figure(
        timed,
        "The same over time in training, of each arm's fastest run; that is about this machine, not about formats.",
    )


def _timed(results: "Results") -> bool:
    """Returns whether the runs kept a clock."""
    return any(one.seconds for one in results.trials)


def _timelines(results: "Results") -> str:
    """Returns the loss scale, skipped steps and lost gradients over time, where they moved."""
    told = [metric for metric in TIMELINES if len(_distinct(results, metric)) > 1]
    svg = plots.curves(results, told, name="timelines")
    return figure(
        svg,
        "; ".join(_TOLD[metric] for metric in told).capitalize() + ".",
    )


_TOLD = {
    "train/loss_scale": "loss scale",
    "train/skipped_steps": "steps skipped so far",
    "train/zero_grad_fraction": "share of gradient values that are exactly zero",
    "train/unchanged_fraction": "share of weights that a step left unchanged",
}


def _distinct(results: "Results", metric: str) -> set[float]:
    """Returns the values that a metric ever had; one that never moved has nothing to show."""
    return {value for one in results.trials if metric in one.series for value in one.series[metric].values}


def _varied(results: "Results") -> str:
    """Returns what each arm changes, and what all share."""
    baseline = '<span class="dim">baseline</span>'
    rows = "".join(
        f'<tr><th scope="row">{escape(arm)}</th><td>{changes_code(changes) or baseline}</td></tr>'
        for arm, changes in varied(results).items()
    )
    seeds = _listed(results.experiment.seeds)
    return (
        f'<table class="varied"><tbody>{rows}</tbody></table>\n'
        f'<p class="fine">{sharing(results)}: {changes_code(shared(results))} and defaults; seeds {seeds}.</p>'
    )


def _listed(values: Iterable[Any]) -> str:
    """Returns values with commas between them."""
    return escape(", ".join(str(value) for value in values))


def _paper_table(results: "Results") -> str:
    """Returns the paper's own numbers, which are never compared with ours by the machine."""
    table = results.experiment.paper.table if results.experiment.paper else {}
    if not table:
        return ""
    columns = list(dict.fromkeys(column for row in table.values() for column in row))
    heads = "".join(f'<th class="n">{escape(column)}</th>' for column in columns)
    rows = "".join(
        f'<tr><th scope="row">{escape(name)}</th>'
        + "".join(f'<td class="n">{escape(str(row.get(column, "")))}</td>' for column in columns)
        + "</tr>"
        for name, row in table.items()
    )
    return f"<table><thead><tr><th></th>{heads}</tr></thead><tbody>{rows}</tbody></table>"


def _commands(results: "Results") -> str:
    """Returns the command for everything, and for each arm."""
    lines = [command(results), *(command(results, arm) for arm in results.experiment.arms)]
    return f"<pre>{escape(chr(10).join(lines))}</pre>"


def _environment(results: "Results") -> str:
    """Returns what the runs ran on; where they differ, every value."""
    found = environments(results)
    if not found:
        return ""
    items = "".join(f"<div><dt>{escape(key)}</dt><dd>{_values(values)}</dd></div>" for key, values in found.items())
    mixed = any(len(values) > 1 for values in found.values())
    warning = '<p class="trouble">The runs do not all come from one environment.</p>' if mixed else ""
    return f"{warning}<dl>{items}</dl>"


def _values(values: list[str]) -> str:
    """Returns one value, or all of them where the runs differ."""
    return escape(" / ".join(value or "none" for value in values))

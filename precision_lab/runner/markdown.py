"""The report as Markdown, for a pull request or a README, and the runs as CSV."""

import csv
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from precision_lab.runner.metrics import encode_number
from precision_lab.runner.ranking import best_arms, bits_differ, bits_text
from precision_lab.runner.summary import change_text, claimed, command, environments, run_count, varied
from precision_lab.runner.terminal import MARKS

if TYPE_CHECKING:
    from precision_lab.runner.results import Results
    from precision_lab.runner.rows import Cell, Row


def page(results: "Results") -> str:
    """Returns the report as a file of its own."""
    return f"# {results.experiment.name}\n\n{body(results)}"


def body(results: "Results") -> str:
    """Returns the report without a title: outcome, table, verdicts, arms, commands, environment."""
    experiment = results.experiment
    parts = [
        _paper(results),
        f"**{claimed(results)}**; {run_count(results)}.",
        experiment.notes.strip(),
        result_table(results),
        f"Mean over seeds ± half of its 95 % interval; differences to `{experiment.baseline_name}` are paired by seed.",
        verdict_table(results) if results.verdicts else "",
        "## Arms\n\n" + _table(("arm", "differs from the baseline in"), _arms(results)),
        f"## Run it again\n\n```\n{command(results, with_out=False)}\n```",
        "## Environment\n\n" + _environment(results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def result_table(results: "Results") -> str:
    """Returns the result table, best means in bold, with true bits per parameter where the arms differ in them."""
    experiment = results.experiment
    bits = results.bits if bits_differ(results) else {}
    columns = ["arm", "seeds", *(["bits"] if bits else [])]
    for metric in experiment.columns:
        columns += [metric, f"vs {experiment.baseline_name}"]
    best = {metric: best_arms(results, metric) for metric in experiment.columns}
    troubled = any(row.troubles for row in results.rows)
    rows = []
    for row in results.rows:
        head = [row.arm, seeds_text(row), *([bits_text(bits[row.arm])] if bits else [])]
        cells = [text for metric, cell in row.cells.items() for text in _cell(cell, bold=row.arm in best[metric])]
        rows.append([*(_text(str(cell)) for cell in head), *cells, *([_text(row.trouble_text())] if troubled else [])])
    heads = [_text(column) for column in ([*columns, "not finished"] if troubled else columns)]
    return _raw_table(heads, rows)


def seeds_text(row: "Row") -> str:
    """Returns `3`, or `2 of 3` where some run did not finish."""
    return f"{row.finished} of {row.total}" if row.troubles else str(row.finished)


def _cell(cell: "Cell", *, bold: bool) -> list[str]:
    """Returns a mean and a difference; what did not finish is shown, not left out."""
    mean = _text(cell.text)
    return [f"**{mean}**" if bold else mean, _text(cell.difference.text(signed=True)) if cell.difference else ""]


def verdict_table(results: "Results") -> str:
    """Returns the verdict on each claim, beside what the paper reports."""
    rows = [
        (f"{MARKS[one.verdict]} {one.verdict.replace('_', ' ')}", one.say, one.because, one.paper)
        for one in results.verdicts
    ]
    return _table(("verdict", "claim", "ours", "paper"), rows)


def _paper(results: "Results") -> str:
    """Returns where the claims come from."""
    paper = results.experiment.paper
    if paper is None:
        return ""
    link = f"[arXiv:{paper.arxiv}](https://arxiv.org/abs/{paper.arxiv})" if paper.arxiv else ""
    return ", ".join(part for part in (_text(paper.title), link, _text(paper.where)) if part)


def _arms(results: "Results") -> list[tuple[str, str]]:
    """Returns what each arm changes."""
    return [(arm, change_text(changes) or "(baseline)") for arm, changes in varied(results).items()]


def _environment(results: "Results") -> str:
    """Returns what the runs ran on, on one line."""
    found = environments(results)
    return ", ".join(f"{key} {_text(' / '.join(value or 'none' for value in found[key]))}" for key in found)


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Returns a Markdown table of any text."""
    return _raw_table([_text(column) for column in columns], [[_text(str(cell)) for cell in row] for row in rows])


def _raw_table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a Markdown table of cells that are Markdown already."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _text(text: str) -> str:
    """Returns text on one line that cannot break a table or become markup."""
    for char in "\\`*[]<>|":
        text = text.replace(char, f"\\{char}")
    return " ".join(text.split())


def runs_csv(results: "Results") -> str:
    """Returns one row per run: arm, seed, run_id, state, step, and the last value of every metric."""
    return _csv([{key: encode_number(value) for key, value in row.items()} for row in results.to_dicts()])


def table_csv(results: "Results") -> str:
    """Returns the result table: one row per arm, for each metric the mean, half of its 95 % interval, and the paired
    difference to the baseline with half of its own, all with every digit.
    """
    best = {metric: best_arms(results, metric) for metric in results.experiment.columns}
    rows = []
    for row in results.rows:
        line: dict[str, Any] = {"arm": row.arm, **results.experiment.points.get(row.arm, {}), "finished": row.finished,
                                "runs": row.total, "bits_per_parameter": results.bits[row.arm]}  # fmt: skip
        for metric, cell in row.cells.items():
            for name, mean in (("", cell.mean), (" difference", cell.difference)):
                line[f"{metric}{name}"] = encode_number(mean.mean) if mean else None
                line[f"{metric}{name} half_width"] = encode_number(mean.half_width) if mean else None
            line[f"{metric} best"] = int(row.arm in best[metric])
        rows.append(line)
    return _csv(rows)


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns rows as CSV, with all columns that any of them has."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()

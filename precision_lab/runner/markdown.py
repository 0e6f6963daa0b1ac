"""The report as Markdown, for a pull request or a README, and the runs as CSV."""

import csv
import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from precision_lab.runner.metrics import encode_number
from precision_lab.runner.summary import change_text, claimed, command, environments, run_count, varied
from precision_lab.runner.terminal import MARKS

if TYPE_CHECKING:
    from precision_lab.runner.results import Results, Row


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
        f"Mean over seeds ± half of its 95 % interval; differences to `{experiment.baseline_arm}` are paired by seed.",
        verdict_table(results) if results.verdicts else "",
        "## Arms\n\n" + _table(("arm", "differs from the baseline in"), _arms(results)),
        f"## Run it again\n\n```\n{command(results)}\n```",
        "## Environment\n\n" + _environment(results),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def result_table(results: "Results") -> str:
    """Returns the result table."""
    experiment = results.experiment
    columns = ["arm", "seeds"]
    for metric in experiment.columns:
        columns += [metric, f"vs {experiment.baseline_arm}"]
    troubled = any(row.troubles for row in results.rows)
    rows = [_row(row, troubled) for row in results.rows]
    return _table([*columns, "not finished"] if troubled else columns, rows)


def _row(row: "Row", troubled: bool) -> list[str]:
    """Returns one arm; what did not finish is shown, not left out."""
    cells = [row.arm, f"{row.finished} of {row.total}" if row.troubles else str(row.finished)]
    for cell in row.cells.values():
        cells.append(cell.mean_text())
        cells.append(cell.difference.text(signed=True) if cell.difference else "")
    return [*cells, row.trouble_text()] if troubled else cells


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
    """Returns a Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(_text(str(cell)) for cell in line) + " |" for line in lines)


def _text(text: str) -> str:
    """Returns text on one line that cannot break a table or become markup."""
    for char in "\\`*[]<>|":
        text = text.replace(char, f"\\{char}")
    return " ".join(text.split())


def runs_csv(results: "Results") -> str:
    """Returns one row per run: arm, seed, run_id, state, step, and the last value of every metric."""
    rows = [{key: encode_number(value) for key, value in row.items()} for row in results.to_dicts()]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()

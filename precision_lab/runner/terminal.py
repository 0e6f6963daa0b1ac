"""Results as text: the table, the verdict lines, and plain tables for listings."""

import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from precision_lab.runner.claim import INCONCLUSIVE, NOT_REPRODUCED, REPRODUCED

if TYPE_CHECKING:
    from precision_lab.runner.results import Results

MARKS = {REPRODUCED: "✓", NOT_REPRODUCED: "✗", INCONCLUSIVE: "?"}
STYLES = {REPRODUCED: "green", NOT_REPRODUCED: "red", INCONCLUSIVE: "yellow"}
_PLAIN_WIDTH = 160


class TextTable(Table):
    """A rich table that is also readable text under `print`."""

    def __str__(self) -> str:
        console = Console(file=io.StringIO(), width=_PLAIN_WIDTH, color_system=None, force_jupyter=False)
        console.print(self)
        return console.file.getvalue().rstrip()  # type: ignore[attr-defined]


def text_table(columns: Iterable[str], rows: Iterable[Sequence[Any]], *, title: str = "") -> TextTable:
    """Returns a table; columns whose names start with `>` are aligned to the right."""
    table = TextTable(box=box.SIMPLE_HEAD, title=Text(title) if title else None, title_justify="left", pad_edge=False)
    for i, column in enumerate(columns):
        justify = "right" if column.startswith(">") else "left"
        # The first column names the row, often for copying; it is never broken.
        table.add_column(Text(column.removeprefix(">")), justify=justify, overflow="fold", no_wrap=i == 0)
    for row in rows:
        table.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    return table


def stacked(results: "Results") -> bool:
    """Returns whether differences stand below the means, because beside them there is no room."""
    return len(results.experiment.columns) > 2


def result_table(results: "Results") -> TextTable:
    """Returns one row per arm: seeds, and for each metric mean ± 95 % interval and the paired difference to it."""
    baseline = results.experiment.baseline_arm
    columns = ["arm", ">seeds"]
    for metric in results.experiment.columns:
        columns += [f">{metric}"] if stacked(results) else [f">{metric}", f">vs {baseline}"]
    troubled = any(row.troubles for row in results.rows)
    rows = []
    for row in results.rows:
        cells: list[Any] = [row.arm, f"{row.finished} of {row.total}" if row.troubles else str(row.finished)]
        for cell in row.cells.values():
            mean = (
                Text(cell.mean.text()) if cell.mean else Text(cell.blank, style="red" if cell.blank == "✗" else "dim")
            )
            difference = Text(cell.difference.text(signed=True) if cell.difference else "", style="dim")
            both = [mean, difference] if difference.plain else [mean]
            cells += [Text("\n").join(both)] if stacked(results) else [mean, difference]
        rows.append([*cells, Text(row.trouble_text(), style="red")] if troubled else cells)
    return text_table([*columns, ""] if troubled else columns, rows)


def verdict_lines(results: "Results") -> list[str]:
    """Returns one line per claim: a mark, the verdict, the claim, and the numbers behind it."""
    return [
        f"{MARKS[one.verdict]} {one.verdict.replace('_', ' ')}: {one.say} ({one.because})" for one in results.verdicts
    ]


def print_results(results: "Results", console: Console) -> None:
    """Prints the table and the verdicts, in colour where there is a terminal."""
    console.print(result_table(results))
    for verdict, line in zip(results.verdicts, verdict_lines(results), strict=True):
        console.print(Text(line, style=STYLES[verdict.verdict]), soft_wrap=True)
    note = "± is half of a 95 % interval over seeds; differences are paired by seed"
    note += f", and stand below: to {results.experiment.baseline_arm}." if stacked(results) else "."
    if any(row.finished > 1 for row in results.rows):
        console.print(Text(note, style="dim"))

"""Reports: `report.html`, `report.md`, `table.csv`, `table.tex`, `results.csv` and `verdicts.json`, from one source."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from precision_lab.runner import html, latex, markdown
from precision_lab.runner.atomic import write_json, write_text
from precision_lab.runner.metrics import encode_number

if TYPE_CHECKING:
    from precision_lab.runner.results import Results

BEGIN, END = "<!-- report -->", "<!-- end of report -->"
_WRITERS: dict[str, Callable[["Results"], str]] = {
    ".html": html.page,
    ".md": markdown.page,
    ".csv": markdown.runs_csv,
    ".tex": latex.table,
}


def write_report(results: "Results", path: Path) -> Path:
    """Writes one file, or all of them into a folder, and returns the file to open first.

    An existing Markdown file, such as a README, keeps its text: the report goes between its lines `<!-- report -->`
    and `<!-- end of report -->`.

    Raises:
      ValueError: a file name that ends in something else than .html, .md, .csv or .tex; a Markdown file that exists and
        has no such lines.
    """
    if path.suffix == ".md" and path.is_file():
        write_text(path, _spliced(path, markdown.body(results)))
        return path
    if path.suffix in _WRITERS and not path.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, _WRITERS[path.suffix](results))
        return path
    if path.suffix and not path.is_dir() and path != results.folder:
        raise ValueError(f"a report is written as .html, .md, .csv or .tex, or into a folder; got {str(path)!r}.")
    path.mkdir(parents=True, exist_ok=True)
    write_text(path / "report.html", html.page(results))
    write_text(path / "report.md", markdown.page(results))
    write_text(path / "table.csv", markdown.table_csv(results))
    write_text(path / "table.tex", latex.table(results))
    write_text(path / "results.csv", markdown.runs_csv(results))
    write_json(path / "verdicts.json", [_finite(verdict.to_dict()) for verdict in results.verdicts])
    return path / "report.html"


def _spliced(path: Path, text: str) -> str:
    """Returns the text of a file with what stands between the two marks replaced."""
    old = path.read_text(encoding="utf-8")
    before, begin, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path} exists; put the lines '{BEGIN}' and '{END}' where the report should go.")
    return f"{before}{begin}\n{text}{end}{after}"


def _finite(verdict: dict) -> dict:
    """Returns a verdict with numbers that JSON knows."""
    numbers = {name: [encode_number(value) for value in values] for name, values in verdict["numbers"].items()}
    return {**verdict, "numbers": numbers}

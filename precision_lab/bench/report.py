"""What every benchmark writes: rows with their targets, a Markdown page, a table for the terminal, and two files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table

from precision_lab.bench.interleaved import Timing

EXTRA = ("model", "against")  # columns of those benchmarks that have them in their rows


def row(timing: Timing, target: float | None = None, *, needs: str = "", **extra: str) -> dict[str, Any]:
    """Returns a timing as one row of JSON types.

    Args:
      timing: the timing; numbers are rounded to four digits.
      target: largest ratio that we allow ourselves, if any.
      needs: what the target supposes of the hardware and is not there; the target is then neither met nor missed.
      extra: values of the columns in `EXTRA`.
    """
    rounded = {key: value if isinstance(value, str) else rounded_to(value) for key, value in asdict(timing).items()}
    met = None if target is None or needs else timing.ratio <= target
    return {**rounded, **extra, "target": target, "met": met, **({"needs": needs} if needs else {})}


def derived(name: str, ratio: float, target: float | None, *, needs: str = "", **extra: str) -> dict[str, Any]:
    """Returns the row of a ratio computed from others, which has no time and no quartiles of its own."""
    made = row(Timing(name, 0.0, ratio, 0.0, 0.0), target, needs=needs, **extra)
    return {**made, "median_s": None, "low": None, "high": None}


def rounded_to(value: float, digits: int = 4) -> float:
    """Returns a number with so many significant digits."""
    return float(f"{value:.{digits}g}")


def markdown(result: Mapping[str, Any], *, title: str, lead: str, unit: str) -> str:
    """Returns a benchmark as a Markdown page.

    Args:
      result: what the benchmark's `run` returned.
      title: heading of the page.
      lead: first line, on what was measured.
      unit: heading of the column of ratios.
    """
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    extra = _extra(result)
    lines = [
        f"# {title}",
        "",
        lead,
        f"{result['device']}, {result['cores']} cores; Python {result['python']}, {versions}.",
        f"Written by `{result['command']} --write DIRECTORY`.",
        "",
        _line(["what", *extra, unit, "quartiles", "ms", "target"]),
        _line(["---", *("---" for _ in extra), "---:", "---:", "---:", "---:"]),
    ]
    for each in result["rows"]:
        missed = f" (needs {each['needs']})" if "needs" in each else "" if each["met"] else " (missed)"
        target = "" if each["target"] is None else f"<= {each['target']}{missed}"
        lines.append(_line([*_cells(each, extra), target]))
    return "\n".join(lines) + "\n"


def table(result: Mapping[str, Any], *, title: str, unit: str) -> Table:
    """Returns a benchmark as a table for the terminal."""
    extra = _extra(result)
    made = Table(title=title, title_justify="left")
    for heading in ("what", *extra, unit, "quartiles", "ms", "target"):
        made.add_column(heading, justify="left" if heading in ("what", *extra) else "right")
    for each in result["rows"]:
        state = f"needs {each['needs']}" if "needs" in each else "met" if each["met"] else "missed"
        made.add_row(*_cells(each, extra), "" if each["target"] is None else f"{each['target']:g} {state}")
    return made


def write(result: Mapping[str, Any], page: str, directory: Path) -> list[Path]:
    """Writes a benchmark as <benchmark>-<device>.json and its page as .md beside it; returns the paths."""
    words = "".join(each if each.isalnum() else " " for each in result["device"].lower()).split()
    stem = f"{result['benchmark']}-{'-'.join(words) or result['platform']}"
    directory.mkdir(parents=True, exist_ok=True)
    paths = [directory / f"{stem}.json", directory / f"{stem}.md"]
    paths[0].write_text(json.dumps(result, indent=2) + "\n")
    paths[1].write_text(page)
    return paths


def _extra(result: Mapping[str, Any]) -> list[str]:
    """Returns the additional columns that the rows have."""
    return [name for name in EXTRA if any(name in each for each in result["rows"])]


def _cells(each: Mapping[str, Any], extra: list[str]) -> list[str]:
    """Returns the texts of a row, without its target."""
    quartiles = "" if each["low"] is None else f"{each['low']:.2f} - {each['high']:.2f}"
    ms = "" if each["median_s"] is None else f"{1e3 * each['median_s']:.3f}"
    return [each["name"], *(each.get(name, "") for name in extra), f"{each['ratio']:.2f}", quartiles, ms]


def _line(cells: list[str]) -> str:
    """Returns one line of a Markdown table."""
    return f"| {' | '.join(cells)} |"

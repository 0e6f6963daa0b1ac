"""The command `bench`: the project's kernels beside their peers, as ratios."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table


def register(app: typer.Typer) -> None:
    """Adds the commands of this module to `app`."""
    bench = typer.Typer(help="Time the project's kernels beside their peers.", no_args_is_help=True)
    bench.command("formats")(bench_formats_command)
    app.add_typer(bench, name="bench")


def bench_formats_command(
    count: Annotated[int, typer.Option(help="Number of float32 elements.", min=1024)] = 1_000_000,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds to take medians of.", min=3)] = 60,
    write: Annotated[Path | None, typer.Option(help="Directory to write a JSON and a Markdown file to.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Time rounding to number formats against one copy of the array, with the peers that are installed."""
    from precision_lab.bench import formats as benchmark

    result = benchmark.run(count=count, rounds=rounds)
    paths = [] if write is None else benchmark.write(result, write)
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    table = Table(title=f"{result['elements']:,} elements on {result['device']}", title_justify="left")
    for heading in ("what", "copies", "quartiles", "ms", "target"):
        table.add_column(heading, justify="left" if heading == "what" else "right")
    for row in result["rows"]:
        target = "" if row["target"] is None else f"{row['target']:g} {'met' if row['met'] else 'missed'}"
        quartiles = f"{row['low']:.2f} - {row['high']:.2f}"
        table.add_row(row["name"], f"{row['ratio']:.2f}", quartiles, f"{1e3 * row['median_s']:.3f}", target)
    Console().print(table)
    for path in paths:
        typer.echo(f"wrote {path}")

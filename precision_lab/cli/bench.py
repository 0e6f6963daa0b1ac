"""The command `bench`: the project's kernels and training steps beside their peers, as ratios."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from precision_lab.cli.output import Bar, console

Rounds = Annotated[int, typer.Option(help="Interleaved rounds to take medians of.", min=3)]
Small = Annotated[bool, typer.Option("--small", help="Tiny models, to try the command; ratios say nothing.")]
Write = Annotated[Path | None, typer.Option(help="Directory to write a JSON and a Markdown file to.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def register(app: typer.Typer) -> None:
    """Adds the commands of this module to `app`."""
    bench = typer.Typer(help="Time the project's kernels and training steps beside their peers.", no_args_is_help=True)
    bench.command("formats")(bench_formats_command)
    bench.command("mixed")(bench_mixed_command)
    bench.command("quant")(bench_quant_command)
    app.add_typer(bench, name="bench")


def bench_formats_command(
    count: Annotated[int, typer.Option(help="Number of float32 elements.", min=1024)] = 1_000_000,
    rounds: Rounds = 60,
    write: Write = None,
    as_json: AsJson = False,
) -> None:
    """Time rounding to number formats against one copy of the array, with the peers that are installed."""
    from precision_lab.bench import formats as benchmark

    _present(benchmark, benchmark.run(count=count, rounds=rounds), write, as_json=as_json)


def bench_mixed_command(
    model: Annotated[str, typer.Option(help="transformer, convnet or both.")] = "both",
    rounds: Rounds = 10,
    small: Small = False,
    write: Write = None,
    as_json: AsJson = False,
) -> None:
    """Time training steps under policies against float32, jmp and Flax's dtype=, and what a policy costs."""
    from precision_lab.bench import mixed as benchmark

    _run_on_models(benchmark, model, rounds, write, small=small, as_json=as_json)


def bench_quant_command(
    model: Annotated[str, typer.Option(help="mlp, transformer or both.")] = "both",
    rounds: Rounds = 10,
    small: Small = False,
    write: Write = None,
    as_json: AsJson = False,
) -> None:
    """Time quantized training steps and inference against float32, with Qwix and AQT where they are installed."""
    from precision_lab.bench import quant as benchmark

    _run_on_models(benchmark, model, rounds, write, small=small, as_json=as_json)


def _run_on_models(benchmark: Any, model: str, rounds: int, write: Path | None, *, small: bool, as_json: bool) -> None:
    """Runs a benchmark of models with a progress bar."""
    with Bar(benchmark.work(model, rounds)) as bar:
        result = benchmark.run(model=model, rounds=rounds, small=small, tell=bar.tell)
    _present(benchmark, result, write, as_json=as_json)


def _present(benchmark: Any, result: dict[str, Any], directory: Path | None, *, as_json: bool) -> None:
    """Writes the result of a benchmark module, and prints it."""
    from precision_lab.bench import report

    paths = [] if directory is None else report.write(result, benchmark.markdown(result), directory)
    if as_json:
        typer.echo(json.dumps(result, indent=2))
        return
    console().print(report.table(result, title=benchmark.title(result), unit=benchmark.UNIT))
    for path in paths:
        typer.echo(f"wrote {path}")

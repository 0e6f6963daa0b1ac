"""Commands about the folder of results as a whole: query, export, gc, resume."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from precision_lab.cli.experiments import Import, Json, Out, stopping_in_words
from precision_lab.cli.naming import RUN_HELP, find_run
from precision_lab.cli.output import console, say, show, show_json

if TYPE_CHECKING:
    from precision_lab.runner import ExperimentConfig


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    app.command("resume")(resume)
    app.command("query")(query)
    app.command("export")(export)
    app.command("gc")(collect)


def query(
    sql: Annotated[str, typer.Argument(help="One statement about the tables metrics, runs and arms.")],
    out: Out = Path("runs"),
    to: Annotated[Path | None, typer.Option("--to", metavar="PATH", help="Write a .csv or .parquet file.")] = None,
    json: Json = False,
) -> None:
    """Ask the records of all runs in SQL, by duckdb.

    metrics has one row per run, step and split, a column per metric (loss); runs one row per run, with its
    configuration (optim.lr) and last metrics (eval/loss); arms says which run serves which experiment, arm and seed.
    """
    from precision_lab.runner import query as asking
    from precision_lab.runner.metrics import encode_number
    from precision_lab.runner.terminal import text_table

    if to is not None:
        asking.save(out, sql, to)
        if json:
            show_json({"wrote": str(to)})
        else:
            typer.echo(f"wrote {to}")
        return
    names, rows = asking.query(out, sql)
    data = [{name: _plain(value) for name, value in zip(names, row, strict=True)} for row in rows]
    cells = [["" if cell is None else str(encode_number(cell) if isinstance(cell, float) else cell) for cell in row]
             for row in rows]  # fmt: skip
    show(text_table(names, cells), data, as_json=json)


def _plain(value: Any) -> Any:
    """Returns a value of duckdb's as JSON knows it."""
    from precision_lab.runner.metrics import encode_number

    return encode_number(value) if value is None or isinstance(value, bool | int | float | str) else str(value)


def export(
    run: Annotated[str, typer.Argument(help=RUN_HELP)],
    to: Annotated[str, typer.Option("--to", metavar="FORMAT", help="csv, parquet or npz.")] = "csv",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="PATH", help="The file; RUN.FORMAT here if not given.")
    ] = None,
    out: Out = Path("runs"),
) -> None:
    """Write the record of one run as a table, or as arrays by metric (npz)."""
    from precision_lab.runner import query as asking

    found = find_run(run, out)
    path = asking.export(found.path, to, output or Path(f"{found.id}.{to}"))
    typer.echo(f"wrote {path}")


def collect(
    out: Out = Path("runs"),
    keep_last: Annotated[
        int, typer.Option("--keep-last", min=0, help="Checkpoints to keep of each run; arms start from the last.")
    ] = 1,
    yes: Annotated[bool, typer.Option("--yes", help="Delete; without it only what would go is shown.")] = False,
    json: Json = False,
) -> None:
    """Delete old checkpoints of finished runs; shows what would go, and deletes with --yes.

    Records, results and the checkpoints of unfinished runs are never touched. With --keep-last 0 no arm can start from
    a run (start), and no report can look into it.
    """
    from precision_lab.runner.cleaning import delete, old_checkpoints
    from precision_lab.runner.planning import bytes_text
    from precision_lab.runner.summary import counted

    old = old_checkpoints(out, keep_last)
    freed = delete(out, old) if yes else 0
    total = sum(one.size_bytes for one in old)
    if json:
        runs = [{"run_id": one.run_id, "checkpoints": [str(path) for path in one.paths], "bytes": one.size_bytes}
                for one in old]  # fmt: skip
        show_json({"runs": runs, "bytes": total, "freed_bytes": freed})
        return
    for one in old:
        steps = ", ".join(path.name for path in one.paths)
        console().print(f"{one.run_id}: {bytes_text(one.size_bytes)}, steps {steps}", markup=False, highlight=False)
    if yes:
        typer.echo(f"freed {bytes_text(freed)}.")
    else:
        typer.echo(f"{counted(len(old), 'run')}, {bytes_text(total)} to free; nothing was deleted. --yes deletes.")


def resume(
    target: Annotated[str, typer.Argument(help="An experiment's folder of results, the start of its name, or a run.")],
    out: Out = Path("runs"),
    imports: Import = None,
    json: Json = False,
) -> None:
    """Go on with what was begun in a folder of results: the same as run, without the config it came from.

    Of a single run only that one goes on.
    """
    from precision_lab import runner
    from precision_lab.runner.terminal import print_results

    experiment = _begun(target, out, imports or [])
    with stopping_in_words():
        results = runner.run(experiment, out=out, say=say)
    if json:
        show_json(results.to_json())
    else:
        print_results(results, console())
    raise typer.Exit(results.exit_code)


def _begun(target: str, out: Path, imports: list[str]) -> "ExperimentConfig":
    """Returns the experiment that a folder of results, a part of its name, or one of its runs means."""
    from precision_lab import runner
    from precision_lab.runner.store import Store

    folders = {path.parent.name: path.parent for path in sorted(Path(out).glob("*/experiment.yaml"))}
    name = Path(target).name
    found = [name] if name in folders else [one for one in folders if one.startswith(name)]
    with Store(out) as store:
        arms, runs = store.arms(), {row["run_id"]: row["state"] for row in store.rows()}
    if len(found) > 1:  # What has nothing left to do is not meant.
        open_ones = {row["experiment"] for row in arms if runs.get(row["run_id"]) not in ("done", "diverged")}
        found = [one for one in found if one in open_ones] or found
    if len(found) == 1:
        return runner.load(folders[found[0]], imports=imports)
    if found:
        raise ValueError(f"{target!r} may be any of {', '.join(found[:4])}; write more of it.")
    run = find_run(target, out)
    uses = [row for row in arms if row["run_id"] == run.id]
    if not uses:
        raise ValueError(f"{run.id} belongs to no experiment in {out}; run its config again.")
    return runner.load(folders[uses[0]["experiment"]], arms=[uses[0]["arm"]], seeds=[uses[0]["seed"]], imports=imports)

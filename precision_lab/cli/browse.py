"""Commands about what has run: ls, show."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from precision_lab.cli.experiments import Import, Json, Out
from precision_lab.cli.output import console, show, show_json

if TYPE_CHECKING:
    from precision_lab.runner.rundir import RunDir

_METRICS = ("eval/loss", "eval/accuracy")


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    app.command("ls")(list_runs)
    app.command("show")(show_run)


def list_runs(out: Out = Path("runs"), json: Json = False) -> None:
    """List the runs, their states and what they reached."""
    from precision_lab.runner.rundir import all_runs
    from precision_lab.runner.terminal import text_table

    rows = [_entry(run) for run in all_runs(out)]
    if not rows and not json:
        typer.echo(f"no runs in {out}; precision-lab run TARGET makes some.")
        return
    cells = [
        (
            row["run_id"],
            row["state"],
            row["step"],
            *(_number(row["metrics"].get(name)) for name in _METRICS),
            row["age"],
        )
        for row in rows
    ]
    data = [{key: value for key, value in row.items() if key != "age"} for row in rows]
    show(text_table(["run", "state", ">step", *(f">{name}" for name in _METRICS), ">age"], cells), data, as_json=json)


def _entry(run: "RunDir") -> dict[str, Any]:
    """Returns one run as plain data."""
    from precision_lab.runner.metrics import encode_number

    status, summary = run.status(), run.summary()
    metrics = {key: encode_number(value) for key, value in summary.get("metrics", {}).items()}
    return {
        "run_id": run.id,
        "state": status["state"],
        "step": summary.get("step", status.get("step", "")),
        "attempt": status.get("attempt", 0),
        "error": status.get("error"),
        "metrics": metrics,
        "unix_s": status.get("unix_s"),
        "age": _age(status.get("unix_s")),
    }


def _number(value: Any) -> str:
    """Returns a metric as short text, empty where there is none."""
    return "" if value is None else value if isinstance(value, str) else f"{value:.6g}"


def _age(unix_s: float | None) -> str:
    """Returns how long ago something happened: 3 min, 2 h, 5 d."""
    if unix_s is None:
        return ""
    seconds = max(time.time() - unix_s, 0)
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{int(seconds // size)} {unit}"
    return f"{int(seconds)} s"


def show_run(
    run: Annotated[str, typer.Argument(help="A run's name, the start of it or of its hash, or its folder.")],
    out: Out = Path("runs"),
    imports: Import = None,
    json: Json = False,
) -> None:
    """Show one run: its state, configuration, last metrics and environment."""
    from precision_lab.runner.loading import import_module_of_user

    for module in imports or ():
        import_module_of_user(module)
    found = find_run(run, out)
    data = _details(found)
    if json:
        show_json(data)
        return
    out_console = console()
    for line in _lines(found, data):
        out_console.print(line, markup=False, highlight=False, soft_wrap=True)


def find_run(name: str, out: Path) -> "RunDir":
    """Returns the one run that a name, a prefix of it or of its hash, or a folder means.

    Raises:
      ValueError: none, or more than one.
    """
    from precision_lab.runner.rundir import RunDir, all_runs
    from precision_lab.runner.tree import suggestion

    if (Path(name) / "config.yaml").is_file() and (Path(name).parent.name == "trials"):
        return RunDir(Path(name))
    runs = {run.id: run for run in all_runs(out)}
    exact = [run for key, run in runs.items() if key == name]
    found = exact or [run for key, run in runs.items() if key.startswith(name) or key.split("-")[-1].startswith(name)]
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{name!r} may be any of {', '.join(run.id for run in found[:4])}; write more of it.")
    hint = suggestion(name, runs, what="runs") if len(runs) <= 8 else "; precision-lab ls lists them."
    raise ValueError(f"no run {name!r} in {out}{hint}")


def _details(run: "RunDir") -> dict[str, Any]:
    """Returns everything about a run as plain data."""
    from precision_lab.runner.identity import plain
    from precision_lab.runner.metrics import encode_number

    last = {name: encode_number(series.values[-1]) for name, series in sorted(run.series().items())}
    config = plain(run.config())
    return {"run_id": run.id, "path": str(run.path), "status": run.status(), "config": config, "metrics": last,
            "env": run.env()}  # fmt: skip


def _lines(run: "RunDir", data: dict[str, Any]) -> list[str]:
    """Returns a run as text."""
    from precision_lab.runner.summary import flat
    from precision_lab.runner.yaml12 import dump

    status = data["status"]
    lines = [run.id, f"state: {status['state']}, attempt {status.get('attempt', 0)}, in {run.path}"]
    if status.get("error"):
        lines += [f"error: {status['error']}", f"log: {run.log(status['attempt'])}"]
    lines += ["", "configuration", *_indented(dump(data["config"]).splitlines())]
    lines += ["", "last metrics", *_indented([f"{name} {_number(value)}" for name, value in data["metrics"].items()])]
    known = {key: value for key, value in flat(data["env"]).items() if value not in (None, "")}
    return [*lines, "", "environment", *_indented([f"{key} {value}" for key, value in known.items()])]


def _indented(lines: list[str]) -> list[str]:
    """Returns lines moved to the right."""
    return [f"  {line}" for line in lines]

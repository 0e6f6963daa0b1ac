"""Commands about what has run: ls, show, status, diff."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from precision_lab.cli.experiments import Import, Json, Out
from precision_lab.cli.naming import RUN_HELP, experiment_called, find_run, parse_name
from precision_lab.cli.output import console, show, show_json

if TYPE_CHECKING:
    from precision_lab.runner import comparison
    from precision_lab.runner.rundir import RunDir

_METRICS = ("eval/loss", "eval/accuracy")


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    app.command("ls")(list_runs)
    app.command("show")(show_run)
    app.command("status")(status)
    app.command("diff")(diff)


def list_runs(
    out: Out = Path("runs"),
    where: Annotated[str, typer.Option(metavar="SQL", help='Only these: "optim.lr < 1e-2 and eval/loss < 0.5".')] = "",
    json: Json = False,
) -> None:
    """List the runs, their states and what they reached; with --where also whatever it speaks of.

    Columns are state, step, policy, seed and the like, dotted keys of configurations (train.steps), and the last value
    of each metric (eval/loss); --json shows all of them.
    """
    from precision_lab.runner.store import Store, mentioned
    from precision_lab.runner.terminal import text_table

    with Store(out) as store:
        rows = store.rows(where)
        named = mentioned(where, store.columns) if where else []
    if not rows and not json:
        typer.echo(f"no such runs in {out}." if where else f"no runs in {out}; precision-lab run TARGET makes some.")
        return
    extra = [name for name in named if name not in ("run_id", "state", "step", "unix_s", *_METRICS)]
    columns = ["state", "step", *extra, *_METRICS]
    cells = [(row["run_id"], *(_number(row.get(name)) for name in columns), _age(row.get("unix_s"))) for row in rows]
    heads = ["run", "state", ">step", *(f">{name}" for name in (*extra, *_METRICS)), ">age"]
    show(text_table(heads, cells), [_jsonable(row) for row in rows], as_json=json)


def _jsonable(row: dict[str, Any]) -> dict[str, Any]:
    """Returns a row of the store with its metrics apart, and with numbers that JSON knows."""
    from precision_lab.runner.metrics import encode_number

    metrics = {name: encode_number(value) for name, value in row.items() if "/" in name}
    return {**{name: encode_number(value) for name, value in row.items() if "/" not in name}, "metrics": metrics}


def status(out: Out = Path("runs"), json: Json = False) -> None:
    """Tell how far each experiment is: its runs by state, and when something last happened."""
    from precision_lab.runner.store import Store
    from precision_lab.runner.terminal import text_table

    with Store(out) as store:
        runs = {row["run_id"]: row for row in store.rows()}
        arms = store.arms()
    data = []
    for experiment in dict.fromkeys(row["experiment"] for row in arms):
        ids = dict.fromkeys(row["run_id"] for row in arms if row["experiment"] == experiment)
        states = [runs.get(one, {}).get("state", "queued") for one in ids]
        counts = {state: states.count(state) for state in sorted(set(states))}
        last = max((runs[one].get("unix_s") or 0 for one in ids if one in runs), default=0) or None
        data.append({"experiment": experiment, "runs": len(ids), "states": counts, "unix_s": last})
    if not data and not json:
        typer.echo(f"no experiments in {out}; precision-lab run TARGET makes some.")
        return
    cells = [(row["experiment"], row["runs"], _counts(row["states"]), _age(row["unix_s"])) for row in data]
    show(text_table(["experiment", ">runs", "states", ">age"], cells), data, as_json=json)


def _counts(states: dict[str, int]) -> str:
    """Returns `9 done, 1 failed`."""
    return ", ".join(f"{count} {state}" for state, count in states.items())


Side = Annotated[str, typer.Argument(help="A run, an experiment, or one of its arms: experiments/x::float16.")]


def diff(a: Side, b: Side, out: Out = Path("runs"), imports: Import = None, json: Json = False) -> None:
    """Explain in words how two runs, arms or experiments differ: configuration, environment, last metrics.

    Two experiments are compared arm by arm; metrics over seeds are paired by seed.
    """
    from precision_lab.runner.comparison import difference, sentences
    from precision_lab.runner.loading import import_module_of_user

    for module in imports or ():
        import_module_of_user(module)
    left, right = _sides(a, out), _sides(b, out)
    pairs = [(x, y) for x in left for y in right if len(left) == len(right) == 1 or _arm(x.name) == _arm(y.name)]
    if not pairs:
        raise ValueError(f"{a} and {b} have no arm in common; name one of each: {a}::ARM.")
    found = [difference(x, y) for x, y in pairs]
    if json:
        show_json(found)
        return
    for one in found:
        console().print("\n".join([*sentences(one), ""]), markup=False, highlight=False, soft_wrap=True)


def _arm(name: str) -> str:
    """Returns the arm in the name of a side."""
    return name.rpartition("::")[2]


def _sides(text: str, out: Path) -> list["comparison.Side"]:
    """Returns what a text means: a run, an arm, or all arms of an experiment."""
    from precision_lab import runner
    from precision_lab.runner import comparison

    name = parse_name(text)
    found = experiment_called(name.target, out)
    if name.seed is not None or (found is None and not name.arm):
        try:
            return [comparison.side_of_run(find_run(text, out))]
        except ValueError as error:
            more = "" if name.arm else " Nor is it an experiment; arms are written EXPERIMENT::ARM."
            raise ValueError(f"{error}{more}") from None
    source, out = found or (name.target, out)
    results = runner.read(runner.load(source, arms=[name.arm] if name.arm else ()), out)
    arms = results.experiment.arms
    return [comparison.side_of_arm(f"{name.target}::{arm}", results.of_arm(arm)) for arm in arms]


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
    run: Annotated[str, typer.Argument(help=RUN_HELP)],
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

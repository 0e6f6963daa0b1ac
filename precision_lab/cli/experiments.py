"""Commands about experiments: run, check, report."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from precision_lab.cli.output import console, say, show, show_json

if TYPE_CHECKING:
    from precision_lab.runner import ExperimentConfig

Target = Annotated[str, typer.Argument(help="A config file, a folder with a config.yaml, or a name in experiments/.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change one key: --set optim.lr=1e-3.")
]
Presets = Annotated[list[str] | None, typer.Option("--preset", metavar="NAME", help="Apply a preset of the file.")]
Axes = Annotated[
    list[str] | None,
    typer.Option("--axis", metavar="KEY=A,B", help="Multiply every arm: --axis optim.lr=1e-3,3e-3; may be repeated."),
]
Smoke = Annotated[bool, typer.Option("--smoke", help="Short for --preset smoke: seconds instead of minutes.")]
Arms = Annotated[
    list[str] | None,
    typer.Option("--arm", metavar="NAME", help="Only this arm; may be repeated, which keeps the baseline as well."),
]
Seed = Annotated[list[int] | None, typer.Option("--seed", metavar="N", help="Use this seed; may be repeated.")]
Seeds = Annotated[str, typer.Option("--seeds", metavar="LIST", help="Use these seeds: 0,1,2 or 0..4.")]
Out = Annotated[Path, typer.Option("--out", metavar="DIR", help="Folder of all results.")]
Import = Annotated[
    list[str] | None, typer.Option("--import", metavar="MODULE", help="Import a module that registers models or data.")
]
Executor = Annotated[
    str,
    typer.Option("--executor", metavar="NAME", help="Who runs: serial, process, vmap, ray, slurm:partition=gpu."),
]
Jobs = Annotated[int | None, typer.Option("--jobs", metavar="N", help="How many runs at once.")]
Tracker = Annotated[
    str, typer.Option("--tracker", metavar="NAMES", help="Show metrics in tensorboard, wandb, mlflow as well.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def register(app: typer.Typer) -> None:
    """Adds the commands."""
    app.command()(run)
    app.command()(check)
    app.command()(report)


def run(
    target: Target,
    settings: Settings = None,
    presets: Presets = None,
    axes: Axes = None,
    smoke: Smoke = False,
    arms: Arms = None,
    seed: Seed = None,
    seeds: Seeds = "",
    out: Out = Path("runs"),
    imports: Import = None,
    executor: Executor = "serial",
    jobs: Jobs = None,
    tracker: Tracker = "",
    distributed: Annotated[
        bool, typer.Option("--distributed", help="Several processes, each with this command, train each run together.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count, as check does; runs nothing.")] = False,
    json: Json = False,
) -> None:
    """Run an experiment: every arm with every seed, what is done already left out; ends with table and report.

    The same command continues after a kill or Ctrl-C.
    """
    from precision_lab import runner
    from precision_lab.runner import executors
    from precision_lab.runner.terminal import print_results
    from precision_lab.runner.trackers import refuse_unknown

    experiment = _load(target, settings, presets, smoke, arms, seed, seeds, imports, axes)
    trackers = [*filter(None, tracker.split(","))]
    if dry_run:
        if distributed:
            raise ValueError("--dry-run counts in one process; leave --distributed out.")
        executors.get(executor, jobs)
        refuse_unknown(trackers)
        _show_plan(experiment, out, as_json=json)
        return
    with stopping_in_words():
        results = runner.run(
            experiment,
            out=out,
            executor=executor,
            jobs=jobs,
            tracker=trackers,
            distributed=distributed,
            say=say,
        )
    if json:
        show_json(results.to_json())
    else:
        print_results(results, console())
        console().print(f"report: {results.folder / 'report.html'}", markup=False, highlight=False, soft_wrap=True)
    raise typer.Exit(results.exit_code)


@contextmanager
def stopping_in_words() -> Iterator[None]:
    """Says what became of the runs where a signal ended them, and exits with the code for it."""
    from precision_lab.runner import Preempted

    try:
        yield
    except Preempted:
        say("preempted. What was going on is saved; the same command continues.")
        raise typer.Exit(75) from None
    except KeyboardInterrupt:
        say("interrupted. What is finished is kept; the same command continues.")
        raise typer.Exit(130) from None


def check(
    target: Target,
    settings: Settings = None,
    presets: Presets = None,
    axes: Axes = None,
    smoke: Smoke = False,
    arms: Arms = None,
    seed: Seed = None,
    seeds: Seeds = "",
    out: Out = Path("runs"),
    imports: Import = None,
    json: Json = False,
) -> None:
    """Validate an experiment and count its runs, without compiling or writing anything."""
    _show_plan(_load(target, settings, presets, smoke, arms, seed, seeds, imports, axes), out, as_json=json)


def _show_plan(experiment: "ExperimentConfig", out: Path, *, as_json: bool) -> None:
    """Prints what running an experiment would mean, after making sure that every arm can start."""
    from precision_lab import runner
    from precision_lab.runner.groups import describe, groups
    from precision_lab.runner.planning import outlook
    from precision_lab.runner.summary import change_text, varied
    from precision_lab.runner.terminal import text_table

    runner.check(experiment, out)
    plan = outlook(experiment, out)
    changes = varied(plan.results)
    rows = [
        {
            "arm": arm,
            "changes": {key: value for key, value in changes[arm].items() if key != "seed"},
            "runs": {str(one.seed): {"run_id": one.run_id, "state": one.state} for one in plan.results.of_arm(arm)},
        }
        for arm in experiment.arms
    ]
    found = groups(experiment)
    data = {"experiment": experiment.name, **plan.to_dict(), "axes": experiment.axes, "arms": rows}
    data["programs"] = [{"arms": one.arms, "runs": one.runs, "reason": one.reason} for one in found]
    cells = [(row["arm"], change_text(row["changes"]) or "(baseline)", " ".join(_states(row["runs"]))) for row in rows]
    show(text_table(["arm", "differs from the baseline in", "seeds"], cells), data, as_json=as_json)
    if not as_json:
        typer.echo("\n".join([*plan.sentences(), describe(found)]))


def _states(runs: dict[str, Any]) -> list[str]:
    """Returns `0:done 1:queued`."""
    return [f"{seed}:{run['state']}" for seed, run in runs.items()]


def report(
    target: Target,
    settings: Settings = None,
    presets: Presets = None,
    axes: Axes = None,
    smoke: Smoke = False,
    arms: Arms = None,
    seed: Seed = None,
    seeds: Seeds = "",
    out: Out = Path("runs"),
    imports: Import = None,
    to: Annotated[
        Path | None, typer.Option("--to", metavar="PATH", help="A .html, .md, .csv or .tex file, or a folder.")
    ] = None,
    inside: Annotated[
        bool, typer.Option("--inside/--no-inside", help="Look into final checkpoints, for heat map and histograms.")
    ] = True,
    json: Json = False,
) -> None:
    """Judge the claims and write the report again from what has run; runs nothing.

    TARGET may also be a folder of results, such as runs/mixed_precision-0123456789ab.
    """
    from precision_lab import runner
    from precision_lab.runner.terminal import print_results

    experiment = _load(target, settings, presets, smoke, arms, seed, seeds, imports, axes)
    if (Path(target) / "experiment.yaml").is_file():
        out = Path(target).resolve().parent if out == Path("runs") else out
    results = runner.read(experiment, out)
    if not any(one.path.exists() for one in results.trials):
        raise ValueError(f"nothing of {experiment.name} has run in {out}; precision-lab run {target} does that.")
    drawn = to is None or to.suffix in ("", ".html")  # Tables alone show nothing of what is inside.
    path = results.report(to, look_inside=inside and drawn)
    if json:
        show_json(results.to_json())
    else:
        print_results(results, console())
        console().print(f"report: {path}", markup=False, highlight=False, soft_wrap=True)


def _load(
    target: str,
    settings: list[str] | None,
    presets: list[str] | None,
    smoke: bool,
    arms: list[str] | None,
    seed: list[int] | None,
    seeds: str,
    imports: list[str] | None,
    axes: list[str] | None = None,
) -> "ExperimentConfig":
    """Returns the experiment that the options describe."""
    from precision_lab import runner
    from precision_lab.runner.axes import parse_seeds

    return runner.load(
        target,
        settings=settings or (),
        presets=[*(presets or ()), *(["smoke"] if smoke else [])],
        arms=arms or (),
        axes=axes or (),
        seeds=[*(seed or ()), *parse_seeds(seeds)],
        imports=imports or (),
    )

"""What `sites` and `compare` look at: an arm of an experiment, a run that has run, or a model of the project."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from precision_lab.cli.model_memory import parse_model
from precision_lab.cli.naming import experiment_called, find_run, parse_name, runs_called, runs_of_arm
from precision_lab.models.config import MODELS

if TYPE_CHECKING:
    from precision_lab.runner.rundir import RunDir
    from precision_lab.training import RunConfig

Target = Annotated[
    str,
    typer.Argument(help="An experiment or an arm of it (experiments/x::float16), a run, or transformer:width=64."),
]
Arm = Annotated[str, typer.Option("--arm", metavar="NAME", help="Which arm of an experiment; the baseline by default.")]
Seed = Annotated[int | None, typer.Option("--seed", metavar="N", help="Which seed of an experiment or model.", min=0)]


@dataclass(frozen=True)
class Subject:
    """A model, with what it is for and where its parameters are.

    Attributes:
      name: what to call it.
      config: the run that it belongs to; of a bare model one that trains nothing.
      run: the folder of a run that has run; None for what only a config describes.
    """

    name: str
    config: "RunConfig"
    run: "RunDir | None" = None


def find_subject(
    target: str,
    out: Path,
    *,
    arm: str = "",
    seed: int | None = None,
    settings: Sequence[str] = (),
    imports: Sequence[str] = (),
) -> Subject:
    """Returns what a target means.

    A folder or a file comes first, then the name of an experiment, a kind of model, and a run in `out`. An arm and a
    seed are options, or parts of the target (see `naming`).

    Raises:
      ValueError: nothing or several runs are meant, it has no model, or the options are not for it.
    """
    from precision_lab.runner.loading import import_module_of_user

    for module in imports:
        import_module_of_user(module)
    given = [name for name, value in (("--arm", arm), ("--seed", seed is not None), ("--set", settings)) if value]
    name = parse_name(target)
    found = experiment_called(name.target, out)
    if found or name.arm:
        arm, seed = _one_of("--arm", arm, name.arm) or "", _one_of("--seed", seed, name.seed)
        return _of_experiment(found.source if found else name.target, arm, seed, settings)
    if not Path(target).exists() and target.partition(":")[0] in MODELS.kinds():
        _refuse(target, "a model", [name for name in given if name != "--seed"])
        return _of_model(target, seed or 0)
    if not runs_called(target, out):
        raise _unknown(target, out)
    _refuse(target, "a run", given)
    run = find_run(target, out)
    return Subject(run.id, _with_model(run.id, run.config()), run)


def _one_of(option: str, given: Any, named: Any) -> Any:
    """Returns what an option or the target itself says.

    Raises:
      ValueError: they differ.
    """
    if given not in (None, "", named) and named not in (None, ""):
        raise ValueError(f"{option} {given}, but the target says {named}; leave one of them out.")
    return named if given in (None, "") else given


def _unknown(target: str, out: Path) -> ValueError:
    """Returns what to say of a target that is nothing; names the nearest experiment."""
    from precision_lab.runner.loading import find_config

    try:
        find_config(target)
    except ValueError as error:
        what = str(error).rstrip(".?")
        asks = "?" if str(error).endswith("?") else "."
        return ValueError(f"{what}{asks} Nor is it a run in {out}, or a model: {', '.join(MODELS.kinds())}.")
    raise AssertionError("a target that is an experiment was not taken for one")


def _refuse(target: str, kind: str, given: Sequence[str]) -> None:
    """Raises for options that are for experiments."""
    if given:
        verb = "are" if len(given) > 1 else "is"
        raise ValueError(f"{' and '.join(given)} {verb} for experiments; {target!r} is {kind}.")


def _of_experiment(target: str, arm: str, seed: int | None, settings: Sequence[str]) -> Subject:
    """Returns one arm of an experiment, the baseline unless named."""
    from precision_lab import runner

    # All arms are loaded: a metric or claim of the file may be about others.
    experiment = runner.load(target, settings=settings, seeds=() if seed is None else (seed,))
    chosen = arm or experiment.baseline_arm
    config = next(iter(runs_of_arm(experiment, chosen).values()))
    name = f"{experiment.name}, arm {chosen}"
    return Subject(name, _with_model(name, config))


def _with_model(name: str, config: object) -> "RunConfig":
    """Returns the config of a run that has a model.

    Raises:
      ValueError: it is a probe, which has none.
    """
    from precision_lab.training import RunConfig

    if not isinstance(config, RunConfig):
        raise ValueError(f"{name} is a probe, which has no model; choose a run that trains one (--arm).")
    return config


def _of_model(text: str, seed: int) -> Subject:
    """Returns a model of the project with data that it can learn."""
    from precision_lab.training import RunConfig

    found = parse_model(text)
    optim, train = {"kind": "sgd", "lr": 1.0}, {"steps": 0}
    config = RunConfig.model_validate(
        {"model": found.config, "data": {"kind": found.data}, "optim": optim, "train": train, "seed": seed}
    )
    return Subject(f"{text} for {found.data}", config)

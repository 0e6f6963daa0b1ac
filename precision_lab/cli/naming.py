"""How commands name what they look at: a run, an experiment, one of its arms, or the run of an arm with one seed.

A run is its name, the start of it or of its hash, or its folder. An experiment is a config file, a folder with one, its
name in experiments/, or a folder of results, which in the folder of all results goes by its name. An arm of it is
EXPERIMENT::ARM, and the run of that with one seed EXPERIMENT::ARM::SEED.
"""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping

    from precision_lab.runner import ExperimentConfig
    from precision_lab.runner.rundir import RunDir
    from precision_lab.training import AnyRun

RUN_HELP = "A run: its name, the start of it or of its hash, its folder, or EXPERIMENT::ARM::SEED."


class Name(NamedTuple):
    """What was named; `arm` and `seed` only where the text says them."""

    target: str
    arm: str = ""
    seed: int | None = None


class Experiment(NamedTuple):
    """What `runner.load` takes to load an experiment, and the folder of all results that its own are in."""

    source: str
    out: Path


def parse_name(text: str) -> Name:
    """Returns the parts of a name.

    Raises:
      ValueError: it is not of the form TARGET, TARGET::ARM or TARGET::ARM::SEED.
    """
    target, *rest = [text] if Path(text).exists() else text.split("::")
    arm, seed = [*rest, "", ""][:2]
    if len(rest) > 2 or not all((target, *rest)) or not (len(rest) < 2 or seed.isdecimal()):
        raise ValueError(f"{text!r} is none of RUN, EXPERIMENT, EXPERIMENT::ARM and EXPERIMENT::ARM::SEED.")
    return Name(target, arm, int(seed) if seed else None)


def experiment_called(target: str, out: Path) -> Experiment | None:
    """Returns the experiment that a target means, None if it is none."""
    from precision_lab.runner.loading import EXPERIMENTS

    if _is_run(Path(target)):
        return None
    for folder in (Path(target), Path(out) / target):
        if (folder / "experiment.yaml").is_file():
            return Experiment(str(folder), folder.resolve().parent)
    exists = Path(target).exists() or (EXPERIMENTS / target).exists()
    return Experiment(target, out) if exists else None


def find_run(text: str, out: Path) -> "RunDir":
    """Returns the one run that a name means, see above.

    Raises:
      ValueError: none, or more than one.
    """
    from precision_lab.runner.rundir import all_runs
    from precision_lab.runner.tree import suggestion

    name = parse_name(text)
    if name.arm:
        return _run_of_arm(text, name, out)
    found = runs_called(text, out)
    if len(found) == 1:
        return found[0]
    if found:
        raise ValueError(f"{text!r} may be any of {', '.join(run.id for run in found[:4])}; write more of it.")
    if experiment_called(text, out):
        raise ValueError(f"{text!r} is an experiment; name one of its runs: {text}::ARM::SEED.")
    runs = [run.id for run in all_runs(out)]
    hint = suggestion(text, runs, what="runs") if len(runs) <= 8 else "; precision-lab ls lists them."
    raise ValueError(f"no run {text!r} in {out}{hint}")


def runs_called(name: str, out: Path) -> list["RunDir"]:
    """Returns the runs that a name, a prefix of it or of its hash, or a folder may mean."""
    from precision_lab.runner.rundir import RunDir, all_runs

    if _is_run(Path(name)):
        return [RunDir(Path(name))]
    runs = {run.id: run for run in all_runs(out)}
    exact = [run for key, run in runs.items() if key == name]
    return exact or [run for key, run in runs.items() if key.startswith(name) or key.split("-")[-1].startswith(name)]


def _run_of_arm(text: str, name: Name, out: Path) -> "RunDir":
    """Returns the run of an arm with a seed, or with its only one."""
    from precision_lab import runner
    from precision_lab.runner.rundir import run_dir

    source, out = experiment_called(name.target, out) or (name.target, out)
    experiment = runner.load(source, seeds=() if name.seed is None else (name.seed,))
    by_seed = runs_of_arm(experiment, name.arm)
    if len(by_seed) > 1:
        seeds = ", ".join(map(str, by_seed))
        raise ValueError(f"{text} has runs with seeds {seeds}; name one of them: {text}::{next(iter(by_seed))}.")
    run = run_dir(out, next(iter(by_seed.values())))
    if not run.exists():
        seed = "" if name.seed is None else f" --seed {name.seed}"
        raise ValueError(f"{text} has not run in {out}; precision-lab run {name.target}{seed} does that.")
    return run


def runs_of_arm(experiment: "ExperimentConfig", arm: str) -> "Mapping[int, AnyRun]":
    """Returns the configuration of each run of an arm, by seed.

    Raises:
      ValueError: there is no such arm; names the nearest.
    """
    from precision_lab.runner.tree import suggestion

    if arm not in experiment.arms:
        raise ValueError(f"no arm {arm!r} in {experiment.name}{suggestion(arm, experiment.arms, what='arms')}")
    return experiment.runs[arm]


def _is_run(path: Path) -> bool:
    """Returns whether a path is the folder of a run."""
    return (path / "config.yaml").is_file() and path.parent.name == "trials"

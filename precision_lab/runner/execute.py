"""Execution: every arm with every seed, each run exactly once.

Before anything is written every arm is checked. A finished run is never run again, a run that was killed goes on from
its last checkpoint, a run that crashes is recorded and the others go on, and two processes on one experiment share
the work instead of repeating it.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from precision_lab.runner import executors
from precision_lab.runner.atomic import write_json, write_text
from precision_lab.runner.config import ExperimentConfig
from precision_lab.runner.disk import DiskFullError, disk_full, is_disk_full
from precision_lab.runner.distributed import follow, initialize
from precision_lab.runner.environment import differences, fingerprint, registered_code
from precision_lab.runner.groups import structure_of
from precision_lab.runner.identity import run_id
from precision_lab.runner.loading import Source, load
from precision_lab.runner.order import Order
from precision_lab.runner.resolve import BASE_KEYS
from precision_lab.runner.results import Results, read
from precision_lab.runner.rundir import FINISHED, TRIALS, run_dir
from precision_lab.runner.starts import ancestry
from precision_lab.runner.stopping import Preempted, stop_on_signals
from precision_lab.runner.store import ARMS
from precision_lab.runner.together import announce, leads
from precision_lab.runner.trackers import refuse_unknown
from precision_lab.runner.trial import Planned
from precision_lab.runner.yaml12 import dump
from precision_lab.training import RunConfig


def plan(experiment: ExperimentConfig, out: Path) -> list[Planned]:
    """Returns the different runs of an experiment, seed by seed so that every arm has results early.

    A run that begins from another comes after it.
    """
    planned: dict[str, Planned] = {}
    for seed in experiment.seeds:
        arms = reversed(list(experiment.runs.items()))  # of arms that are equal the first gives the name
        labels = {run_id(seeds[seed]): f"{arm}, seed {seed}" for arm, seeds in arms}
        for seeds in experiment.runs.values():
            for config in ancestry(seeds[seed]):
                run = run_dir(out, config)
                planned.setdefault(run.id, Planned(labels[run.id], config, run))
    return list(planned.values())


def check(experiment: ExperimentConfig, out: str | os.PathLike[str] = "runs") -> list[Planned]:
    """Returns the runs of an experiment, after making sure that each of them can start; writes nothing.

    Raises:
      ValueError: a policy that does not fit its model, data that is not there, or a run directory that belongs to
        another configuration.
    """
    from precision_lab import training
    from precision_lab.data import load as load_data

    refuse_unknown(experiment.tracker)
    planned = plan(experiment, Path(out))
    for one in planned:
        one.run.refuse_other(one.config)
    pending = {one.run.id: one.config for one in planned if one.run.status()["state"] not in FINISHED}
    for data in dict.fromkeys(config.data for config in pending.values() if isinstance(config, RunConfig)):
        load_data(data)
    for arm, seeds in experiment.runs.items():
        config = next((config for config in seeds.values() if run_id(config) in pending), None)
        if config is None:  # What has run to its end needs no other proof that it can start.
            continue
        try:
            training.check(config)
        except ValueError as error:
            named = re.match(r"(\w+)[.:]", str(error))
            key = named[1] if named and named[1] in BASE_KEYS else "policy"
            raise ValueError(experiment.locate(arm, key, f"arm {arm!r}: {error}")) from None
    return planned


def run(
    source: Source,
    *,
    out: str | os.PathLike[str] = "runs",
    presets: Sequence[str] = (),
    settings: Sequence[str] | Mapping[str, Any] = (),
    axes: Sequence[str] | Mapping[str, Sequence[Any]] = (),
    arms: Sequence[str] = (),
    seeds: Sequence[int] = (),
    imports: Sequence[str] = (),
    executor: str = "serial",
    jobs: int | None = None,
    tracker: Sequence[str] = (),
    distributed: bool = False,
    say: Callable[[str], None] = print,
) -> Results:
    """Runs what of an experiment has not been run yet, writes its report, and returns the results.

    A signal to stop (SIGTERM, SIGUSR1, Ctrl-C) lets the run in progress save first; the same call then continues.

    Args:
      source: an experiment, its file or folder, or a mapping; see `load`, also for `presets` to `imports`.
      out: folder of all results.
      executor: who runs them, perhaps with options, see `precision_lab.runner.executors`.
      jobs: how many at once, for executors that can.
      tracker: names of what shows the metrics besides the record, instead of the experiment's `tracker`.
      distributed: whether several processes make this call and train each run together, see `runner.distributed`.
      say: receives one-line messages.

    Raises:
      ValueError: the experiment cannot run as it stands; nothing has been written.
      KeyboardInterrupt: Ctrl-C.
      Preempted: a SystemExit with code 75; the process was asked to make room.
    """
    chosen, options = executors.get(executor, jobs)
    experiment = load(source, presets=presets, settings=settings, axes=axes, arms=arms, seeds=seeds, imports=imports)
    trackers = tracker or experiment.tracker
    refuse_unknown(trackers)
    initialize(distributed, executor)
    planned = check(experiment, out)
    if not leads():
        follow(planned)
        results = read(experiment, out)
        if any(one.state == "preempted" for one in results.trials):
            raise Preempted
        return results
    env = {**fingerprint(), **(executors.FINGERPRINTS.get(executor, {}) if jobs != 1 else {})}
    pending = [one for one in planned if one.run.status()["state"] not in FINISHED]
    for line in _reused(planned, pending, env):
        say(line)
    try:
        with _room_in(Path(out), say):
            _save_experiment(experiment, Path(out))
            if pending:
                given = {"env": env, "jobs": jobs, "options": options, "say": say, "trackers": tuple(trackers)}
                _execute(pending, chosen, given)
    finally:
        announce("")
    results = read(experiment, out)
    with _room_in(Path(out), lambda why: say(f"the report was not written: {why}")):
        results.report()
    return results


def _execute(pending: Sequence[Planned], executor: executors.Executor, given: Mapping[str, Any]) -> None:
    """Hands runs to an executor, with progress shown and signals heard."""
    from precision_lab.training.progress import RunProgress

    with RunProgress(len(pending)) as progress, stop_on_signals() as stop:
        for wave in Order(pending).waves() if executor.IN_WAVES else [pending]:
            executor.execute(wave, executors.Context(progress=progress, stop=stop, **given))


@contextmanager
def _room_in(out: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Says what to free if the disk is full; whatever was to be done then is left undone."""
    try:
        yield
    except OSError as error:
        if not is_disk_full(error) and not isinstance(error, DiskFullError):
            raise
        say(str(error if isinstance(error, DiskFullError) else disk_full(out / TRIALS)))


def _reused(planned: Sequence[Planned], pending: Sequence[Planned], env: Mapping[str, Any]) -> Iterator[str]:
    """Yields what to say about runs that are finished already."""
    finished = [one for one in planned if one not in pending]
    if finished:
        yield f"{len(finished)} of {len(planned)} runs are finished already and are reused."
    alike = Counter(structure_of(one.config) for one in planned)
    alone = {key: value for key, value in env.items() if key != "executor"}  # Who shares no program runs in turn.
    changed = [
        words for one in planned if (words := _changed(one, env if alike[structure_of(one.config)] > 1 else alone))
    ]
    if changed:
        words = "; ".join(dict.fromkeys(word for words in changed for word in words))
        yield f"warning: {len(changed)} runs come from another environment ({words}); --out NEW runs them afresh."


def _changed(one: Planned, env: Mapping[str, Any]) -> list[str]:
    """Returns what differs between the environments of a run's attempts and this one, in words."""
    stored = one.run.envs()
    current = {**env, **registered_code(one.config)} if stored else {}
    same = [{key: value for key, value in env.items() if key != "lanes"} for env in stored]  # None yet, here.
    return [word for earlier in same for word in differences(earlier, current)]


def _save_experiment(experiment: ExperimentConfig, out: Path) -> None:
    """Keeps the experiment as resolved, so that its folder can be run and reported again."""
    folder = out / experiment.id
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "experiment.yaml", dump(experiment.to_dict()))
    trials = [
        {"arm": arm, "seed": seed, "run_id": run_id(config)}
        for arm, seeds in experiment.runs.items()
        for seed, config in seeds.items()
    ]
    write_json(folder / ARMS, {"trials": trials})

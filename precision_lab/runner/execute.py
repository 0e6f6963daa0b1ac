"""Execution: every arm with every seed, one after another, each run exactly once.

Before anything is written every arm is checked. A finished run is never run again, a run that was killed goes on from
its last checkpoint, a run that crashes is recorded and the others go on, and two processes on one experiment share
the work instead of repeating it.
"""

import logging
import os
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from precision_lab.runner.atomic import write_json, write_text
from precision_lab.runner.config import ExperimentConfig
from precision_lab.runner.environment import differences, fingerprint, registered_code
from precision_lab.runner.identity import run_id
from precision_lab.runner.loading import Source, load
from precision_lab.runner.parents import await_parent, start_from
from precision_lab.runner.results import Results, read
from precision_lab.runner.rundir import FINISHED, BusyError, RunDir, run_dir
from precision_lab.runner.starts import ancestry
from precision_lab.runner.store import ARMS
from precision_lab.runner.yaml12 import dump
from precision_lab.training import AnyRun, RunConfig


class Progress(Protocol):
    """What `training.progress.RunProgress` offers while runs go on."""

    def start_run(self, label: str, total_steps: int) -> None: ...

    def step(self, step: int, loss: float) -> None: ...

    def end_run(self, status: str) -> None: ...


@dataclass(frozen=True)
class Planned:
    """One run to be made: its directory, and the arms that it serves."""

    label: str
    config: AnyRun
    run: RunDir


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
            key = "data" if str(error).startswith("data.") else "policy"
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
    say: Callable[[str], None] = print,
) -> Results:
    """Runs what of an experiment has not been run yet, writes its report, and returns the results.

    Args:
      source: an experiment, its file or folder, or a mapping; see `load`, also for `presets` to `imports`.
      out: folder of all results.
      say: receives one-line messages.

    Raises:
      ValueError: the experiment cannot run as it stands; nothing has been written.
    """
    experiment = load(source, presets=presets, settings=settings, axes=axes, arms=arms, seeds=seeds, imports=imports)
    planned = check(experiment, out)
    env = fingerprint()
    pending = [one for one in planned if one.run.status()["state"] not in FINISHED]
    for line in _reused(planned, pending, env):
        say(line)
    _save_experiment(experiment, Path(out))
    if pending:
        from precision_lab.training.progress import RunProgress

        with RunProgress(len(pending)) as progress:
            _run_serially(pending, env, progress, say)
    results = read(experiment, out)
    results.report()
    return results


def _reused(planned: Sequence[Planned], pending: Sequence[Planned], env: Mapping[str, Any]) -> Iterator[str]:
    """Yields what to say about runs that are finished already."""
    finished = [one for one in planned if one not in pending]
    if finished:
        yield f"{len(finished)} of {len(planned)} runs are finished already and are reused."
    changed = [words for one in planned if (words := _changed(one, env))]
    if changed:
        words = "; ".join(dict.fromkeys(word for words in changed for word in words))
        yield f"warning: {len(changed)} runs come from another environment ({words}); --out NEW runs them afresh."


def _changed(one: Planned, env: Mapping[str, Any]) -> list[str]:
    """Returns what differs between the environments of a run's attempts and this one, in words."""
    stored = one.run.envs()
    current = {**env, **registered_code(one.config)} if stored else {}
    return [word for earlier in stored for word in differences(earlier, current)]


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


def _run_serially(
    pending: Sequence[Planned], env: Mapping[str, Any], progress: Progress, say: Callable[[str], None]
) -> None:
    """Executes runs in turn; those that another process holds come last, and are waited for."""
    busy = []
    for one in pending:
        try:
            execute_trial(one.run, one.config, env=env, progress=progress, label=one.label, say=say)
        except BusyError:
            busy.append(one)
    for one in busy:
        if one.run.is_locked():
            say(f"waiting for {one.label} ({one.run.id}), which another process is running.")
        execute_trial(one.run, one.config, env=env, progress=progress, label=one.label, say=say, wait=True)


def execute_trial(
    run: RunDir,
    config: AnyRun,
    *,
    env: Mapping[str, Any],
    progress: Progress,
    label: str,
    say: Callable[[str], None] = print,
    wait: bool = False,
) -> str:
    """Executes one run, or takes it up where it was left, and returns the state it ends in.

    A crash is recorded in the run directory and not raised.

    Raises:
      BusyError: another process is executing it, or the run that it begins from, and `wait` is false.
      ValueError: the directory belongs to another configuration.
      KeyboardInterrupt: the run was interrupted, and is marked so.
    """
    await_parent(run, config, wait=wait)
    with run.claim(config, wait=wait):
        state = run.status()["state"]
        if state in FINISHED:  # Another process was faster.
            return state
        attempt = run.start({**env, **registered_code(config)})
        progress.start_run(label, config.total_steps)
        state = "interrupted"
        try:
            state = _train(run, config, attempt, progress)
        except Exception as error:
            state = "failed"
            log = _record_crash(run, attempt, error)
            say(f"{label} failed: {_last_line(error)} (see {log})")
        finally:
            if state == "interrupted":
                run.stop(state, attempt=attempt, error=None)
            progress.end_run(state)
    return state


def _train(run: RunDir, config: AnyRun, attempt: int, progress: Progress) -> str:
    """Trains, keeps the record and the result, and returns `done` or `diverged`."""
    from precision_lab import training

    started = time.monotonic()
    run.checkpoints.mkdir(exist_ok=True)
    with _logging_to(run.log(attempt)), run.sink(attempt) as sink:
        begin = start_from(run, config)
        result = training.train(config, checkpoint_dir=run.checkpoints, sink=sink, on_step=progress.step, **begin)
    duration_s = round(time.monotonic() - started, 3)
    run.finish(result.status, step=result.step, metrics=result.metrics, duration_s=duration_s, attempt=attempt)
    return result.status


@contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    """Keeps what libraries log during a run in its log, which exists only if there was something."""
    path.parent.mkdir(exist_ok=True)
    handler = logging.FileHandler(path, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
        handler.close()


def _record_crash(run: RunDir, attempt: int, error: Exception) -> Path:
    """Notes the failure of a run, its traceback in the log."""
    log = run.log(attempt)
    log.parent.mkdir(exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        file.write("".join(traceback.format_exception(error)))
    run.stop("failed", attempt=attempt, error=_last_line(error))
    return log


def _last_line(error: Exception) -> str:
    """Returns an error as one line of readable length."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 300 else text[:297] + "..."

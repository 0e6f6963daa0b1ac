"""Runs that share a program at once, in this process: one step of all of them is one vmapped executable.

Each run is what it is alone (its directory, rows, checkpoints, how it ends), in a thread of its own; see
`training.lockstep`. Its numbers agree with those of the other executors to rounding only, so the fingerprint names the
executor and how many `lanes` there were: only of an equal number are they bitwise the same. What no other run is like,
and what does not fit into memory twice, is executed in turn.

Runs in turn share the program as well. On a CPU, products of a stack are slow, and going at once pays for very small
models only: 16 steps of an MLP of 32 units took 0.2 of their time in turn, those of a transformer of width 64 over
twice of it (2 cores).
"""

import dataclasses
import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from precision_lab.runner.executors import Context, serial
from precision_lab.runner.groups import structure_of
from precision_lab.runner.rundir import BusyError
from precision_lab.runner.trial import Planned, Progress, execute_trial
from precision_lab.training.config import RunConfig

IN_WAVES = True


def execute(pending: Sequence[Planned], context: Context) -> None:
    """Executes runs, those of equal structure at once, `jobs` of them at most."""
    for runs in _together(pending, context):
        left = runs if len(runs) == 1 else _at_once(runs, context)
        serial.execute(left, dataclasses.replace(context, env=_in_turn(context.env)))


def _in_turn(env: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fingerprint of a run that goes alone: it is what it is under any executor."""
    return {key: value for key, value in env.items() if key != "executor"}


def _together(runs: Sequence[Planned], context: Context) -> Iterator[list[Planned]]:
    """Yields the runs that are executed at once, as many as there is room for."""
    groups: dict[Any, list[Planned]] = {}
    for one in runs:
        groups.setdefault(structure_of(one.config), []).append(one)
    for group in groups.values():
        most = _most(group, context) if len(group) > 1 else 1
        yield from (group[i : i + most] for i in range(0, len(group), most))


def _most(group: Sequence[Planned], context: Context) -> int:
    """Returns how many runs of a group may go at once; says so if memory is what limits them."""
    from precision_lab.training.size import room_for

    config, wanted = group[0].config, min(len(group), context.jobs or len(group))
    if not isinstance(config, RunConfig) or not config.mesh.is_one_device:
        return 1
    room = room_for(config)
    if room < wanted:
        how = f"{room} at a time" if room > 1 else "in turn"
        context.say(f"{group[0].label} and {len(group) - 1} runs like it do not fit into memory at once; {how}.")
    return min(wanted, room)


def _at_once(runs: Sequence[Planned], context: Context) -> list[Planned]:
    """Executes runs in lockstep, and returns those that another command holds.

    Raises:
      KeyboardInterrupt, Preempted, DiskFullError: as `execute_trial`, after every run has saved.
    """
    from precision_lab.training.lockstep import Lockstep

    lockstep, ended, telling = Lockstep(len(runs)), queue.SimpleQueue(), threading.Lock()

    def go(number: int) -> None:
        error: BaseException | None = None
        try:
            with lockstep.lane(number):
                _execute(runs[number], context, telling, len(runs))
        except BaseException as raised:
            error = raised
        ended.put((runs[number], error))

    for number in range(len(runs)):
        threading.Thread(target=go, args=(number,), daemon=True).start()
    return _outcome([_next(ended, context) for _ in runs], context)


def _execute(one: Planned, context: Context, telling: threading.Lock, lanes: int) -> None:
    """Executes one run in its lane, of so many."""
    one.run.prepare(one.config)
    progress = _OfRun(context.progress, one.run.id, telling)
    execute_trial(
        one.run, env={**context.env, "lanes": lanes}, progress=progress, label=one.label, say=context.say,
        stop=context.stop, trackers=context.trackers,
    )  # fmt: skip


def _next(ended: Any, context: Context) -> tuple[Planned, BaseException | None]:
    """Waits for a run to end; a signal that is raised here becomes a request to all, which a second one cuts short."""
    try:
        return ended.get()
    except (KeyboardInterrupt, SystemExit) as error:
        if context.stop.error is not None:
            raise
        context.stop.error = error
        return ended.get()


def _outcome(outcomes: Sequence[tuple[Planned, BaseException | None]], context: Context) -> list[Planned]:
    """Raises what is to be raised when all runs have ended, or returns those that were busy."""
    context.stop.end_run()
    errors = [error for _, error in outcomes if error is not None and not isinstance(error, BusyError)]
    if errors:
        raise errors[0]
    return [one for one, error in outcomes if isinstance(error, BusyError)]


class _OfRun:
    """Progress of one of several runs, told by its thread."""

    def __init__(self, progress: Progress, run: str, lock: threading.Lock) -> None:
        self._progress, self._run, self._lock = progress, run, lock

    def start_run(self, label: str, total_steps: int, run: str = "") -> None:
        with self._lock:
            self._progress.start_run(label, total_steps, run or self._run)

    def step(self, step: int, loss: float, run: str = "") -> None:
        with self._lock:
            self._progress.step(step, loss, run or self._run)

    def end_run(self, status: str, run: str = "") -> None:
        with self._lock:
            self._progress.end_run(status, run or self._run)

"""One run after another, in this process."""

from collections.abc import Sequence

from precision_lab.runner.executors import Context
from precision_lab.runner.rundir import BusyError
from precision_lab.runner.trial import Planned, execute_trial

IN_WAVES = False


def execute(pending: Sequence[Planned], context: Context) -> None:
    """Executes runs in turn; those that another process holds come last, and are waited for."""
    busy = []
    for one in pending:
        try:
            _execute(one, context, wait=False)
        except BusyError:
            busy.append(one)
    for one in busy:
        if one.run.is_busy():
            context.say(f"waiting for {one.label} ({one.run.id}), which another process is running.")
        _execute(one, context, wait=True)


def _execute(one: Planned, context: Context, *, wait: bool) -> None:
    """Executes one run."""
    one.run.prepare(one.config)
    execute_trial(
        one.run, env=context.env, progress=context.progress, label=one.label, say=context.say, stop=context.stop,
        trackers=context.trackers, wait=wait,
    )  # fmt: skip

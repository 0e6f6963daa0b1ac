"""One run after another, in this process."""

from collections.abc import Sequence

from precision_lab.runner.executors import Context
from precision_lab.runner.parents import parent_of
from precision_lab.runner.rundir import BusyError
from precision_lab.runner.trial import Planned, execute_trial

IN_WAVES = False


def execute(pending: Sequence[Planned], context: Context) -> None:
    """Executes runs in turn; those that another process holds are waited for at the end, with what begins from them."""
    busy: list[Planned] = []
    for one in pending:
        above = parent_of(one.run, one.config)
        if above is not None and above.id in [held.run.id for held in busy]:
            busy.append(one)  # Should the other process die meanwhile, the run above is to be taken up first.
            continue
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

"""One run after another, in this process."""

from collections.abc import Sequence

from precision_lab.runner.executors import Context
from precision_lab.runner.order import Order
from precision_lab.runner.rundir import BusyError
from precision_lab.runner.trial import Planned, execute_trial

IN_WAVES = False


def execute(pending: Sequence[Planned], context: Context) -> None:
    """Executes runs in turn; those that another process holds are waited for at the end, with what begins from them."""
    order = Order(pending)
    while (found := order.take()) is not None:
        one, wait = found
        if wait and one.run.is_busy():
            context.say(f"waiting for {one.label} ({one.run.id}), {one.run.held_by()}.")
        try:
            _execute(one, context, wait=wait)
        except BusyError:
            order.held(one)
        else:
            order.ended(one)


def _execute(one: Planned, context: Context, *, wait: bool) -> None:
    """Executes one run."""
    one.run.prepare(one.config)
    execute_trial(
        one.run, env=context.env, progress=context.progress, label=one.label, say=context.say, stop=context.stop,
        trackers=context.trackers, wait=wait,
    )  # fmt: skip

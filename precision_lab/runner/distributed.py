"""Several processes that train each run together, each with its own devices, on one machine or many.

All processes are the same command (`--distributed`). The first one does what a single process does: it claims, writes
and reports. Before it trains a run it announces it, and the others train it too, with rows that go nowhere: each
computes on its own part of the mesh. Whether to stop is decided by the first one, after every step.

What is compiled for a mesh is the same however many processes share it, so numbers are bitwise those of one process
where no sum runs over more than two devices. Longer sums are added in the order of the devices within a process, and in
another order over the network: they may differ in their last bits, and what is trained from there with them.
"""

import contextlib
import os
from collections.abc import Mapping, Sequence

from precision_lab.runner.parents import start_from
from precision_lab.runner.together import agreed, begin, heard
from precision_lab.runner.trial import Planned

_ADDRESS, _COUNT, _INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


def initialize(wanted: bool, executor: str) -> None:
    """Connects the processes, if it is `wanted` or the environment says so; before JAX is used for anything else.

    The address of the first process, their number, and which one this is come from `JAX_COORDINATOR_ADDRESS`,
    `JAX_NUM_PROCESSES` and `JAX_PROCESS_ID`, or from the scheduler (SLURM, Open MPI, TPU pods), which JAX asks.

    Raises:
      ValueError: the executor gives runs to other processes itself, or nothing says who the others are.
    """
    if not wanted and _ADDRESS not in os.environ:
        return
    if executor != "serial":
        raise ValueError(f"several processes that train together need executor 'serial', got {executor!r}.")
    missing = [name for name in (_COUNT, _INDEX) if name not in os.environ] if _ADDRESS in os.environ else []
    if missing:
        raise ValueError(f"{_ADDRESS} is set, but not {' and '.join(missing)}.")
    import jax

    try:
        if _ADDRESS in os.environ:
            jax.distributed.initialize(os.environ[_ADDRESS], int(os.environ[_COUNT]), int(os.environ[_INDEX]))
        else:
            jax.distributed.initialize()
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"--distributed: {error} Set {_ADDRESS}, {_COUNT} and {_INDEX}.") from None
    begin()


def follow(planned: Sequence[Planned]) -> None:
    """Trains what the first process announces, until it announces nothing more."""
    from precision_lab import training

    runs = {one.run.id: one for one in planned}
    while name := heard():
        one = runs[name]
        # What is wrong with a run is wrong in every process at the same place, and the first one writes it down.
        with contextlib.suppress(Exception):
            training.train(
                one.config, checkpoint_dir=one.run.checkpoints, sink=_Nowhere(), should_stop=agreed(lambda: False),
                **start_from(one.run, one.config),
            )  # fmt: skip


class _Nowhere:
    """A sink that keeps nothing."""

    def restart(self, step: int) -> None:
        """Does nothing."""

    def write(self, row: Mapping[str, object]) -> None:
        """Does nothing."""

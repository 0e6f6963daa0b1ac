"""A group of runs at once: runs whose configs differ only in numbers, trained in lockstep by one vmapped step."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax

from precision_lab import data
from precision_lab.training.config import RunConfig
from precision_lab.training.lockstep import Lockstep
from precision_lab.training.loop import MetricSink, RunResult, train
from precision_lab.training.program import program_for
from precision_lab.training.structure import structural_differences

_COPIES = 4
"""How many times its state a run needs: state, gradients, updates and the state after; activations come on top."""


def train_group(
    configs: Sequence[RunConfig],
    *,
    checkpoint_dirs: Sequence[Path | None],
    sinks: Sequence[MetricSink],
    on_step: Callable[[int, int, float], None] | None = None,
) -> list[RunResult | Exception]:
    """Trains runs of equal structure at once, and returns how each ended.

    Each run is what `train` makes of it alone, with its own rows and checkpoints: it goes on from its latest
    checkpoint, diverges or fails by itself. Products of a stack sum in another order than products alone, so its
    numbers are those of `train` on another device, so to say: they differ in their last bits at first, and drift
    apart from there as training lets them. Among themselves runs of a group of one size are bitwise repeatable.

    Args:
      configs: the runs.
      checkpoint_dirs, sinks: of each run, as for `train`.
      on_step: called with the number of the run, its step and its latest known loss, from a thread of that run.

    Returns:
      The result of each run, or what it raised.

    Raises:
      ValueError: two runs differ in structure, so that no step can serve both.
    """
    require_one_structure(configs)
    lockstep = Lockstep(len(configs))

    def run(number: int) -> RunResult | Exception:
        with lockstep.lane(number):
            try:
                return train(
                    configs[number],
                    checkpoint_dir=checkpoint_dirs[number],
                    sink=sinks[number],
                    on_step=None if on_step is None else functools.partial(on_step, number),
                )
            except Exception as error:
                return error

    with ThreadPoolExecutor(len(configs)) as threads:
        return list(threads.map(run, range(len(configs))))


def require_one_structure(configs: Sequence[RunConfig]) -> None:
    """Raises ValueError, with the reason, for runs that cannot share a program."""
    for number, config in enumerate(configs):
        if differing := structural_differences(config, configs[0]):
            raise ValueError(f"run {number} cannot be stacked with run 0: {'; '.join(differing)}. Run it by itself.")


def room_for(config: RunConfig) -> int:
    """Returns how many runs of a config fit at once into the memory that is available, estimated from their states."""
    shapes = program_for(config, data.load(config.data).spec).state_shapes
    one = _COPIES * sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(shapes))
    return max(1, available_bytes() // one)


def available_bytes() -> int:
    """Returns the memory that is available to arrays: of the first device, or of the machine if that is a CPU."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0)
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

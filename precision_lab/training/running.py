"""The one entrance to a run, whatever kind of run it is: a training, or the measurement of a probe."""

import math
from collections.abc import Callable
from pathlib import Path

from precision_lab.training import AnyRun, loop
from precision_lab.training.config import RunConfig
from precision_lab.training.loop import MetricSink, RunResult
from precision_lab.training.probes import PROBES


def check(config: AnyRun) -> None:
    """Makes sure that a run can start; see `loop.check`. What a probe needs is checked with its config."""
    if isinstance(config, RunConfig):
        loop.check(config)


def train(
    config: AnyRun,
    *,
    checkpoint_dir: Path | None,
    sink: MetricSink,
    on_step: Callable[[int, float], None] | None = None,
    start_from: Path | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> RunResult:
    """Executes the run that `config` describes, and returns how it ended; see `loop.train`.

    A probe is one step: its metrics are one row of the split "probe". It saves nothing and starts over if it was
    killed; numbers that are not finite are results like others.
    """
    if isinstance(config, RunConfig):
        return loop.train(
            config,
            checkpoint_dir=checkpoint_dir,
            sink=sink,
            on_step=on_step,
            start_from=start_from,
            should_stop=should_stop,
        )
    sink.restart(-1)
    measured = PROBES.builder(config.probe)(config.probe, config.seed)
    sink.write({"step": 1, "split": "probe", **measured})
    if on_step is not None:
        on_step(1, math.nan)
    return RunResult("done", 1, {f"probe/{name}": float(value) for name, value in measured.items()})

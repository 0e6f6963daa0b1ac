"""Training: run configs, the loop, checkpoints, progress, and the probes that run in its place.

Importing this package, and validating a config with it, needs no JAX; `train` and `check` import it.
"""

from typing import TYPE_CHECKING, Any

from precision_lab.training.config import RunConfig
from precision_lab.training.probes import ProbeRun

if TYPE_CHECKING:
    from precision_lab.training.loop import MetricSink, RunResult
    from precision_lab.training.running import check, train

AnyRun = RunConfig | ProbeRun
"""What the runner executes."""

__all__ = ["AnyRun", "MetricSink", "ProbeRun", "RunConfig", "RunResult", "check", "train"]


def __getattr__(name: str) -> Any:
    if name in ("MetricSink", "RunResult", "check", "train"):
        from precision_lab.training import running

        return getattr(running, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Training: run configs, the loop, checkpoints, progress.

Importing this package, and validating a config with it, needs no JAX; `train` and `check` import it.
"""

from typing import TYPE_CHECKING, Any

from precision_lab.training.config import RunConfig

if TYPE_CHECKING:
    from precision_lab.training.loop import MetricSink, RunResult, check, train

__all__ = ["MetricSink", "RunConfig", "RunResult", "check", "train"]


def __getattr__(name: str) -> Any:
    if name in ("MetricSink", "RunResult", "check", "train"):
        from precision_lab.training import loop

        return getattr(loop, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

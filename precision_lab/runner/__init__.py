"""Experiments: configuration, execution, claims and reports. Importing this package imports no JAX.

    results = runner.run("experiments/mixed_precision", presets=["smoke"])
    print(results)
    results.report("report.html")

The same experiment may be a mapping or an `ExperimentConfig`; `read` gives the results of what has run already.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from precision_lab.runner.claim import Verdict
    from precision_lab.runner.config import ExperimentConfig, Paper
    from precision_lab.runner.execute import check, run
    from precision_lab.runner.loading import load
    from precision_lab.runner.results import Results, Trial, read
    from precision_lab.runner.rundir import RunDir
    from precision_lab.runner.stopping import Preempted

__all__ = [
    "ExperimentConfig",
    "Paper",
    "Preempted",
    "Results",
    "RunDir",
    "Trial",
    "Verdict",
    "check",
    "load",
    "read",
    "run",
]

_HOMES = {
    "ExperimentConfig": "config",
    "Paper": "config",
    "Preempted": "stopping",
    "Results": "results",
    "RunDir": "rundir",
    "Trial": "results",
    "Verdict": "claim",
    "check": "execute",
    "load": "loading",
    "read": "results",
    "run": "execute",
}


def __getattr__(name: str) -> Any:
    """Imports a public name at its first use."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__

"""Executors: who runs the runs of an experiment. Each has its own file, and all call `trial.execute_trial`.

An executor gets a list of runs that are to be made, so that it may group them, and returns when each has ended, as its
directory says. `serial` runs one after another in this process, `process` in one subprocess each, `vmap` those that
share a program at once in this process, `ray` on a Ray cluster, `slurm` as a job array. An executor may have options:
`slurm:partition=gpu,timeout_min=600`.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol

from precision_lab.runner.stopping import Stop
from precision_lab.runner.trial import Planned, Progress

EXECUTORS = ("serial", "process", "vmap", "ray", "slurm")
FINGERPRINTS = {"vmap": {"executor": "vmap"}}
"""What an executor adds to the fingerprint, if its numbers are those of the others to rounding only."""
_NEEDS = {"ray": "ray", "slurm": "submitit"}
_OPTIONS = {"ray", "slurm"}


@dataclass(frozen=True)
class Context:
    """What an executor has to work with.

    Attributes:
      env: the fingerprint of this machine and process.
      progress: shows how far the runs are.
      say: receives one-line messages.
      stop: asks to save and end at the next step.
      jobs: how many runs at once; None leaves it to the executor.
      options: of the executor.
      trackers: names of what shows the metrics of the runs.
    """

    env: Mapping[str, Any]
    progress: Progress
    say: Callable[[str], None]
    stop: Stop
    jobs: int | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    trackers: tuple[str, ...] = ()


class Executor(Protocol):
    """What a module of this package is: a function that executes runs.

    Attributes:
      IN_WAVES: whether it must be given lists in which no run begins from another of the same list; otherwise it gets
        all runs at once, and takes them in the order of `runner.order`.
    """

    IN_WAVES: bool

    def execute(self, pending: Sequence[Planned], context: Context) -> None:
        """Executes runs, whatever becomes of each.

        Raises:
          KeyboardInterrupt, Preempted: it was asked to stop; what runs had been started have saved and are marked so.
          DiskFullError: there is no room for results.
        """
        ...


def get(text: str, jobs: int | None = None) -> tuple[Executor, dict[str, str]]:
    """Returns the executor that a text names, and its options.

    Raises:
      ValueError: there is none of that name, it cannot run so many at once, has no options, or what it needs is not
        installed.
    """
    name, colon, rest = text.partition(":")
    if name not in EXECUTORS:
        near = get_close_matches(name, EXECUTORS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(EXECUTORS)}."
        raise ValueError(f"no executor {name!r}{hint}")
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs is how many runs at once, at least 1, got {jobs}.")
    if jobs not in (None, 1) and name == "serial":
        raise ValueError(f"executor {name!r} makes one run at a time, got jobs={jobs}; choose executor 'process'.")
    if colon and name not in _OPTIONS:
        raise ValueError(f"executor {name!r} has no options, got {rest!r}.")
    if name in _NEEDS and find_spec(_NEEDS[name]) is None:
        raise ValueError(f"executor {name!r} needs {_NEEDS[name]}: pip install 'precision-lab[{name}]'.")
    if name not in ("serial", "vmap"):  # This process trains nothing, and must not take the memory of a GPU.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    return import_module(f"{__name__}.{name}"), _options(rest)  # type: ignore[return-value]


def _options(text: str) -> dict[str, str]:
    """Returns the options of `key=value,key=value`."""
    found = {}
    for part in filter(None, text.split(",")):
        key, equals, value = part.partition("=")
        if not equals or not key:
            raise ValueError(f"executor options are key=value,key=value, got {part!r}.")
        found[key.strip()] = value.strip()
    return found

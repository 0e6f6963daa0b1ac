"""Executors: who runs the runs of an experiment. Each has its own file, and all call `trial.execute_trial`.

An executor gets a list of runs that are to be made, so that it may group them, and returns when each has ended, as its
directory says. `serial` runs one after another in this process, `process` in one subprocess each.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from importlib import import_module
from typing import Any, Protocol

from precision_lab.runner.environment import registered_modules
from precision_lab.runner.stopping import Stop
from precision_lab.runner.trial import Planned, Progress

EXECUTORS = ("serial", "process")


@dataclass(frozen=True)
class Context:
    """What an executor has to work with.

    Attributes:
      env: the fingerprint of this machine and process.
      progress: shows how far the runs are.
      say: receives one-line messages.
      stop: asks to save and end at the next step.
      jobs: how many runs at once; None leaves it to the executor.
    """

    env: Mapping[str, Any]
    progress: Progress
    say: Callable[[str], None]
    stop: Stop
    jobs: int | None = None


class Executor(Protocol):
    """What a module of this package is: a function that executes runs."""

    def execute(self, pending: Sequence[Planned], context: Context) -> None:
        """Executes runs, whatever becomes of each.

        Raises:
          KeyboardInterrupt, Preempted: it was asked to stop; what runs had been started have saved and are marked so.
          DiskFullError: there is no room for results.
        """
        ...


def get(name: str, jobs: int | None) -> Executor:
    """Returns an executor.

    Raises:
      ValueError: there is none of that name, or it cannot run so many at once.
      ImportError: what it needs is not installed; says what to install.
    """
    if name not in EXECUTORS:
        near = get_close_matches(name, EXECUTORS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(EXECUTORS)}."
        raise ValueError(f"no executor {name!r}{hint}")
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs is how many runs at once, at least 1, got {jobs}.")
    if jobs not in (None, 1) and name == "serial":
        raise ValueError(f"executor {name!r} makes one run at a time, got jobs={jobs}; choose executor 'process'.")
    if name != "serial":  # This process trains nothing, and must not take the memory of a GPU.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    return import_module(f"{__name__}.{name}")  # type: ignore[return-value]


def modules_to_import(one: Planned) -> list[str]:
    """Returns the modules that another process must import before it can execute a run.

    Raises:
      ValueError: the model or the data were registered by the script or notebook itself.
    """
    modules = registered_modules(one.config)
    if "__main__" in modules:
        raise ValueError(
            f"{one.label}: its model or data are registered by the script itself, which another process cannot "
            "import. Move them to a module of their own and name it: --import MODULE, or imports=[...]."
        )
    return modules

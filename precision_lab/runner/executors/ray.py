"""Runs as tasks of Ray, on this machine or on a cluster with a common disk (`RAY_ADDRESS`).

Each run has a worker process of its own. A worker that dies is started again twice, and takes the run up from its
checkpoint; after that the run is marked failed and the others go on. `ray:num_gpus=1` gives each run a GPU.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from precision_lab.runner.environment import cores
from precision_lab.runner.executors import Context
from precision_lab.runner.executors.remote import Watch, environment, mark_crashed, modules_to_import
from precision_lab.runner.rundir import RunDir
from precision_lab.runner.trial import Planned

_POLL_S = 0.5
_RETRIES = 2
_RESOURCES = {"num_cpus": 1.0, "num_gpus": 0.0}

IN_WAVES = True


def execute(pending: Sequence[Planned], context: Context) -> None:
    """Executes runs on a cluster, `jobs` at once, or as many as it has room for."""
    imports = {one.run.id: modules_to_import(one) for one in pending}
    resources = _resources(context.options)
    for one in pending:
        one.run.prepare(one.config)
    with _cluster(context.jobs) as ray:
        task = ray.remote(max_calls=1, max_retries=_RETRIES, **resources)(_run)
        waiting, going, watch = list(pending), {}, Watch(context.progress)
        while going or (waiting and not context.stop()):
            while waiting and len(going) < (context.jobs or len(pending)) and not context.stop():
                one = waiting.pop(0)
                words = one.label, imports[one.run.id], context.trackers
                going[task.remote(str(one.run.path.absolute()), *words)] = one
            if context.stop():
                for reference in going:
                    ray.cancel(reference)
            ended, _ = ray.wait(list(going), num_returns=1, timeout=_POLL_S)
            watch.look(list(going.values()))
            for reference in ended:
                _end(ray, reference, going.pop(reference), context, watch)
    context.stop.end_run()


def _run(directory: str, label: str, imports: Sequence[str], trackers: Sequence[str]) -> str:
    """Executes a run in a worker of the cluster; a worker that follows one that died waits for its lock."""
    from precision_lab.runner.executors.worker import Channel, execute

    with open(os.devnull, "w") as nowhere:
        try:
            return execute(RunDir(Path(directory)), label, imports, trackers, Channel(nowhere), wait=True)
        except (KeyboardInterrupt, SystemExit):  # It was stopped, and its directory says so.
            return "stopped"


def _end(ray: Any, reference: Any, one: Planned, context: Context, watch: Watch) -> None:
    """Closes the books on a run."""
    try:
        ray.get(reference)
    except ray.exceptions.TaskCancelledError:
        pass
    except ray.exceptions.RayError as error:
        first = str(error).strip().splitlines()[0]
        context.say(f"{one.label} failed: {mark_crashed(one, f'its worker of Ray ended: {first}')}")
    watch.end(one)


def _resources(options: Any) -> dict[str, float]:
    """Returns what each run asks the cluster for."""
    for key in options:
        if key not in _RESOURCES:
            raise ValueError(f"executor 'ray' has no option {key!r}; there are {', '.join(_RESOURCES)}.")
    return {**_RESOURCES, **{key: _number(key, value) for key, value in options.items()}}


def _number(key: str, text: str) -> float:
    """Returns the value of an option."""
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"executor 'ray' takes a number as {key}, such as 1 or 0.5, got {text!r}.") from None


@contextmanager
def _cluster(jobs: int | None) -> Iterator[Any]:
    """Gives Ray, connected: as it is, to the cluster of `RAY_ADDRESS`, or to one of its own that ends with it."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if "RAY_ADDRESS" not in os.environ:
        os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # Nobody but this process talks to it.
    ray = import_module("ray")

    if ray.is_initialized():
        yield ray
        return
    own = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": jobs or cores(), "include_dashboard": False}
    found = environment()
    env_vars = {key: found[key] for key in ("PYTHONPATH", "XLA_PYTHON_CLIENT_PREALLOCATE")}
    ray.init(log_to_driver=False, logging_level="ERROR", runtime_env={"env_vars": env_vars}, **own)
    try:
        yield ray
    finally:
        ray.shutdown()

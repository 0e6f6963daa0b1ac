"""Arms that begin where another arm ended, as configurations: each run holds that of the run it begins from."""

from collections.abc import Callable, Iterable, Mapping

from precision_lab.runner.tree import suggestion
from precision_lab.training import AnyRun, RunConfig
from precision_lab.training.start import StartConfig, why_no_start


def with_parents(
    runs: Mapping[str, AnyRun], seeds: Iterable[int], refuse: Callable[[str, str, str], Exception]
) -> dict[str, dict[int, AnyRun]]:
    """Returns the run of every arm and seed; in one that starts from another arm, that arm's run of the same seed.

    Args:
      runs: of each arm its run, whatever the seed.
      seeds: seeds of the experiment.
      refuse: (arm, key under `start`, message) -> the exception to raise.
    """
    nested: dict[str, dict[int, AnyRun]] = {}

    def add(arm: str, above: tuple[str, ...]) -> dict[int, AnyRun]:
        if arm in above:
            raise refuse(above[-1], "arm", f"arms start from one another: {' -> '.join((*above, arm))}.")
        if arm not in nested:
            parent = _parent(runs, arm, refuse)
            parents = {} if parent is None else add(parent, (*above, arm))
            nested[arm] = {seed: _with_seed(runs[arm], seed, parents.get(seed)) for seed in seeds}
        return nested[arm]

    for arm in runs:
        add(arm, ())
    return {arm: nested[arm] for arm in runs}


def start_of(run: AnyRun) -> StartConfig | None:
    """Returns where a run begins, if it has no beginning of its own; a probe never has."""
    return run.start if isinstance(run, RunConfig) else None


def _parent(runs: Mapping[str, AnyRun], arm: str, refuse: Callable[[str, str, str], Exception]) -> str | None:
    """Returns the arm that an arm starts from, which fits it, if there is one."""
    run = runs[arm]
    if not isinstance(run, RunConfig) or run.start is None:
        return None
    start = run.start
    if not start.arm:
        raise refuse(arm, "run", "an arm starts from an arm of this experiment: give start.arm, which names it.")
    if start.arm not in runs:
        others = [name for name in runs if name != arm]
        raise refuse(arm, "arm", f"no arm {start.arm!r}{suggestion(start.arm, others, what='arms')}")
    parent = runs[start.arm]
    if not isinstance(parent, RunConfig):
        raise refuse(arm, "arm", f"arm {start.arm!r} is a probe, which ends with no parameters.")
    if (why := why_no_start(run, parent, f"arm {start.arm!r}")) is not None:
        raise refuse(arm, *why)
    return start.arm


def _with_seed(run: AnyRun, seed: int, parent: AnyRun | None) -> AnyRun:
    """Returns a run with its seed and the run that it begins from."""
    start = start_of(run)
    begun = {} if parent is None or start is None else {"start": start.model_copy(update={"run": parent})}
    return run.model_copy(update={"seed": seed, **begun})


def ancestry(config: AnyRun) -> list[AnyRun]:
    """Returns a run and those that it begins from, the first of all first."""
    start = start_of(config)
    above = None if start is None else start.run
    return [*(ancestry(above) if above is not None else ()), config]


def arms_above(runs: Mapping[str, Mapping[int, AnyRun]], arms: Iterable[str]) -> set[str]:
    """Returns some arms and all those that they begin from."""
    found: set[str] = set()
    waiting = list(arms)
    while waiting:
        arm = waiting.pop()
        start = start_of(next(iter(runs[arm].values())))
        if arm not in found and start is not None:
            waiting.append(start.arm)
        found.add(arm)
    return found

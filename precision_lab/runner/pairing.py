"""Whether runs of one seed can be compared as a pair: they begin with the same bits and see the same batches."""

from collections.abc import Sequence

from precision_lab.runner.identity import semantic
from precision_lab.runner.starts import ancestry
from precision_lab.runner.summary import flat
from precision_lab.training import AnyRun, RunConfig


def unpaired(runs: Sequence[AnyRun]) -> list[str]:
    """Returns the dotted keys of model and data in which runs differ; those of the runs they begin from as `start.`.

    A run that begins from another is paired by the seed of that one, so how both were trained does not matter. Where
    one has more runs before it, the others count as if they had begun from their own first one. A run that only
    evaluates another on its own data counts as that one.
    """
    lines = [_trained(ancestry(run)) for run in runs]
    depth = max(map(len, lines))
    lines = [[line[0]] * (depth - len(line)) + line for line in lines]
    return [
        f"{'start.' * above}{key}" for above in range(depth) for key in _differing([line[-1 - above] for line in lines])
    ]


def _trained(line: Sequence[AnyRun]) -> list[AnyRun]:
    """Returns a run and those before it, without the evaluations at its end."""
    line = list(line)
    while len(line) > 1 and _trains_nothing(line[-1]) and not _differing(line[-2:]):
        line.pop()
    return line


def _trains_nothing(run: AnyRun) -> bool:
    """Returns whether a run takes no step."""
    return isinstance(run, RunConfig) and run.train.steps == 0


def _differing(runs: Sequence[AnyRun]) -> list[str]:
    """Returns the dotted keys of model and data in which runs themselves differ."""
    parts = [flat(semantic({key: getattr(run, key, None) for key in ("model", "data")})) for run in runs]
    return sorted(key for key in set().union(*parts) if any(part.get(key) != parts[0].get(key) for part in parts))

"""What running an experiment would mean: how many runs, of what, and how much room they take; runs nothing."""

import os
from dataclasses import dataclass
from typing import Any

from precision_lab.runner.config import ExperimentConfig
from precision_lab.runner.identity import semantic
from precision_lab.runner.results import Results, read
from precision_lab.runner.rundir import FINISHED
from precision_lab.runner.summary import counted


@dataclass(frozen=True)
class Outlook:
    """What is left to run.

    Attributes:
      runs: how many different runs there are; arms that turn out equal share theirs.
      finished: how many of them need not run again.
      state_bytes: the largest train state among the unfinished runs.
      disk_bytes: about what the unfinished runs will leave on disk, checkpoints and records.
      results: what there is so far.
    """

    runs: int
    finished: int
    state_bytes: int
    disk_bytes: int
    results: Results

    def to_dict(self) -> dict[str, Any]:
        """Returns the numbers as plain data."""
        names = ("runs", "finished", "state_bytes", "disk_bytes")
        return {name: getattr(self, name) for name in names}

    def sentences(self) -> list[str]:
        """Returns what a person wants to know before starting."""
        experiment = self.results.experiment
        lines = [f"axis {name}: {', '.join(map(str, values))}" for name, values in experiment.axes.items()]
        lines.append(
            f"{experiment.name}: {counted(len(experiment.arms), 'arm')}, {counted(len(experiment.seeds), 'seed')}, "
            f"{counted(self.runs, 'run')}, "
            f"{self.finished} of them finished; the configuration is valid."
        )
        if self.runs > self.finished:
            state, disk = bytes_text(self.state_bytes), bytes_text(self.disk_bytes)
            lines.append(f"to run: {self.runs - self.finished}; largest train state {state}, about {disk} on disk.")
        return lines


def outlook(experiment: ExperimentConfig, out: str | os.PathLike[str] = "runs") -> Outlook:
    """Returns what is left to run of an experiment that `check` has found valid; sizes come from shapes."""
    from precision_lab.training.size import disk_bytes, state_bytes

    results = read(experiment, out)
    runs = {one.run_id: one for one in results.trials}
    pending = [one.config for one in runs.values() if one.state not in FINISHED]
    sizes: dict[str, tuple[int, int]] = {}
    for config in pending:
        kind = str(semantic(config.model_copy(update={"seed": 0})))
        sizes[kind] = sizes.get(kind) or (state_bytes(config), disk_bytes(config))
    disk = sum(sizes[str(semantic(config.model_copy(update={"seed": 0})))][1] for config in pending)
    largest = max((state for state, _ in sizes.values()), default=0)
    return Outlook(len(runs), len(runs) - len(pending), largest, disk, results)


def bytes_text(count: float) -> str:
    """Returns bytes as `1.2 MB`, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"

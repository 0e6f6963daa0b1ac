"""Rows of the result table: what an arm reached in each metric, over its seeds and against the baseline."""

from dataclasses import dataclass
from typing import Any

from precision_lab.runner.metrics import encode_number
from precision_lab.runner.stats import Mean


@dataclass(frozen=True)
class Cell:
    """One metric of one arm over the seeds.

    Attributes:
      mean: over the finished runs.
      difference: to the baseline, paired by seed; None for the baseline itself.
      expected: whether the arm logs the metric at all.
    """

    mean: Mean | None
    difference: Mean | None
    expected: bool = True

    @property
    def text(self) -> str:
        """The mean with its interval, ✗ where it is missing, nothing where the arm does not log it."""
        return self.mean.text() if self.mean else "✗" if self.expected else ""


@dataclass(frozen=True)
class Row:
    """One arm of the result table; `troubles` counts the runs that did not finish, by state."""

    arm: str
    finished: int
    total: int
    troubles: dict[str, int]
    cells: dict[str, Cell]

    def trouble_text(self) -> str:
        """Returns `2 diverged, 1 failed`, empty if every run finished."""
        words = {"queued": "not run"}
        return ", ".join(f"{count} {words.get(state, state)}" for state, count in self.troubles.items())


def row_json(row: Row) -> dict[str, Any]:
    """Returns one arm of the table as plain data."""
    cells = {
        metric: {name: _mean_json(getattr(cell, name)) for name in ("mean", "difference")}
        for metric, cell in row.cells.items()
    }
    return {"arm": row.arm, "finished": row.finished, "total": row.total, "troubles": row.troubles, "metrics": cells}


def _mean_json(mean: Mean | None) -> dict[str, Any] | None:
    """Returns a mean as plain data."""
    if mean is None:
        return None
    return {"mean": encode_number(mean.mean), "half_width": encode_number(mean.half_width), "n": mean.n}

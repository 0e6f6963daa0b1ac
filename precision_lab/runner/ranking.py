"""Which arm is better: the direction of a metric, the best arm, true bits per parameter, and the frontier of both."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from precision_lab.runner.stats import Mean

if TYPE_CHECKING:
    from precision_lab.runner.results import Results

_LOWER = ("loss", "error", "mse", "excess", "perplexity", "grad_norm")
_HIGHER = ("accuracy", "sqnr")


def sense(metric: str) -> int:
    """Returns -1 for a metric of which less is better, 1 for one of which more is, 0 where neither can be said."""
    name = metric.rpartition("/")[2]
    if name.startswith("loss_scale"):
        return 0
    return -1 if any(word in name for word in _LOWER) else 1 if any(word in name for word in _HIGHER) else 0


def best_arms(results: "Results", metric: str) -> set[str]:
    """Returns the arm with the best mean among those whose runs all finished, and all that share it to four digits.

    None is best where there is only one such arm, where all are the same, or where the metric has no direction.
    """
    direction = sense(metric)
    means = {
        row.arm: cell.mean.mean
        for row in results.rows
        if row.finished == row.total and (cell := row.cells.get(metric)) and cell.mean and math.isfinite(cell.mean.mean)
    }
    if direction == 0 or len(means) < 2:
        return set()
    top = f"{direction * max(direction * value for value in means.values()):.4g}"
    best = {arm for arm, value in means.items() if f"{value:.4g}" == top}
    return set() if len(best) == len(means) else best


@dataclass(frozen=True)
class Point:
    """One arm in the plane of bits and quality.

    Attributes:
      bits: true bits per parameter.
      mean: of the metric over seeds.
      on_frontier: whether no other arm has as few bits and is as good, and better in one of the two.
    """

    arm: str
    bits: float
    mean: Mean
    on_frontier: bool


def pareto(results: "Results", metric: str) -> list[Point]:
    """Returns the arms whose bits and metric are both known, by bits; empty for a metric without direction."""
    direction = sense(metric)
    known = [
        (arm, bits, mean)
        for arm, bits in results.bits.items()
        if bits is not None and (mean := results.mean(arm, metric)) is not None and math.isfinite(mean.mean)
    ]
    if direction == 0:
        return []
    on = frontier([(bits, -direction * mean.mean) for _, bits, mean in known])
    points = [Point(arm, bits, mean, i in on) for i, (arm, bits, mean) in enumerate(known)]
    return sorted(points, key=lambda point: (point.bits, -direction * point.mean.mean))


def frontier(points: Sequence[tuple[float, float]]) -> set[int]:
    """Returns which points no other one beats: at most as large in both, and smaller in one."""
    return {i for i, (x, y) in enumerate(points) if not any(u <= x and v <= y and (u, v) != (x, y) for u, v in points)}


def bits_differ(results: "Results") -> bool:
    """Returns whether the arms' models take different bits per parameter."""
    return len({bits for bits in results.bits.values() if bits is not None}) > 1


def bits_text(bits: float | None) -> str:
    """Returns bits per parameter with as many digits as tell formats apart, `?` where they are not known."""
    return "?" if bits is None else f"{bits:.3g}"

"""Plots of metrics: learning curves, and the last values of every run."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from precision_lab.runner.drawing import COLOURS, MARKERS, WIDTH, Picture, figure_of, look, plain_log_ticks
from precision_lab.runner.metrics import Series
from precision_lab.runner.ranking import sense
from precision_lab.runner.stats import mean_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from precision_lab.runner.results import Results, Trial

MOST_ARMS = 16
"""Arms in one plot of lines; more cannot be told apart."""
MOST_ROWS = 40
"""Arms in one plot that gives each a row."""


def shown_arms(results: "Results", most: int = MOST_ARMS) -> list[str]:
    """Returns the arms to draw, in their order: all, or of many the baseline and those best by the first column."""
    arms = list(results.experiment.arms)
    if len(arms) <= most:
        return arms
    metric = results.experiment.columns[0]
    direction = sense(metric) or -1
    means = {arm: mean.mean for arm in arms if (mean := results.mean(arm, metric)) and math.isfinite(mean.mean)}
    ranked = sorted(means, key=lambda arm: -direction * means[arm])
    chosen = {
        results.experiment.baseline_arm,
        *[arm for arm in ranked if arm != results.experiment.baseline_arm][: most - 1],
    }
    return [arm for arm in arms if arm in chosen]


def curves(results: "Results", metrics: Sequence[str], *, name: str, over: str = "step") -> str | None:
    """Returns learning curves as SVG, one panel per metric: median over seeds, band from smallest to largest.

    Metrics that no run logged get no panel; None if there is none left.

    Args:
      name: makes the marks inside the SVG differ from those of other plots on a page.
      over: the horizontal axis, `step` or `seconds` of training.
    """
    picture = curve_picture(results, metrics, name=name, over=over)
    return picture.svg if picture else None


def curve_picture(
    results: "Results", metrics: Sequence[str], *, name: str = "curves", over: str = "step"
) -> Picture | None:
    """Returns learning curves as a picture; see `curves`."""
    metrics = [metric for metric in metrics if any(metric in one.series for one in results.trials)]
    if (over == "seconds" and not any(one.seconds for one in results.trials)) or not metrics:
        return None
    columns = min(2, len(metrics))
    rows = math.ceil(len(metrics) / columns)
    with figure_of(rows, columns, 2.9 * rows + 0.5, name) as (figure, axes):
        for panel, metric in zip(axes, metrics, strict=False):
            _curve_panel(panel, results, metric, over)
        for panel in axes[len(metrics) :]:
            panel.set_visible(False)
        lines = {str(line.get_label()): line for panel in axes for line in panel.get_lines()}
        legend_below(figure, lines)
        words = "training steps" if over == "step" else "seconds of training"
        return Picture(figure, f"Curves of {', '.join(metrics)} over {words}, by arm")


def legend_below(figure: "Figure", lines: Mapping[str, Any]) -> None:
    """Puts one legend for all panels below a figure."""
    if lines:
        figure.legend(
            lines.values(),
            list(lines),
            loc="outside lower center",
            ncols=_legend_columns(list(lines)),
            handlelength=3.2,
        )


def _legend_columns(labels: Sequence[str]) -> int:
    """Returns how many columns of a legend fit below the figure: a line sample and some letters each."""
    inches = 0.8 + 0.078 * max(map(len, labels))
    return max(1, min(4, len(labels), int(WIDTH / inches)))


def _curve_panel(panel: "Axes", results: "Results", metric: str, over: str) -> None:
    """Draws one metric of every arm."""
    drawn: list[float] = []
    for i, arm in enumerate(shown_arms(results)):
        runs = [one for one in results.of_arm(arm) if metric in one.series and (over == "step" or one.seconds)]
        steps, low, middle, high = band([one.series[metric] for one in runs])
        if not steps:
            continue
        style = look(i)
        if metric.endswith(("loss_scale", "skipped_steps")):
            style["drawstyle"] = "steps-post"
        few = {"marker": MARKERS[i % len(MARKERS)], "markersize": 3.5} if len(steps) < 16 else {}
        across = steps if over == "step" else [_seconds(runs, step) for step in steps]
        panel.plot(across, middle, label=arm, **style, **few)
        if len(runs) > 1:
            panel.fill_between(across, low, high, color=style["color"], alpha=0.14, linewidth=0)
        drawn += [value for value in middle if math.isfinite(value)]
    panel.set_title(metric)
    panel.set_xlabel("step" if over == "step" else "seconds of training")
    _scale_axis(panel, metric, drawn)


def _seconds(runs: Sequence["Trial"], step: int) -> float:
    """Returns when the fastest run, which needed to compile least, reached a step; NaN where no clock says."""
    return min((one.seconds[step] for one in runs if step in one.seconds), default=math.nan)


def _scale_axis(panel: "Axes", metric: str, values: Sequence[float]) -> None:
    """Chooses a logarithmic axis for a loss or a loss scale that spans a decade."""
    positive = [value for value in values if value > 0]
    if metric.endswith("loss_scale") and positive:
        panel.set_yscale("log", base=2)
    elif "loss" in metric and len(positive) == len(values) > 0 and max(positive) > 10 * min(positive):
        panel.set_yscale("log")
        plain_log_ticks(panel.yaxis)


def band(runs: Sequence[Series]) -> tuple[list[int], list[float], list[float], list[float]]:
    """Returns steps, and the smallest, the median and the largest value over the runs that reached each step.

    Values that are not finite are left out; a step where none is finite leaves a gap.
    """
    by_step: dict[int, list[float]] = {}
    for one in runs:
        for step, value in zip(one.steps, one.values, strict=True):
            by_step.setdefault(step, []).append(value)
    steps = sorted(by_step)
    finite = [[value for value in by_step[step] if math.isfinite(value)] or [math.nan] for step in steps]
    return steps, [min(v) for v in finite], [float(np.median(v)) for v in finite], [max(v) for v in finite]


def finals(results: "Results", metrics: Sequence[str]) -> str | None:
    """Returns the last value of every run, by arm: a mark per seed, the mean, and its 95 % interval."""
    arms = shown_arms(results, MOST_ROWS)
    metrics = [metric for metric in metrics if any(results.finals(arm, metric) for arm in arms)]
    if not metrics:
        return None
    columns = min(2, len(metrics))
    rows = math.ceil(len(metrics) / columns)
    with figure_of(rows, columns, rows * (0.34 * len(arms) + 1.1), "finals") as (figure, axes):
        for i, (panel, metric) in enumerate(zip(axes, metrics, strict=False)):
            _final_panel(panel, results, metric, arms)
            panel.set_yticks(range(len(arms)), arms if i % columns == 0 else [""] * len(arms))
            panel.set_ylim(len(arms) - 0.4, -0.6)
        for panel in axes[len(metrics) :]:
            panel.set_visible(False)
        return Picture(figure, f"Last value of {', '.join(metrics)} for every run, by arm").svg


def _final_panel(panel: "Axes", results: "Results", metric: str, arms: Sequence[str]) -> None:
    """Draws one metric: arms from top to bottom."""
    seen: list[float] = []
    for i, arm in enumerate(arms):
        values = [value for value in results.finals(arm, metric).values() if math.isfinite(value)]
        colour = COLOURS[i % len(COLOURS)]
        # Seeds stand a little above and below the line of their arm, so that equal ones can be told apart.
        heights = [i + 0.11 * (k - (len(values) - 1) / 2) for k in range(len(values))]
        panel.plot(values, heights, linestyle="none", marker=MARKERS[i % len(MARKERS)], markersize=5,
                   color=colour, alpha=0.55, markeredgewidth=0)  # fmt: skip
        mean = mean_interval(values)
        if mean:
            panel.plot([mean.mean], [i], marker="|", markersize=15, markeredgewidth=2, color=colour)
        if mean and mean.half_width is not None:
            panel.hlines(i, mean.mean - mean.half_width, mean.mean + mean.half_width, color=colour, linewidth=1.2)
        missing = len(results.experiment.seeds) - len(values)
        if missing and results.rows[i].cells[metric].expected:
            panel.annotate(f"✗ {missing}", (1.01, i), xycoords=("axes fraction", "data"), va="center", color="#b42318")
        seen += values
    panel.set_title(metric)
    panel.grid(axis="y", visible=False)
    if "loss" in metric and seen and min(seen) > 0 and max(seen) > 8 * min(seen):
        panel.set_xscale("log")
        plain_log_ticks(panel.xaxis)
        panel.set_xlim(min(seen) / 1.5, max(seen) * 1.5)
    elif seen:
        panel.set_xlim(*room(seen))


def room(values: Sequence[float]) -> tuple[float, float]:
    """Returns the ends of an axis that shows all values; an interval over few seeds may be wider, and is cut off."""
    low, high = min(values), max(values)
    edge = 0.3 * (high - low) or 0.05 * abs(high) or 1.0
    return low - edge, high + edge

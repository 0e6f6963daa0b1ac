"""Plots of an experiment as SVG text, to stand inline in a page that fetches nothing.

Arms differ by colour and by dash pattern, so that a plot survives a black-and-white printer and colour-blind eyes.
"""

import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from precision_lab.runner.metrics import Series
from precision_lab.runner.stats import mean_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

    from precision_lab.runner.results import Results

# Source: Okabe and Ito, "Color Universal Design", 2008. Their yellow is left out: too pale for a line on white.
# Okabe and Ito's palette, then Paul Tol's muted one for experiments with many arms.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
COLOURS += ("#882255", "#999933", "#332288", "#44AA99", "#AA4499", "#117733", "#DDCC77")
# Only the first arm is solid, and lies beneath the others: dashes on top of it show where curves coincide.
DASHES = ((0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)), (0, (9, 3)), (0, (3, 1, 1, 1, 1, 1)), (0, (2, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_WIDTH = 9.2
_INK, _GRID = "#1f2328", "#d8dee4"
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 9.5, "svg.fonttype": "none",
    "text.color": _INK, "axes.labelcolor": _INK, "xtick.color": "#57606a", "ytick.color": "#57606a",
    "axes.edgecolor": "#8c959f", "axes.linewidth": 0.8, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": _GRID, "grid.linewidth": 0.7, "axes.axisbelow": True, "axes.titlesize": 10.5,
    "axes.titleweight": "bold", "axes.titlelocation": "left", "legend.frameon": False, "lines.linewidth": 1.6,
    "axes.unicode_minus": True, "axes.formatter.use_mathtext": False,
}  # fmt: skip


@contextmanager
def _figure(rows: int, columns: int, height: float, name: str) -> Iterator[tuple["Figure", list["Axes"]]]:
    """Gives a figure in our style that leaves the settings of the caller's own plots alone."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(_WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots(rows, columns, squeeze=False)
        yield figure, list(axes.flat)


def _svg(figure: "Figure", title: str) -> str:
    """Returns the figure as an SVG element: no prolog, no metadata, a title for those who cannot see it."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'\s(xmlns(:\w+)?|version)="[^"]*"', "", text)
    text = re.sub(r'(<svg[^>]*?)\swidth="[^"]*"', r"\1", text, count=1)
    text = re.sub(r'(<svg[^>]*?)\sheight="[^"]*"', r"\1", text, count=1)
    label = title.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    return text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1).strip()


def look(arm_index: int) -> dict[str, Any]:
    """Returns the colour and the dash pattern of an arm; both together differ for the first 42 arms."""
    style: dict[str, Any] = {"color": COLOURS[arm_index % len(COLOURS)]}
    if arm_index == 0:
        return {**style, "linestyle": "-", "linewidth": 2.6, "alpha": 0.75}
    return {**style, "linestyle": DASHES[(arm_index - 1) % len(DASHES)]}


def curves(results: "Results", metrics: Sequence[str], *, name: str) -> str | None:
    """Returns learning curves, one panel per metric: median over seeds, band from smallest to largest.

    Metrics that no run logged get no panel; None if there is none left.
    """
    metrics = [metric for metric in metrics if any(metric in one.series for one in results.trials)]
    if not metrics:
        return None
    columns = min(2, len(metrics))
    rows = math.ceil(len(metrics) / columns)
    with _figure(rows, columns, 2.9 * rows + 0.5, name) as (figure, axes):
        for panel, metric in zip(axes, metrics, strict=False):
            _curve_panel(panel, results, metric)
        for panel in axes[len(metrics) :]:
            panel.set_visible(False)
        lines = {str(line.get_label()): line for panel in axes for line in panel.get_lines()}
        figure.legend(
            lines.values(),
            list(lines),
            loc="outside lower center",
            ncols=_legend_columns(list(lines)),
            handlelength=3.2,
        )
        return _svg(figure, f"Curves of {', '.join(metrics)} over training steps, by arm")


def _legend_columns(labels: Sequence[str]) -> int:
    """Returns how many columns of a legend fit below the figure: a line sample and some letters each."""
    inches = 0.8 + 0.078 * max(map(len, labels))
    return max(1, min(4, len(labels), int(_WIDTH / inches)))


def _curve_panel(panel: "Axes", results: "Results", metric: str) -> None:
    """Draws one metric of every arm."""
    drawn: list[float] = []
    for i, arm in enumerate(results.experiment.arms):
        runs = [one.series[metric] for one in results.of_arm(arm) if metric in one.series]
        steps, low, middle, high = band(runs)
        if not steps:
            continue
        style = look(i)
        if metric.endswith(("loss_scale", "skipped_steps")):
            style["drawstyle"] = "steps-post"
        few = {"marker": MARKERS[i % len(MARKERS)], "markersize": 3.5} if len(steps) < 16 else {}
        panel.plot(steps, middle, label=arm, **style, **few)
        if len(runs) > 1:
            panel.fill_between(steps, low, high, color=style["color"], alpha=0.14, linewidth=0)
        drawn += [value for value in middle if math.isfinite(value)]
    panel.set_title(metric)
    panel.set_xlabel("step")
    _scale_axis(panel, metric, drawn)


def _scale_axis(panel: "Axes", metric: str, values: Sequence[float]) -> None:
    """Chooses a logarithmic axis for a loss or a loss scale that spans a decade."""
    positive = [value for value in values if value > 0]
    if metric.endswith("loss_scale") and positive:
        panel.set_yscale("log", base=2)
    elif "loss" in metric and len(positive) == len(values) > 0 and max(positive) > 10 * min(positive):
        panel.set_yscale("log")
        _plain_log_ticks(panel.yaxis)


def _plain_log_ticks(axis: "Axis") -> None:
    """Labels a logarithmic axis at 1, 2 and 5 of each decade, as plain numbers that do not run into each other."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


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
    metrics = [metric for metric in metrics if any(results.finals(arm, metric) for arm in results.experiment.arms)]
    if not metrics:
        return None
    arms = list(results.experiment.arms)
    columns = min(2, len(metrics))
    rows = math.ceil(len(metrics) / columns)
    with _figure(rows, columns, rows * (0.34 * len(arms) + 1.1), "finals") as (figure, axes):
        for i, (panel, metric) in enumerate(zip(axes, metrics, strict=False)):
            _final_panel(panel, results, metric)
            panel.set_yticks(range(len(arms)), arms if i % columns == 0 else [""] * len(arms))
            panel.set_ylim(len(arms) - 0.4, -0.6)
        for panel in axes[len(metrics) :]:
            panel.set_visible(False)
        return _svg(figure, f"Last value of {', '.join(metrics)} for every run, by arm")


def _final_panel(panel: "Axes", results: "Results", metric: str) -> None:
    """Draws one metric: arms from top to bottom."""
    seen: list[float] = []
    for i, arm in enumerate(results.experiment.arms):
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
        _plain_log_ticks(panel.xaxis)

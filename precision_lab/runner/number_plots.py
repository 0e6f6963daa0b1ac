"""Plots of the numbers themselves: bits against quality, sites by arm, exponents, and metrics along a sweep's axes."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from precision_lab.runner.drawing import COLOURS, MARKERS, Picture, figure_of, look, plain_log_ticks
from precision_lab.runner.plots import legend_below, room, shown_arms
from precision_lab.runner.ranking import Point, pareto, sense
from precision_lab.telemetry.reading import exponent_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from precision_lab.runner.insides import Inside
    from precision_lab.runner.results import Results

_MOST_SITES = 40
_MOST_LABELS = 14


def pareto_picture(results: "Results", metric: str) -> Picture | None:
    """Returns true bits per parameter against a metric, frontier marked; None without a point."""
    points = pareto(results, metric)
    if not points:
        return None
    with figure_of(1, 1, 3.8, f"pareto-{metric}") as (figure, [panel]):
        for chosen, marker, colour in ((False, "x", "#8c959f"), (True, "o", COLOURS[0])):
            part = [point for point in points if point.on_frontier == chosen]
            panel.errorbar(
                [point.bits for point in part], [point.mean.mean for point in part],
                yerr=[point.mean.half_width or 0 for point in part], fmt=marker, color=colour, markersize=6,
                capsize=2.5, elinewidth=1,
            )  # fmt: skip
        on = [point for point in points if point.on_frontier]
        panel.plot([point.bits for point in on], [point.mean.mean for point in on], color=COLOURS[0], linewidth=1.2)
        for i, (x, y, text) in enumerate(labels(on if len(points) > _MOST_LABELS else points)):
            panel.annotate(text, (x, y), (6, -12 if i % 2 else 6), textcoords="offset points", fontsize=8)
        panel.set_ylim(*room([point.mean.mean for point in points]))
        panel.set_xscale("log", base=2)
        panel.set_xlabel("true bits per parameter, as stored by convert")
        panel.set_ylabel(metric)
        _plain_powers(panel, [point.bits for point in points])
        panel.set_title(f"{metric}, {'less' if sense(metric) < 0 else 'more'} is better")
        return Picture(figure, f"True bits per parameter against {metric}; the frontier is joined by a line")


def labels(points: Sequence[Point]) -> list[tuple[float, float, str]]:
    """Returns where to write which arms' names: points too close to be told apart share one label."""
    span = max(point.mean.mean for point in points) - min(point.mean.mean for point in points)
    groups: list[list[Point]] = []
    for point in sorted(points, key=lambda point: (point.bits, point.mean.mean)):
        near = groups and point.bits < 1.07 * groups[-1][0].bits
        if near and point.mean.mean - groups[-1][-1].mean.mean < 0.05 * span:
            groups[-1].append(point)
        else:
            groups.append([point])
    return [(group[0].bits, group[0].mean.mean, _names([point.arm for point in group])) for group in groups]


def _names(arms: Sequence[str]) -> str:
    """Returns names on one line, of many the first two and how many more there are."""
    return ", ".join(arms) if len(arms) < 3 else f"{arms[0]}, {arms[1]}, {len(arms) - 2} more"


def _plain_powers(panel: "Axes", values: Sequence[float]) -> None:
    """Labels a logarithmic axis of bits by plain powers of two around the values."""
    ticks = [2.0**k for k in range(exponent_of(min(values)), exponent_of(max(values)) + 2)]
    panel.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    panel.set_xlim(min(values) / 1.2, max(values) * 1.5)


def heat_map(insides: Mapping[str, "Inside"], which: str = "sqnr_db") -> str | None:
    """Returns sites by arms, the signal-to-noise ratio of each site's product under the arm's formats in each cell.

    None where no arm has a site with an error. Dark cells lose most; an infinite ratio, no error, is left white.
    """
    picture = heat_picture(insides, which)
    return picture.svg if picture else None


def heat_picture(insides: Mapping[str, "Inside"], which: str = "sqnr_db") -> Picture | None:
    """Returns the heat map as a picture; see `heat_map`."""
    arms = [arm for arm, one in insides.items() if any(math.isfinite(row[which]) for row in one.sites)]
    sites = list(dict.fromkeys(row["site"] for arm in arms for row in insides[arm].sites))[:_MOST_SITES]
    if not arms or not sites:
        return None
    found = {arm: {row["site"]: row[which] for row in insides[arm].sites} for arm in arms}
    grid = [[found[arm].get(site, math.nan) for arm in arms] for site in sites]
    with figure_of(1, 1, 0.3 * len(sites) + 1.9, "heat") as (figure, [panel]):
        _cells(panel, grid)
        panel.set_yticks(range(len(sites)), sites)
        panel.set_xticks(range(len(arms)), arms, rotation=30, ha="right")
        panel.grid(visible=False)
        return Picture(figure, "Signal to noise in dB of each site's product, by arm")


def _cells(panel: "Axes", grid: Sequence[Sequence[float]]) -> None:
    """Draws a grid of decibels with its numbers, readable without the colours."""
    finite = [value for row in grid for value in row if math.isfinite(value)]
    low, high = min(finite), max(finite)
    shown = [[value if math.isfinite(value) else math.nan for value in row] for row in grid]
    image = panel.imshow(shown, cmap="cividis", vmin=low, vmax=max(high, low + 1e-9), aspect="auto")
    for i, row in enumerate(grid):
        for j, value in enumerate(row):
            dark = math.isfinite(value) and (value - low) < 0.55 * max(high - low, 1e-9)
            text = f"{value:.0f}" if math.isfinite(value) else "exact" if value == math.inf else "·"
            panel.text(j, i, text, ha="center", va="center", fontsize=7.5, color="white" if dark else "#1f2328")
    panel.figure.colorbar(image, ax=panel, label="SQNR, dB", shrink=0.8)


def histograms(insides: Mapping[str, "Inside"]) -> str | None:
    """Returns exponent histograms of weights and gradients by arm, the window of the format they are put in shaded.

    Light is where the format has subnormals only; shares of zeros, and of what lies below and above, stand in words.
    """
    shown = [arm for arm, one in insides.items() if one.tensors]
    if not shown:
        return None
    kinds = list(dict.fromkeys(kind for arm in shown for kind in insides[arm].tensors))
    with figure_of(len(shown), len(kinds), 1.55 * len(shown) + 0.5, "exponents") as (figure, axes):
        for i, arm in enumerate(shown):
            for j, kind in enumerate(kinds):
                panel = axes[i * len(kinds) + j]
                _histogram(panel, insides[arm].tensors.get(kind), f"{arm}: {kind}")
        for panel in axes[-len(kinds) :]:
            panel.set_xlabel("exponent, base 2")
        return Picture(figure, "Exponents of weights and gradients by arm, with the window of their format").svg


def _histogram(panel: "Axes", tensor: Mapping[str, Any] | None, title: str) -> None:
    """Draws the exponents of one kind of tensor."""
    panel.set_title(title, fontsize=9)
    panel.set_yticks([])
    if not tensor or not tensor["binades"]:
        panel.text(0.5, 0.5, "all zero" if tensor else "not known", ha="center", transform=panel.transAxes)
        return
    exponents = sorted(int(exponent) for exponent in tensor["binades"])
    counts = [tensor["binades"][str(exponent)] for exponent in exponents]
    lowest, normal, top = tensor["window"]
    panel.axvspan(normal - 0.5, top + 0.5, color=COLOURS[5], alpha=0.28, linewidth=0)
    panel.axvspan(lowest - 0.5, normal - 0.5, color=COLOURS[5], alpha=0.12, linewidth=0)
    panel.bar(exponents, counts, width=0.9, color=COLOURS[0])
    edge = max(6, (exponents[-1] - exponents[0]) // 3)
    panel.set_xlim(exponents[0] - edge, exponents[-1] + edge)
    parts = [f"{tensor['format']}", f"{tensor['zero']:.2%} zero", f"{tensor['below']:.2%} below",
             f"{tensor['above']:.2%} above"]  # fmt: skip
    panel.text(0.01, 0.95, "\n".join(parts), transform=panel.transAxes, va="top", fontsize=7.5, color="#424a53")


def along_axes(results: "Results", metric: str) -> str | None:
    """Returns a metric along each numeric axis of a sweep: mean and 95 % interval, a line for each other combination.

    None where the sweep has no axis of at least three numbers.
    """
    points = results.experiment.points
    axes = [name for name, values in results.experiment.axes.items() if _is_numeric(values)]
    if not axes:
        return None
    with figure_of(1, len(axes), 3.6, f"axes-{metric}") as (figure, panels):
        lines: dict[str, Any] = {}
        seen: list[float] = []
        for panel, name in zip(panels, axes, strict=True):
            for i, (rest, arms) in enumerate(_lines(results, name).items()):
                known = [(points[arm][name], mean) for arm in arms if (mean := results.mean(arm, metric))]
                known = sorted(pair for pair in known if math.isfinite(pair[1].mean))
                if known:
                    drawn = panel.errorbar(
                        [x for x, _ in known], [mean.mean for _, mean in known],
                        yerr=[mean.half_width or 0 for _, mean in known], capsize=2.5, elinewidth=1,
                        marker=MARKERS[i % len(MARKERS)], markersize=4, **look(i),
                    )  # fmt: skip
                    lines.setdefault(rest or metric, drawn)
                    seen += [mean.mean for _, mean in known]
            _axis_scale(panel, [float(point[name]) for point in points.values() if name in point])
            panel.set_xlabel(name)
            panel.set_ylabel(metric)
        for panel in panels if seen else ():
            panel.set_ylim(*room(seen))
        legend_below(figure, lines if len(lines) > 1 else {})
        return Picture(figure, f"{metric} along {', '.join(axes)}").svg


def _is_numeric(values: Sequence[Any]) -> bool:
    """Returns whether the values of an axis are at least three numbers."""
    return len(values) > 2 and all(isinstance(value, int | float) and not isinstance(value, bool) for value in values)


def _lines(results: "Results", name: str) -> dict[str, list[str]]:
    """Returns the arms of each line along an axis, by what the other axes have there; of many those best somewhere."""
    lines: dict[str, list[str]] = {}
    for arm, point in results.experiment.points.items():
        if name in point:
            rest = ", ".join(f"{key}={value}" for key, value in point.items() if key != name)
            lines.setdefault(rest, []).append(arm)
    if len(lines) <= len(MARKERS):
        return lines
    best = set(shown_arms(results))
    return dict([item for item in lines.items() if best & set(item[1])][: len(MARKERS)])


def _axis_scale(panel: "Axes", values: Sequence[float]) -> None:
    """Makes an axis logarithmic where its values span more than a decade."""
    if min(values) > 0 and max(values) > 8 * min(values):
        panel.set_xscale("log")
        plain_log_ticks(panel.xaxis)

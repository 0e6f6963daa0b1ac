"""The sections of a report about the numbers themselves: bits, axes, what is inside, and what made the best arm."""

from html import escape
from typing import TYPE_CHECKING

from precision_lab.runner import number_plots
from precision_lab.runner.html_parts import changes_code, figure
from precision_lab.runner.insides import MOST_ARMS, different, known_insides, worst_sites
from precision_lab.runner.plots import shown_arms
from precision_lab.runner.ranking import best_arms, bits_differ, pareto
from precision_lab.runner.summary import command, varied

if TYPE_CHECKING:
    from precision_lab.runner.results import Results

_MOST_NAMED = 12


def axes(results: "Results") -> str:
    """Returns the table's metrics along the numeric axes of a sweep, nothing without one."""
    plots = [number_plots.along_axes(results, metric) for metric in results.experiment.columns[:2]]
    return "".join(figure(svg, "Mean over seeds and its 95 % interval.") for svg in plots)


def bits_and_quality(results: "Results") -> str:
    """Returns true bits per parameter against the first columns, nothing where all arms have the same bits."""
    if not bits_differ(results):
        return ""
    parts = []
    for metric in results.experiment.columns[:2]:
        picture = number_plots.pareto_picture(results, metric)
        points = pareto(results, metric)
        on = [point.arm for point in points if point.on_frontier]
        caption = f"On the frontier, where no arm is both smaller and better: {', '.join(on)}."
        out = [arm for arm in results.experiment.arms if arm not in {point.arm for point in points}]
        if points and out:
            more = f" and {len(out) - _MOST_NAMED} more" if len(out) > _MOST_NAMED else ""
            caption += f" Left out, since bits or a finite number are missing: {', '.join(out[:_MOST_NAMED])}{more}."
        parts.append(figure(picture.svg if picture else None, caption))
    return "".join(parts)


def inside(results: "Results") -> str:
    """Returns the heat map of sites by arms and the exponent histograms, as far as runs have been looked into."""
    found = known_insides(results, shown_arms(results, MOST_ARMS))
    if not found:
        return ""
    worst = [f"{arm}: {words}" for arm, words in worst_sites(found, 3)]
    heat = figure(
        number_plots.heat_map(found),
        "Signal to noise of each site's product in dB, given float32's operands; final weights of one seed. "
        f"Worst: {'; '.join(worst)}.",
    )
    bars = figure(
        number_plots.histograms(different(found, 8)),
        "Exponents of all weights, and of all gradients as backpropagation leaves them, at the end of the run; "
        "of arms that look alike the first. Shaded: "
        "the window of the format they are put in, lighter where it has subnormals only; of scaled formats the window "
        "is placed so that the largest value just fits.",
    )
    return heat + bars


def best_against_baseline(results: "Results") -> str:
    """Returns what the best arm by the first column changes in the baseline, and the command that makes it."""
    columns = results.experiment.columns
    best = sorted(best_arms(results, columns[0])) if columns else []
    if not best or best[0] == results.experiment.baseline_arm:
        return ""
    row = next(row for row in results.rows if row.arm == best[0])
    difference = row.cells[columns[0]].difference
    by = f", {escape(difference.text(signed=True))} against the baseline" if difference else ""
    return (
        f"<p>Best by {escape(columns[0])}: <b>{escape(best[0])}</b>{by}. It changes "
        f"{changes_code(varied(results)[best[0]]) or 'nothing'}: <code>{escape(command(results, best[0]))}</code></p>\n"
    )

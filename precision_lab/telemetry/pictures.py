"""Pictures of an observation: exponent histograms, with the window of each tensor's format shaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from precision_lab import formats
from precision_lab.formats import Format
from precision_lab.telemetry.reading import Reading, window

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from precision_lab.telemetry.observation import Observation

_NORMAL, _SUBNORMAL, _BAR = "#bfdfc4", "#f2dfb0", "#34495e"


def plot(observation: Observation, *, roles: Sequence[str] | None = None, fmt: Any = None, columns: int = 3) -> Figure:
    """Returns a matplotlib figure with the exponent histogram of each tensor.

    Shaded green is where the format has full precision, yellow where it has only subnormals. What lies to the left is
    lost, what lies to the right overflows. Zeros, infinities and NaNs are named in the title.

    Args:
      observation: what to draw.
      roles: draw only these roles.
      fmt: shade the window of this format in all panels; None means that of each tensor.
      columns: panels side by side.

    Raises:
      ValueError: nothing has these roles, or `fmt` has no exponents (a block format or a codebook).
    """
    from matplotlib.figure import Figure

    shown = [(mark, reading) for mark, reading in observation if roles is None or mark.role in roles]
    if not shown:
        raise ValueError(f"nothing to draw: none of the {len(observation)} tensors has a role in {roles}.")
    asked = None if fmt is None else formats.format(fmt)
    if asked is not None and not isinstance(asked, Format):
        raise ValueError(f"{asked.name} has no window of exponents: its range depends on the scales.")
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(4 * columns, 2.2 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
    for panel in panels[len(shown) :]:
        panel.set_visible(False)
    for panel, (mark, reading) in zip(panels, shown, strict=False):
        draw_histogram(panel, reading, asked or mark.fmt, f"{mark.site} {mark.role}")
    return figure


def draw_histogram(axes: Axes, reading: Reading, fmt: Any, title: str) -> None:
    """Draws the exponent histogram of one tensor over the window of a format, as shares of all elements."""
    binades = reading.binades
    if isinstance(fmt, Format):
        seen = window(fmt)
        axes.axvspan(seen.lowest - 0.5, seen.normal - 0.5, color=_SUBNORMAL, lw=0)
        axes.axvspan(seen.normal - 0.5, seen.top + 0.5, color=_NORMAL, lw=0)
    axes.bar(list(binades), [n / reading.count for n in binades.values()], width=1.0, color=_BAR)
    special = [f"{n} {name}" for name, n in (("inf", reading.infs), ("NaN", reading.nans)) if n]
    if reading.zeros:
        special.insert(0, f"{100 * reading.zeros / reading.count:.3g}% zero")
    axes.set_title("\n".join([title, ", ".join([fmt.name, *special])]), fontsize=8)
    axes.set_xlabel("exponent of 2", fontsize=7)
    axes.tick_params(labelsize=7)

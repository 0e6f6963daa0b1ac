"""A heat map of sites by policies that can be read without colour: each cell has its number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LABELS = {
    "one_on_db": "SQNR of the output in dB, this site alone quantized",
    "one_off_db": "SQNR of the output in dB, all but this site quantized",
    "local_db": "SQNR of the site's own output in dB",
    "one_on_loss": "loss, this site alone quantized",
    "one_off_loss": "loss, all but this site quantized",
}
_MAP = "cividis"  # its lightness rises evenly, so it survives grey print and colour-blind eyes


def heat_map(
    values: Sequence[Sequence[float]], sites: Sequence[str], policies: Sequence[str], show: str, title: str
) -> Figure:
    """Returns a figure with a cell for each site and policy; the darker one is the worse one.

    Infinite values, which have no shade, are white: "=" where nothing differs, "overflow" where that is the reason.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    cells = np.ma.masked_invalid(np.asarray(values, float).reshape(len(sites), len(policies)))
    colours = mpl.colormaps[_MAP if show.endswith("_db") else f"{_MAP}_r"]
    names = [name.replace(",", ",\n").replace(";", ";\n") for name in policies]
    lines = [line for name in names for line in name.split("\n")]
    width = 2.2 + 0.075 * max(map(len, sites)) + max(0.8, 0.09 * max(map(len, lines))) * len(policies)
    height = 1.2 + 0.3 * len(sites) + 0.15 * max(name.count("\n") for name in names)
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(cells, cmap=colours, aspect="auto")
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            ink = _ink(image.to_rgba(cells)[i, j]) if math.isfinite(value) else "black"
            axes.text(j, i, _written(value), ha="center", va="center", fontsize=8, color=ink)
    axes.set_yticks(range(len(sites)), sites, fontsize=8)
    axes.set_xticks(range(len(policies)), names, fontsize=8)
    axes.set_title(title, fontsize=9)
    # On two lines and small, since a map of few sites is low.
    figure.colorbar(image).set_label(_LABELS[show].replace(", ", ",\n"), fontsize=8)
    return figure


def _written(value: float) -> str:
    """Writes the value of a cell."""
    if math.isfinite(value):
        return f"{value:.1f}" if abs(value) >= 10 else f"{value:.3g}"
    return "=" if value == math.inf else "overflow"


def _ink(colour: Sequence[float]) -> str:
    """Returns black or white, whichever can be read on a colour; by the lightness of Rec. 709."""
    red, green, blue = colour[:3]
    return "black" if 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.45 else "white"

"""Drawing: one style for all plots, as SVG text that stands inline in a page that fetches nothing.

Arms differ by colour and by dash pattern, so that a plot survives a black-and-white printer and colour-blind eyes.
"""

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

# Source: Okabe and Ito, "Color Universal Design", 2008. Their yellow is left out: too pale for a line on white.
# Okabe and Ito's palette, then Paul Tol's muted one for experiments with many arms.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
COLOURS += ("#882255", "#999933", "#332288", "#44AA99", "#AA4499", "#117733", "#DDCC77")
# Only the first arm is solid, and lies beneath the others: dashes on top of it show where curves coincide.
DASHES = ((0, (5, 1.5)), (0, (1.2, 1.2)), (0, (6, 1.5, 1.2, 1.5)), (0, (9, 3)), (0, (3, 1, 1, 1, 1, 1)), (0, (2, 3)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
WIDTH = 9.2
INK, GRID = "#1f2328", "#d8dee4"
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 9.5, "svg.fonttype": "none",
    "text.color": INK, "axes.labelcolor": INK, "xtick.color": "#57606a", "ytick.color": "#57606a",
    "axes.edgecolor": "#8c959f", "axes.linewidth": 0.8, "axes.spines.top": False, "axes.spines.right": False,
    "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.7, "axes.axisbelow": True, "axes.titlesize": 10.5,
    "axes.titleweight": "bold", "axes.titlelocation": "left", "legend.frameon": False, "lines.linewidth": 1.6,
    "axes.unicode_minus": True, "axes.formatter.use_mathtext": False,
}  # fmt: skip


@contextmanager
def figure_of(rows: int, columns: int, height: float, name: str) -> Iterator[tuple["Figure", list["Axes"]]]:
    """Gives a figure in our style that leaves the settings of the caller's own plots alone."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with mpl.rc_context({**STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.subplots(rows, columns, squeeze=False)
        yield figure, list(axes.flat)


def svg_of(figure: "Figure", title: str) -> str:
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


_NAMESPACES = 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'


class Picture:
    """A figure that shows in a notebook and can be saved; `figure` is matplotlib's own."""

    def __init__(self, figure: "Figure", title: str) -> None:
        """Draws the figure once, in our style."""
        self.figure = figure
        self.title = title
        self.svg = svg_of(figure, title)

    def save(self, path: str | Path) -> Path:
        """Writes the figure and returns where: .svg, or what else matplotlib knows, such as .png and .pdf.

        Raises:
          ValueError: the file has another suffix, or none.
        """
        import matplotlib as mpl
        from matplotlib.backend_bases import FigureCanvasBase

        path = Path(path)
        known = sorted(f".{name}" for name in FigureCanvasBase.get_supported_filetypes())
        if path.suffix.lower() not in known:
            raise ValueError(f"{path}: a picture is saved as one of {', '.join(known)}, got {path.suffix!r}.")
        if path.suffix == ".svg":
            path.write_text(self.svg.replace("<svg", f"<svg {_NAMESPACES}", 1), encoding="utf-8")
        else:
            with mpl.rc_context(STYLE):
                self.figure.savefig(path, dpi=200)
        return path

    def _repr_html_(self) -> str:
        """Shows the figure in a notebook."""
        return self.svg

    def __repr__(self) -> str:
        return f"Picture({self.title!r})"


def plain_log_ticks(axis: "Axis") -> None:
    """Labels a logarithmic axis at 1, 2 and 5 of each decade, as plain numbers that do not run into each other."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())

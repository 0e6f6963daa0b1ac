"""The result table for a paper: LaTeX with booktabs, best means in bold."""

import re
from typing import TYPE_CHECKING

from precision_lab.runner.ranking import best_arms, bits_differ, bits_text
from precision_lab.runner.summary import command

if TYPE_CHECKING:
    from precision_lab.runner.results import Results
    from precision_lab.runner.rows import Cell, Row

_SPECIAL = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_SPECIAL |= {char: f"\\{char}" for char in "&%$#_{}"}


def table(results: "Results") -> str:
    """Returns a `table` environment that needs the package booktabs."""
    experiment = results.experiment
    bits = bits_differ(results)
    best = {metric: best_arms(results, metric) for metric in experiment.columns}
    heads = ["Arm", *(["Bits"] if bits else []), *(escape(name) for name in experiment.columns)]
    lines = [
        r"\begin{table}", r"  \centering", f"  % {command(results, with_out=False)}",
        rf"  \begin{{tabular}}{{l{'r' * (len(heads) - 1)}}}", r"    \toprule",
        f"    {' & '.join(heads)} \\\\", r"    \midrule",
    ]  # fmt: skip
    lines += [f"    {' & '.join(_cells(results, row, best, bits=bits))} \\\\" for row in results.rows]
    seeds = f"{len(experiment.seeds)} seed{'s' if len(experiment.seeds) != 1 else ''}"
    caption = f"{escape(experiment.name)}: mean over {seeds} $\\pm$ half of its 95\\,\\% interval (Student)."
    lines += [r"    \bottomrule", r"  \end{tabular}", rf"  \caption{{{caption}}}", r"\end{table}"]
    return "\n".join(lines) + "\n"


def _cells(results: "Results", row: "Row", best: dict[str, set[str]], *, bits: bool) -> list[str]:
    """Returns one arm; what did not finish is shown, not left out."""
    means = [_mean(cell, bold=row.arm in best[metric]) for metric, cell in row.cells.items()]
    note = f" ({escape(row.trouble_text())})" if row.troubles else ""
    return [escape(row.arm) + note, *([bits_text(results.bits[row.arm])] if bits else []), *means]


def _mean(cell: "Cell", *, bold: bool) -> str:
    """Returns a mean in mathematics, a cross where it is missing, nothing where the arm does not log it."""
    if cell.mean is None:
        return r"$\times$" if cell.expected else ""
    text = re.sub(r"e([-+])0*(\d+)", _power, cell.mean.text().replace("±", r"\pm"))
    if "nan" in text or "inf" in text:
        return text
    return rf"$\mathbf{{{text}}}$" if bold else f"${text}$"


def _power(exponent: re.Match[str]) -> str:
    """Returns `e-05` as mathematics."""
    return rf" \times 10^{{{exponent[1].removeprefix('+')}{exponent[2]}}}"


def escape(text: str) -> str:
    """Returns text in which no character is a command of LaTeX's."""
    return "".join(_SPECIAL.get(char, char) for char in text)

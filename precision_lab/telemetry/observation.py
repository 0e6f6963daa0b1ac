"""Observation: the statistics of the marked values of a program, as a pytree that prints as a table."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax

from precision_lab.rewrite import Mark
from precision_lab.rewrite.printing import table_text
from precision_lab.telemetry.reading import Reading
from precision_lab.telemetry.statistics import TensorStats, merge


@functools.partial(jax.tree_util.register_dataclass, data_fields=["stats"], meta_fields=["marks", "rounded"])
class Observation:
    """The statistics of what was observed, in the order of execution.

    It is a pytree of the statistics alone, so it leaves jit, is carried by scans and merged there.

    Attributes:
      marks: site, role and format of each tensor.
      stats: the statistics of each.
      rounded: whether the errors of rounding to the formats were measured.
    """

    def __init__(self, stats: Sequence[TensorStats], marks: Sequence[Mark], rounded: bool) -> None:
        self.stats = tuple(stats)
        self.marks = tuple(marks)
        self.rounded = rounded

    def __len__(self) -> int:
        return len(self.marks)

    def __iter__(self) -> Iterator[tuple[Mark, Reading]]:
        """Yields (mark, reading) in the order of execution."""
        for mark, stats in zip(self.marks, jax.device_get(self.stats), strict=True):
            yield mark, Reading(stats, mark.fmt, self.rounded)

    def __getitem__(self, key: tuple[str, str]) -> Reading:
        """Returns the reading of (site, role).

        Raises:
          KeyError: there is none; the message has the nearest names.
        """
        for mark, reading in self:
            if (mark.site, mark.role) == tuple(key):
                return reading
        known = ", ".join(f"({mark.site!r}, {mark.role!r})" for mark in self.marks[:8])
        raise KeyError(f"nothing observed at {key}; there are {known}{' ...' if len(self) > 8 else ''}")

    @property
    def sites(self) -> list[str]:
        """The names of the sites, each once, in the order of execution."""
        return list(dict.fromkeys(mark.site for mark in self.marks))

    def merged(self, other: Observation) -> Observation:
        """Returns the statistics of both, of the same program.

        Raises:
          ValueError: they are of different programs.
        """
        if (self.marks, self.rounded) != (other.marks, other.rounded):
            raise ValueError("only observations of the same program can be merged; these have different sites.")
        return Observation(
            [merge(a, b) for a, b in zip(self.stats, other.stats, strict=True)], self.marks, self.rounded
        )

    def first_nonfinite(self) -> tuple[str, str] | None:
        """Returns (site, role) of the first tensor, in the order of execution, that was not finite; None if all were.

        If that is an operand, the cause lies between this site and the one before; if an output, in the product.
        """
        return next(((mark.site, mark.role) for mark, reading in self if reading.nonfinite), None)

    def to_dicts(self) -> list[dict[str, Any]]:
        """Returns one plain dictionary per tensor."""
        return [
            {"site": mark.site, "role": mark.role, "format": mark.fmt.name, **reading.to_dict()}
            for mark, reading in self
        ]

    def frame(self) -> Any:
        """Returns the table as a pandas DataFrame.

        Raises:
          ImportError: pandas is not installed.
        """
        try:
            import pandas as pd  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError("observe(...).frame() needs pandas: pip install 'precision-lab[notebook]'.") from error
        return pd.DataFrame(self.to_dicts())

    def plot(self, **options: Any) -> Any:
        """Returns a matplotlib figure of the exponent histograms; see `precision_lab.telemetry.pictures.plot`."""
        from precision_lab.telemetry.pictures import plot

        return plot(self, **options)

    def __str__(self) -> str:
        from rich.table import Table

        columns = ("amax", "rms", "zero", "below", "flushed", "beyond", "inf/nan", "SQNR dB", "exponents")
        table = Table("site", "tensor", "format", *columns)
        for row, (_, reading) in zip(self.to_dicts(), self, strict=True):
            shares = [_percent(row.get(name)) for name in ("zero", "below", "flushed", "beyond")]
            bad = f"{row['infs']}/{row['nans']}" if row["infs"] or row["nans"] else "yes" if row["nonfinite"] else ""
            sizes = (f"{row['amax']:.3g}", f"{row['rms']:.3g}")
            noise = f"{row['sqnr_db']:.1f}" if self.rounded else ""
            table.add_row(row["site"], row["role"], row["format"], *sizes, *shares, bad, noise, reading.sparkline())
        return table_text(table, width=180)

    __repr__ = __str__


def _percent(share: float | None) -> str:
    """Writes a share, leaving out what is none."""
    return f"{100 * share:.3g}%" if share else ""

"""Scores: what `sensitivity` returns, the damage that each policy does at each site, and the bytes it saves there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from precision_lab.policy import Policy
from precision_lab.rewrite import SiteTable
from precision_lab.rewrite.printing import table_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DECIBELS = ("one_on_db", "one_off_db", "local_db")
LOSSES = ("one_on_loss", "one_off_loss")


@dataclass(frozen=True)
class Score:
    """The damage of one policy at one site.

    An error is the power of the difference from the reference over the power of the reference, summed over all batches;
    0 where nothing differs, infinite where something overflowed.

    Attributes:
      site, policy: their names.
      one_on_error: error of the model's output with this site alone under the policy, the others under the reference.
      one_off_error: error of the output with this site alone under the reference, the others under the policy.
      local_error: error of the site's own output, from the operands of the reference.
      one_on_loss, one_off_loss: the loss in these two cases; None without a loss.
    """

    site: str
    policy: str
    one_on_error: float
    one_off_error: float
    local_error: float
    one_on_loss: float | None = None
    one_off_loss: float | None = None

    @property
    def one_on_db(self) -> float:
        """SQNR of the output with this site alone under the policy, in dB."""
        return decibels(self.one_on_error)

    @property
    def one_off_db(self) -> float:
        """SQNR of the output with all sites but this one under the policy, in dB."""
        return decibels(self.one_off_error)

    @property
    def local_db(self) -> float:
        """SQNR of the site's own output, in dB."""
        return decibels(self.local_error)


@dataclass(frozen=True)
class Cost:
    """What one parameter takes.

    Attributes:
      path: its path.
      sites: the sites that use it.
      elements: number of its elements.
      nbytes: its bytes, as `convert` stores it, under the reference and then under each policy.
      why_not: why it is not stored quantized where that policy quantizes it, likewise; empty where it is.
    """

    path: str
    sites: tuple[str, ...]
    elements: int
    nbytes: tuple[int, ...]
    why_not: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sensitivity(Sequence[Score]):
    """Scores by site, in program order, and by policy. Prints as a table.

    Attributes:
      rows: the scores.
      names: the reference and the policies, as they were given.
      policies: the same, parsed, without what they say of backward passes.
      whole: (error, loss) of the output with every site under each of `names`; the loss is None without one.
      costs: the parameters at these sites.
      tables: the sites under each of `names`.
      kept: sites that always follow the reference: inside custom derivatives and the like.
    """

    rows: tuple[Score, ...]
    names: tuple[str, ...]
    policies: tuple[Policy, ...]
    whole: tuple[tuple[float, float | None], ...]
    costs: tuple[Cost, ...]
    tables: tuple[SiteTable, ...]
    kept: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    @property
    def sites(self) -> list[str]:
        """The sites, once each, in program order."""
        return list(dict.fromkeys(row.site for row in self.rows))

    @property
    def has_loss(self) -> bool:
        """Whether losses were measured."""
        return self.whole[0][1] is not None

    def at(self, site: str, policy: Any) -> Score:
        """Returns the score of a policy at a site.

        Raises:
          KeyError: there is none.
        """
        for row in self.rows:
            if (row.site, row.policy) == (site, str(policy)):
                return row
        known = f"sites are {', '.join(self.sites)}; policies, as they were given, {', '.join(self.names[1:])}"
        raise KeyError(f"no site '{site}' under policy '{policy}'; {known}.")

    def ranking(self, policy: Any = None) -> list[str]:
        """Returns the sites from the most to the least sensitive: by the one-on error, added up over the policies.

        Args:
          policy: rank by this policy alone.

        Raises:
          KeyError: it is none of the table's.
        """
        names = self.names[1:] if policy is None else (str(policy),)
        damage = {site: sum(self.at(site, name).one_on_error for name in names) for site in self.sites}
        return sorted(damage, key=lambda site: -damage[site])

    def to_dicts(self) -> list[dict[str, Any]]:
        """Returns one plain dictionary per row."""
        keys = ("site", "policy", *DECIBELS, *(LOSSES if self.has_loss else ()))
        return [{key: getattr(row, key) for key in keys} for row in self.rows]

    def frame(self) -> Any:
        """Returns the table as a pandas DataFrame.

        Raises:
          ImportError: pandas is not installed.
        """
        try:
            import pandas as pd  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError(
                "sensitivity(...).frame() needs pandas: pip install 'precision-lab[notebook]'."
            ) from error
        return pd.DataFrame(self.to_dicts())

    def heat_map(self, show: str = "one_on_db") -> Figure:
        """Returns a matplotlib figure of sites by policies, each cell with its number and a shade that says the same.

        Args:
          show: "one_on_db", "one_off_db" or "local_db"; with a loss also "one_on_loss" or "one_off_loss".

        Raises:
          ValueError: `show` is none of these.
        """
        from precision_lab.ptq.heat_map import heat_map

        known = (*DECIBELS, *(LOSSES if self.has_loss else ()))
        if show not in known:
            raise ValueError(f"show={show!r} must be one of {', '.join(known)}.")
        values = [[getattr(self.at(site, name), show) for name in self.names[1:]] for site in self.sites]
        return heat_map(values, self.sites, self.names[1:], show, f"against {self.names[0]}")

    def __str__(self) -> str:
        from rich.table import Table

        columns = ["one-on dB", "one-off dB", "local dB", *(["one-on loss", "one-off loss"] if self.has_loss else [])]
        loss = f", loss {self.whole[0][1]:.4g}" if self.has_loss else ""
        table = Table("site", "policy", *columns, title=f"sensitivity against {self.names[0]}{loss}")
        for row in self.rows:
            losses = [f"{getattr(row, key):.4g}" for key in LOSSES] if self.has_loss else []
            table.add_row(row.site, row.policy, *(f"{getattr(row, key):.1f}" for key in DECIBELS), *losses)
        return table_text(table, width=160)


def decibels(error: float) -> float:
    """Returns the SQNR of a relative error, in dB: infinite for none."""
    if error == 0:
        return math.inf
    return -10 * math.log10(error) if math.isfinite(error) else -math.inf

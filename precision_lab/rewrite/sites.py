"""Sites: the operations that a policy can act on, under names that everything else uses too."""

from __future__ import annotations

import dataclasses
import io
import re
from collections.abc import Iterator, Sequence
from typing import Any

from precision_lab.formats import Format


@dataclasses.dataclass(frozen=True)
class Site:
    """One product that a policy can act on, and what the policy makes of it.

    Attributes:
      path: path of the parameter that is an operand ("blocks/0/att/query/kernel"), else the name scopes.
      op: primitive, "dot_general" or "conv_general_dilated".
      index: counts the sites of the same path and op, in program order.
      has_parameter: whether `path` is a parameter's.
      lhs, rhs, out: shape and dtype of operands and result as the model has them, such as "bfloat16[8,128]".
      flops: multiplications and additions of one execution, forward.
      compute, accum: formats under the policy; None where the site is left alone.
      reason: why the site is left alone; empty where it is not.
    """

    path: str
    op: str
    index: int
    has_parameter: bool
    lhs: str
    rhs: str
    out: str
    flops: int
    compute: Format | None = None
    accum: Format | None = None
    reason: str = ""

    @property
    def name(self) -> str:
        """The path alone for the only product of a parameter, else `path:op#index`."""
        return self.path if self.has_parameter and self.index == 0 else self.full_name

    @property
    def full_name(self) -> str:
        """`path:op#index`, which every site has."""
        return f"{self.path}:{self.op}#{self.index}"


@dataclasses.dataclass(frozen=True)
class SiteTable(Sequence[Site]):
    """The sites of a function or model under a policy, in program order. Prints as a table."""

    sites: tuple[Site, ...]
    policy: str

    def __len__(self) -> int:
        return len(self.sites)

    def __getitem__(self, index: Any) -> Any:
        return self.sites[index]

    def __iter__(self) -> Iterator[Site]:
        return iter(self.sites)

    @property
    def untouched(self) -> tuple[Site, ...]:
        """The sites that the policy did not reach, each with its reason."""
        return tuple(site for site in self.sites if site.reason)

    def to_dicts(self) -> list[dict[str, Any]]:
        """Returns one plain dictionary per site, formats by name."""
        return [_to_dict(site) for site in self.sites]

    def frame(self) -> Any:
        """Returns the table as a pandas DataFrame.

        Raises:
          ImportError: pandas is not installed.
        """
        try:
            import pandas as pd  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError("sites(...).frame() needs pandas: pip install 'precision-lab[notebook]'.") from error
        return pd.DataFrame(self.to_dicts())

    def __str__(self) -> str:
        from rich.console import Console
        from rich.table import Table

        table = Table("site", "operation", "operands", "Mflop", "compute", "accum", title=f"policy {self.policy}")
        for site in self.sites:
            formats = (
                (site.reason, "") if site.compute is None else (site.compute.name, getattr(site.accum, "name", ""))
            )
            table.add_row(site.name, site.op, f"{site.lhs} {site.rhs}", f"{site.flops / 1e6:.3g}", *formats)
        stream = io.StringIO()
        Console(file=stream, width=160).print(table)
        return stream.getvalue()


def _to_dict(site: Site) -> dict[str, Any]:
    """Flattens a site, formats by name."""
    row = dataclasses.asdict(dataclasses.replace(site, compute=None, accum=None))
    formats = {key: None if (fmt := getattr(site, key)) is None else fmt.name for key in ("compute", "accum")}
    return {"name": site.name, **row, **formats}


def clean_scope(scope: str, root: str = "") -> str:
    """Returns the module path in a name stack: transformation wrappers, repeats of the root and empty parts removed.

    `transpose(jvp(Net))/block/up` is `block/up` for the root class `Net`, as is `Net/rematted_computation/block/up`;
    a method is named after its module (`embedder.decode` is `embedder`), and an einsum's subscripts are no module.
    """
    scope = re.sub(r"\b(?:jvp|transpose|vmap)\(|\)", "", scope)
    parts = [part.split(".")[0] for part in scope.split("/")]
    return "/".join(
        part for part in parts if part not in ("", "rematted_computation", "checkpoint", root) and "->" not in part
    )

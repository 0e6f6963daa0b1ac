"""Sites: the operations that a policy can act on, under names that everything else uses too."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from precision_lab.formats import Format
from precision_lab.policy import Accumulator, Treatment
from precision_lab.policy.treatment import SETTINGS
from precision_lab.rewrite.printing import table_text

FULL_PRECISION = "full_precision"  # name scope of the regions that policies leave alone
PRODUCTS = frozenset(("dot_general", "conv_general_dilated"))
# Keys that the column "settings" shows; `compute` and `accum` have columns of their own.
_OF_PRODUCTS = tuple(key for key in SETTINGS if key not in ("compute", "accum", "embedding"))
_OF_OTHERS = ("op", "round", "embedding")


@dataclasses.dataclass(frozen=True)
class Site:
    """One operation that a policy can act on, and what the policy makes of it.

    Attributes:
      path: path of the parameter that is an operand ("blocks/0/att/query/kernel"), else the name scopes.
      op: primitive, such as "dot_general" or "conv_general_dilated".
      index: counts the sites of the same path and op, in program order.
      has_parameter: whether `path` is a parameter's.
      operands: shape and dtype of each operand as the model has it, such as "bfloat16[8,128]".
      out: the same of the result.
      flops: multiplications and additions of one execution, forward; 0 for what is not a product.
      treatment: what the policy makes of it; None where the site is left alone.
      reason: why the site is left alone; empty where it is not.
      quantized_by: the setting that quantizes each operand: "weight", "activation", "attention" or "embedding".
      label: of a function with rules of its own its name and count, such as "relu#0"; empty for all else.
      module: type names of the modules around it, outermost first ("GPT/EncoderBlock/LayerNorm"); empty in functions.
    """

    path: str
    op: str
    index: int
    has_parameter: bool
    operands: tuple[str, ...]
    out: str
    flops: int
    treatment: Treatment | None = None
    reason: str = ""
    label: str = ""
    module: str = ""
    quantized_by: tuple[str, ...] = ()

    @property
    def lhs(self) -> str:
        """Shape and dtype of the first operand; empty where there is none."""
        return "".join(self.operands[:1])

    @property
    def rhs(self) -> str:
        """Shape and dtype of the second operand; empty where there is none."""
        return "".join(self.operands[1:2])

    @property
    def is_product(self) -> bool:
        """Whether this is a matrix product or a convolution."""
        return self.op in PRODUCTS

    @property
    def compute(self) -> Format | None:
        """Format of a product's operands; None where the site is left alone or is no product."""
        return self.treatment.compute if self.treatment and self.is_product else None

    @property
    def accum(self) -> Accumulator | None:
        """What a product accumulates in; None where the site is left alone or is no product."""
        return self.treatment.accum if self.treatment and self.is_product else None

    @property
    def settings(self) -> str:
        """What else the policy says here, such as `weight=int4@group32`; the reason where it says nothing."""
        if self.treatment is None:
            return self.reason
        default = Treatment()
        given = {key: getattr(self.treatment, key) for key in (_OF_PRODUCTS if self.is_product else _OF_OTHERS)}
        return ",".join(f"{k}={SETTINGS[k].show(v)}" for k, v in given.items() if v != getattr(default, k))

    @property
    def name(self) -> str:
        """The path alone for the only product of a parameter that has one, else `path:op#index`."""
        alone = self.path and self.has_parameter and self.is_product and self.index == 0
        return self.path if alone else self.full_name

    @property
    def full_name(self) -> str:
        """`path:op#index`, or `path:label` where there is one; every site has it."""
        return f"{self.path}:{self.label or self._count}"

    @property
    def _count(self) -> str:
        return f"{self.op}#{self.index}"

    @property
    def names(self) -> tuple[str, ...]:
        """What a rule's pattern may match: path, names, and the types of the modules around it as `@Type`.

        A function goes by its primitive too: `**:custom_jvp_call#*` matches all that have derivatives of their own.
        """
        types = self.module.split("/") if self.module else ()
        by_op = (f"{self.path}:{self._count}",) if self.label else ()
        return (self.path, self.name, self.full_name, *by_op, *(f"@{name}" for name in types))


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
        from rich.table import Column, Table

        columns = ("site", "operation", "operands", "Mflop", "compute", "accum")
        table = Table(*columns, Column("settings", overflow="fold"), title=f"policy {self.policy}")
        for site in self.sites:
            formats = (site.compute.name, str(site.accum)) if site.compute else ("", "")
            mflop = f"{site.flops / 1e6:.3g}" if site.is_product else ""
            table.add_row(site.name, site.op, " ".join(site.operands), mflop, *formats, site.settings)
        return table_text(table, width=160)


def _to_dict(site: Site) -> dict[str, Any]:
    """Flattens a site, formats by name; `op` is the primitive's, and the setting of that name is the `category`."""
    row = {field.name: getattr(site, field.name) for field in dataclasses.fields(site) if field.name != "treatment"}
    treatment = (
        {} if site.treatment is None else {k: show.show(getattr(site.treatment, k)) for k, show in SETTINGS.items()}
    )
    settings = {"category" if key == "op" else key: treatment.get(key) for key in SETTINGS}
    return {"name": site.name, **row, **settings}


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


def module_types(path: str, types: Mapping[str, str]) -> str:
    """Returns the type names of the modules that a path leads through, outermost first.

    Args:
      path: of a site.
      types: the type name of each module by its path, the root's being empty.
    """
    parts = path.split("/")
    prefixes = ["/".join(parts[:n]) for n in range(len(parts) + 1)]
    return "/".join(types[prefix] for prefix in dict.fromkeys(prefixes) if prefix in types)

"""Steps: what a plan says to do at each equation of a jaxpr."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from precision_lab.formats import Format, FormatParams
from precision_lab.policy import Treatment
from precision_lab.quant import Quantizer
from precision_lab.rewrite import _compat
from precision_lab.rewrite.adapters import Adapter
from precision_lab.rewrite.cast import Casting
from precision_lab.rewrite.operations import Operate
from precision_lab.rewrite.quantized import NOTHING_GIVEN
from precision_lab.rewrite.scaled import Amaxes


@dataclasses.dataclass(frozen=True)
class Cast:
    """A product whose operands are to be cast or quantized.

    Attributes:
      treatment: what the policy says.
      casting: how the product is computed.
      before: quantizer of each operand before the product; None where none has one.
      of_tangents: whether an operand may be a tangent, in which the product will be transposed.
      site: name of the site.
      amaxes: what scales are made of that come from outside, or None.
      given: of each operand, what its quantizer is not to find itself: a `Given`, or a `Held` state.
      adapter: which operand has an adapter, and that; or None.
      compute: numbers of the compute format, which may be traced, in place of its own; or None.
    """

    treatment: Treatment
    casting: Casting
    before: tuple[Any, Any] | None
    of_tangents: bool
    site: str = ""
    amaxes: Amaxes | None = None
    given: tuple[Any, Any] = (NOTHING_GIVEN, NOTHING_GIVEN)
    adapter: tuple[int, Adapter] | None = None
    compute: FormatParams | None = None


@dataclasses.dataclass(frozen=True)
class Lookup:
    """A lookup of rows of a parameter that is quantized: an embedding.

    Attributes:
      quantizer: how each row, or the whole table, is quantized.
      site: name of the site.
      given: what the quantizer is not to find itself, likewise.
    """

    quantizer: Quantizer
    site: str
    given: Any = NOTHING_GIVEN


@dataclasses.dataclass(frozen=True)
class Chosen:
    """A product or lookup that happens in one of several ways.

    Attributes:
      site: name of the site.
      steps: the ways.
      index: number of the one that is taken, int32 scalar, traced or not.
    """

    site: str
    steps: tuple[Cast | Lookup | None, ...]
    index: Any


@dataclasses.dataclass(frozen=True)
class Observed:
    """A product whose operands and result get marks.

    Attributes:
      site: name of the site.
      step: what happens at it.
      operands: formats of the two; None where they are left alone, or scaled to fit by a quantizer.
      cotangent: the same of the cotangent.
      shadows: what would happen at it under other policies; evaluated for comparison, from the same operands.
    """

    site: str
    step: Cast | Lookup | None
    operands: tuple[Format | None, Format | None]
    cotangent: Format | None
    shadows: tuple[Cast | Lookup | None, ...] = ()


@dataclasses.dataclass(frozen=True)
class Enter:
    """An equation with something to do inside.

    Attributes:
      plans: one per inner jaxpr.
      replan: plans a jaxpr that stands in for the equation's own, such as a derivative rule's, under the same names.
      is_activation: whether its result returns to the type of its operand.
      is_over_layers: whether it is a scan that slices parameters, so that each iteration has quantizers of its own.
      round: format that the results and their cotangents are rounded to, or None.
    """

    plans: tuple[Plan, ...]
    replan: Callable[[Any, _compat.Part], Plan]
    is_activation: bool = False
    is_over_layers: bool = False
    round: Format | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What to do at each equation of a jaxpr; None binds it as it stands."""

    steps: tuple[Cast | Lookup | Operate | Chosen | Observed | Enter | None, ...]

    @property
    def is_empty(self) -> bool:
        """Whether the jaxpr can be evaluated as it stands."""
        return not any(self.steps)

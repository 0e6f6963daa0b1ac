"""Provenance: what a value was computed from, as far as policies ask: a parameter, constants, or data.

It is the path of a parameter if no data had a part in the value, `CONSTANT` if no parameter had one either, `FLAGS` for
zeros and ones that data decided, `NEVER_NEGATIVE` for data of one sign, such as a ReLU's, and None for all other data.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from precision_lab.quant import Quantizer
from precision_lab.rewrite import _compat
from precision_lab.rewrite.marks import MARKED

LAYOUT = frozenset(
    ["reshape", "transpose", "broadcast_in_dim", "squeeze", "expand_dims", "slice", "dynamic_slice", "rev", "copy"]
) | {"copy_p", "convert_element_type", "sharding_constraint", "optimization_barrier", "reduce_precision", MARKED}
CONSTANT, FLAGS, NEVER_NEGATIVE = object(), object(), object()
_DATA = (None, FLAGS, NEVER_NEGATIVE)
_POSITIVE = ("exp", "logistic", "abs", "square")
_KEEP_SIGN = frozenset(
    ["add", "mul", "div", "min", "reduce_sum", "reduce_max", "reduce_window_sum", "reduce_window_max", "concatenate"]
)
_MASKING = ("mul", "select_n")
Origins = list[Any]


class Masked(str):
    """The path of a parameter some of whose values an array of constants may have made zero."""

    __slots__ = ()


def captured(aval: Any, *, may_be_data: bool) -> Any:
    """Returns the provenance of a captured array: masks and scalars are nobody's data, all else may be a batch."""
    return None if may_be_data and aval.dtype != np.bool_ and aval.ndim else CONSTANT


def is_path(source: Any) -> bool:
    """Returns whether a provenance is a parameter's path."""
    return isinstance(source, str)


def of_results(eqn: Any, sources: Sequence[Any]) -> Any:
    """Returns the provenance of the results of an operation that is neither a product nor entered."""
    name = eqn.primitive.name
    if name == "convert_element_type" and sources[0] is None and eqn.invars[0].aval.dtype == np.bool_:
        return FLAGS
    if name in LAYOUT:
        return sources[0]
    found = combined(sources)
    if found is None and _is_never_negative(eqn, sources):
        return NEVER_NEGATIVE
    masks = (atom for atom, source in zip(eqn.invars, sources, strict=True) if source is CONSTANT)
    if name in _MASKING and is_path(found) and any(not _compat.is_literal(m) and m.aval.ndim for m in masks):
        return Masked(found)
    return found


def combined(sources: Sequence[Any]) -> Any:
    """Returns the provenance of what is computed from these: a parameter's path if no data has a part in it."""
    if any(source is data for source in sources for data in _DATA):
        return None
    paths = [source for source in sources if is_path(source)]
    path = paths[0] if paths else CONSTANT
    return Masked(path) if any(isinstance(one, Masked) for one in paths) else path


def _is_never_negative(eqn: Any, sources: Sequence[Any]) -> bool:
    """Returns whether an operation gives nothing below zero, as far as its name and its operands tell."""
    name, pairs = eqn.primitive.name, list(zip(eqn.invars, sources, strict=True))
    positive = [source is NEVER_NEGATIVE or _is_positive_literal(atom) for atom, source in pairs]
    return name in _POSITIVE or (name == "max" and any(positive)) or (name in _KEEP_SIGN and all(positive))


def _is_positive_literal(atom: Any) -> bool:
    """Returns whether an operand is a number that is written into the equation and not below zero."""
    return _compat.is_literal(atom) and np.ndim(atom.val) == 0 and bool(atom.val >= 0)


def sees_one_sign(source: Any, quantizer: Quantizer | None) -> bool:
    """Returns whether the signs that a quantizer takes are all the same."""
    binary = quantizer is not None and quantizer.format.name == "binary" and quantizer.calibration != "centred"
    return binary and source is NEVER_NEGATIVE


def has_zero(quantizer: Quantizer) -> bool:
    """Returns whether zeros stay zero under a quantizer; signs make +1 of them."""
    return quantizer.format.kind != "codebook" or 0 in quantizer.format.levels


def refuse_signs_of_masks(site: str, sources: Sequence[Any], quantizers: Sequence[Quantizer | None]) -> None:
    """Raises ValueError for a weight with a mask whose quantizer would make the zeros +1."""
    for source, quantizer in zip(sources, quantizers, strict=False):
        if isinstance(source, Masked) and quantizer is not None and not has_zero(quantizer):
            raise ValueError(
                f"'{site}' multiplies '{source}' after an array of constants, such as a mask, whose zeros "
                f"weight={quantizer} would make +1: say weight=ternary, or leave it out by a rule, "
                f"'{source}:weight=none'."
            )

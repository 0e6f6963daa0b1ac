"""QuantizerParams: the numbers of a quantizer as a pytree, so that one program serves many bit widths."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from precision_lab.formats import FormatParams
from precision_lab.quant.aciq import clip_ratio
from precision_lab.quant.options import is_integer
from precision_lab.quant.parsing import quantizer
from precision_lab.quant.quantizer import Quantizer


class QuantizerParams(NamedTuple):
    """The numbers of a quantizer, all of which can be traced, stacked and vmapped.

    Attributes:
      format: the format of the codes for `round_to`; None where it cannot be traced (codebooks and blocks), and where
        both this quantizer and the one that takes the numbers are of integers, whose ends say it all.
      low: smallest value of the grid, float32.
      high: largest value of the grid, float32.
      clip: factor of the range found, float32.
      ratio: clip over spread, for the calibrations "aciq" and "aciq_normal", float32.
      strength: of the estimator, float32.
    """

    format: FormatParams | None
    low: Any
    high: Any
    clip: Any
    ratio: Any
    strength: Any


def quantizer_params(spec: Any) -> QuantizerParams:
    """Returns the numbers of a quantizer of a scalar format, for `fake_quantize(..., params=)`.

    Raises:
      ValueError: a codebook or block format, calibration "kl", or an unscaled quantizer; their numbers are structure.
    """
    qz = quantizer(spec)
    if qz.format.kind not in ("int", "float") or qz.calibration == "kl" or not qz.is_scaled:
        raise ValueError(f"the numbers of {qz!r} cannot be traced; scaled scalar formats without 'kl' can.")
    return static_params(qz)._replace(format=qz.code_format.params(overflow="saturate"))


def static_params(qz: Quantizer) -> QuantizerParams:
    """Returns the numbers of a quantizer but for those of its format."""
    fmt = qz.code_format
    low, high = (fmt.element.min, fmt.element.max) if fmt.kind == "block" else (fmt.min, fmt.max)
    ratio = 0.0
    if qz.calibration in ("aciq", "aciq_normal") and is_integer(fmt):
        ratio = clip_ratio(fmt.bits, normal=qz.calibration == "aciq_normal")
    return QuantizerParams(None, *(np.float32(n) for n in (low, high, qz.clip, ratio, qz.strength or 0)))


def stack_quantizers(specs: Iterable[Any]) -> tuple[Quantizer, QuantizerParams]:
    """Returns what quantizers have in common, and their numbers stacked on a new first axis, for `jax.vmap`.

    `jax.vmap(lambda p: fake_quantize(x, common, axis=0, params=p))(params)` is what each of them gives, in order.

    Args:
      specs: quantizers or their strings, which differ in format, clip and strength only; at least one.

    Raises:
      ValueError: none, or quantizers that differ in something else.
    """
    quantizers = [quantizer(spec) for spec in specs]
    if not quantizers:
        raise ValueError("stack_quantizers needs at least one quantizer, got none.")
    first = quantizers[0]
    for qz in quantizers[1:]:
        alike = replace(first, format=qz.format, clip=qz.clip, strength=qz.strength)
        if alike != qz or alike.code_format.signed != first.code_format.signed:
            raise ValueError(f"{first!r} and {qz!r} differ in more than numbers; they need a program each.")
    params = [quantizer_params(qz) for qz in quantizers]
    fmt = FormatParams(*map(np.stack, zip(*(each.format for each in params), strict=True)))  # pyright: ignore
    rest = (np.stack(leaves) for leaves in zip(*(each[1:] for each in params), strict=True))
    return first, QuantizerParams(fmt, *rest)

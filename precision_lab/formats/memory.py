"""Memory arithmetic: what parameters take in a format, and what training them takes. Pure Python, exact.

Bytes are 8 bits and a GB is 10**9 bytes. Codes are packed without gaps, so four bits are half a byte.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from precision_lab.formats.blocks import BlockFormat
from precision_lab.formats.catalogue import format
from precision_lab.formats.codebooks import Codebook
from precision_lab.formats.packing import packed_bytes
from precision_lab.formats.scalar import Format

# State arrays of the shape of the parameters that an optimizer keeps.
OPTIMIZER_SLOTS: Mapping[str, int] = {"sgd": 0, "momentum": 1, "adam": 2}

_SUFFIXES = {"k": 3, "m": 6, "b": 9, "g": 9, "t": 12}
_COUNT = re.compile(r"(\d{1,18}(?:\.\d{0,18})?(?:e\+?\d{1,2})?)([kmbgt]?)")


@dataclass(frozen=True)
class Storage:
    """The bytes that `count` values take in `format`.

    Attributes:
      format: the format of the values.
      count: how many values.
      value_bytes: bytes of the packed codes.
      scale_bytes: bytes of the scales, one per group, or those that a block format has.
    """

    format: Format | BlockFormat | Codebook
    count: int
    value_bytes: int
    scale_bytes: int

    @property
    def total_bytes(self) -> int:
        """Returns the bytes of codes and scales together."""
        return self.value_bytes + self.scale_bytes

    @property
    def bits_per_value(self) -> float:
        """Returns the true bits per value, scales and padding included."""
        return 8 * self.total_bytes / self.count


def storage(count: int, fmt: Any, *, group: int | None = None, scale_format: Any = "float32") -> Storage:
    """Returns what `count` values take in `fmt`.

    Args:
      count: number of values, at least 1.
      fmt: a format or its name; block formats have scales of their own, which are counted.
      group: how many values share one scale; None counts no other scales. A last, smaller group has its scale too.
      scale_format: format of the scales of groups.

    Raises:
      ValueError: `count` or `group` is not positive, a format is unknown, or groups of a block format are wanted.
    """
    fmt, scales = format(fmt), format(scale_format)
    _check_positive("number of values", count)
    if group is None:
        return Storage(fmt, count, _value_bytes(count, fmt), _own_scale_bytes(count, fmt))
    _check_positive("group", group)
    if isinstance(fmt, BlockFormat):
        raise ValueError(f"group={group}: {fmt.name} has scales of its own; leave group out.")
    if not isinstance(scales, Format):
        raise ValueError(f"scale_format={scales.name!r}: scales are floats, integers or fixed point.")
    return Storage(fmt, count, _value_bytes(count, fmt), _value_bytes(-(-count // group), scales))


@dataclass(frozen=True)
class TrainingMemory:
    """The bytes that the state of training takes, activations not included.

    Attributes:
      parameters: the parameters that are trained.
      compute_copy: a copy of them in the compute format, alive during a step; 0 where it is the parameters.
      master: the master copy that the optimizer updates; 0 without one.
      gradients: one gradient per parameter.
      optimizer: the optimizer's state arrays, such as Adam's two moments.
    """

    parameters: int
    compute_copy: int
    master: int
    gradients: int
    optimizer: int

    @property
    def total_bytes(self) -> int:
        """Returns the sum of all parts."""
        return self.parameters + self.compute_copy + self.master + self.gradients + self.optimizer


def training_memory(
    count: int,
    *,
    params: Any = "float32",
    compute: Any | None = None,
    master: Any | None = None,
    gradients: Any | None = None,
    moments: Any | None = None,
    optimizer: str = "adam",
) -> TrainingMemory:
    """Returns what training `count` parameters takes.

    Args:
      count: number of parameters, at least 1.
      params: format the parameters are kept in.
      compute: format the products run in; the copy of all parameters that it needs is an upper bound, since a
        compiler may cast layer by layer. None means that of `params`.
      master: format of master weights; None means there are none.
      gradients: format of the gradients; None means that of `params`.
      moments: format of the optimizer's state; None means that of what it updates, the master if there is one, as
        Optax has it.
      optimizer: one of `OPTIMIZER_SLOTS`.

    Raises:
      ValueError: `count` is not positive, or a format or optimizer is unknown.

    Source: Rajbhandari et al., "ZeRO", 2020, arXiv:1910.02054, section 3.1: float16 parameters and gradients with
      float32 master and Adam moments are 16 bytes per parameter.
    """
    if optimizer not in OPTIMIZER_SLOTS:
        raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZER_SLOTS)}, got {optimizer!r}.")
    _check_positive("number of parameters", count)
    stored = format(params)
    used = stored if compute is None else format(compute)
    updated = stored if master is None else format(master)
    return TrainingMemory(
        parameters=_packed_bytes(count, stored),
        compute_copy=0 if used == stored else _packed_bytes(count, used),
        master=0 if master is None else _packed_bytes(count, updated),
        gradients=_packed_bytes(count, stored if gradients is None else format(gradients)),
        optimizer=OPTIMIZER_SLOTS[optimizer] * _packed_bytes(count, updated if moments is None else format(moments)),
    )


def parse_count(text: str) -> int:
    """Returns a number of parameters: "70e9", "70B", "1.5b", "350M", "12_000" or "12000".

    Raises:
      ValueError: it is no positive whole number.
    """
    match = _COUNT.fullmatch(text.strip().lower().replace("_", "").replace(",", ""))
    value = Fraction(0)
    if match:
        value = Fraction(match[1]) * Fraction(f"1e{_SUFFIXES.get(match[2], 0)}")
    if value < 1 or value.denominator != 1:
        raise ValueError(f"expected a positive number of parameters such as 70e9, 70B or 350M, got {text!r}.")
    return int(value)


def _packed_bytes(count: int, fmt: Format | BlockFormat | Codebook) -> int:
    """Returns the bytes of `count` values with the scales that their format has itself."""
    return _value_bytes(count, fmt) + _own_scale_bytes(count, fmt)


def _value_bytes(count: int, fmt: Format | BlockFormat | Codebook) -> int:
    """Returns the bytes of `count` codes without gaps, the last byte filled up."""
    if isinstance(fmt, Codebook):
        return packed_bytes(count, fmt.bits, per_byte=fmt.packed)
    return packed_bytes(count, fmt.element.bits if isinstance(fmt, BlockFormat) else fmt.storage_bits)


def _own_scale_bytes(count: int, fmt: Format | BlockFormat | Codebook) -> int:
    """Returns the bytes of the scales that belong to a format, as if all its blocks but the last were full."""
    if not isinstance(fmt, BlockFormat):
        return 0
    blocks = -(-count // math.prod(fmt.block))
    shape = (blocks * fmt.block[0], *fmt.block[1:])
    return (fmt.stored_bits(shape) - math.prod(shape) * fmt.element.bits) // 8


def _check_positive(name: str, number: int) -> None:
    """Refuses counts below one."""
    if number < 1:
        raise ValueError(f"{name} must be at least 1, got {number}.")

"""FormatParams: a format as the few unsigned integers the rounding kernel computes with.

They are bit patterns and shift counts in the container's layout (float32, or float64 under x64), a plain pytree
without metadata: formats can be traced, stacked, vmapped and scanned, and one compiled program serves all of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from precision_lab.formats.catalogue import format
from precision_lab.formats.options import check_subnormals, overflow_action
from precision_lab.formats.scalar import Format


@dataclass(frozen=True)
class Layout:
    """How a container keeps its bits; `word` is the unsigned integer of the same size."""

    name: str
    word: type[np.unsignedinteger]
    mantissa_bits: int
    bias: int

    @property
    def sign(self) -> int:
        """Returns the bit pattern of -0."""
        return 1 << (self.word(0).itemsize * 8 - 1)

    @property
    def inf(self) -> int:
        """Returns the bit pattern of +infinity."""
        return (2 * self.bias + 1) << self.mantissa_bits

    @property
    def nan(self) -> int:
        """Returns the bit pattern of the quiet NaN."""
        return self.inf | 1 << (self.mantissa_bits - 1)

    def floor_bits(self, value: Fraction) -> int:
        """Returns the bit pattern of the largest finite container value not above `value` >= 0."""
        step_exponent = self.bias - 1 + self.mantissa_bits
        steps = (value.numerator << step_exponent) // value.denominator
        shift = max(steps.bit_length() - self.mantissa_bits - 1, 0)
        return min((shift << self.mantissa_bits) + (steps >> shift), self.inf - 1)


FLOAT32 = Layout("float32", np.uint32, 23, 127)
FLOAT64 = Layout("float64", np.uint64, 52, 1023)


class FormatParams(NamedTuple):
    """A format for the kernel: every leaf an unsigned integer of the container's width, or an array of them.

    Attributes:
      drop: mantissa bits of the container that the format does not have.
      min_field: exponent field, in the container, of the format's smallest normal number; at least 1.
      max: bits of the largest finite value.
      overflow: bits of what a finite value beyond it becomes.
      infinity: bits of what an infinity becomes.
      smallest: bits of the smallest positive value.
      zero_sign: mask of the sign a zero may keep; all bits, or none where there is no negative zero.
    """

    drop: Any
    min_field: Any
    max: Any
    overflow: Any
    infinity: Any
    smallest: Any
    zero_sign: Any


def make_params(fmt: Format, *, overflow: str | None, subnormals: str, container: Any) -> FormatParams:
    """Returns the parameters of `fmt`; documented at `Format.params`."""
    check_subnormals(subnormals)
    action = overflow_action(fmt, overflow)
    layout = layout_of(container)
    min_field = fmt.min_exponent + layout.bias
    missing = max(fmt.mantissa_bits - layout.mantissa_bits, 0)
    drop = max(layout.mantissa_bits - fmt.mantissa_bits, 0)
    if drop and min_field < 1:
        raise ValueError(
            f"{fmt.name} has normal numbers where {layout.name} has only subnormals, with fewer mantissa bits than "
            f"{layout.name}; such roundings are not exact. Give float64 arrays under jax_enable_x64."
        )
    largest = layout.floor_bits(fmt.magnitude(fmt.max_code))
    beyond = {"saturate": largest, "inf": layout.inf, "nan": layout.nan}
    infinity = action if action == "saturate" else fmt.native_overflow
    words = FormatParams(
        drop=drop,
        min_field=max(min_field - missing, 1),
        max=largest,
        overflow=beyond[action],
        infinity=beyond[infinity],
        smallest=max(layout.floor_bits(fmt.step), 1),
        zero_sign=layout.sign if fmt.has_negative_zero else 0,
    )
    return FormatParams(*(layout.word(word) for word in words))


def layout_of(container: Any) -> Layout:
    """Returns the layout in which arrays of dtype `container` are rounded."""
    dtype = np.dtype(container)
    if dtype == np.float64:
        return FLOAT64
    if dtype.name in ("float32", "float16", "bfloat16"):
        return FLOAT32
    raise ValueError(f"container must be float16, bfloat16, float32 or float64, got {dtype.name}.")


def stack_formats(
    specs: Iterable[Any], *, overflow: str | None = None, subnormals: str = "keep", container: Any = "float32"
) -> FormatParams:
    """Returns the parameters of several formats stacked on a new first axis, for `jax.vmap` over formats.

    Args:
      specs: formats, or anything `formats.format` takes; at least one.
      overflow: as for `round_to`, the same for all; None is each format's own.
      subnormals: as for `round_to`.
      container: dtype of the arrays to be rounded; "float32" also serves float16 and bfloat16.

    Returns:
      FormatParams whose leaves have shape (formats,).

    Raises:
      ValueError: no formats, an unknown one, or one that cannot honour an option.
    """
    params = [format(spec).params(overflow=overflow, subnormals=subnormals, container=container) for spec in specs]
    if not params:
        raise ValueError("stack_formats needs at least one format, got none.")
    return FormatParams(*(np.stack(leaves) for leaves in zip(*params, strict=True)))

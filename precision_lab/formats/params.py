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
from precision_lab.formats.scalar import Format, power_of_two


@dataclass(frozen=True)
class Layout:
    """How a container keeps its bits; `word` is the unsigned integer of the same size."""

    name: str
    word: type[np.unsignedinteger]
    mantissa_bits: int
    bias: int

    @property
    def bits(self) -> int:
        """Returns the width of a word."""
        return self.word(0).itemsize * 8

    @property
    def signed(self) -> type[np.signedinteger]:
        """Returns the signed integer of the same size."""
        return {32: np.int32, 64: np.int64}[self.bits]

    @property
    def sign(self) -> int:
        """Returns the bit pattern of -0."""
        return 1 << (self.bits - 1)

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
      min_field: exponent field, in the container, below which steps are equal; 0 where the format has the
        container's own exponents.
      leading: the bit of a leading one, set before the last bit kept is read; 0 without mantissa bits.
      parity: bit flipped before that, so that it says whether a code is odd; 0 with mantissa bits.
      step: bits of the smallest positive value that rounding can give, and of the distance between the smallest.
      smallest: bits of what it becomes; 0 if all subnormal inputs become zero.
      flush: bits of the value below which results are flushed to zero; 0 if they are not.
      max: bits of the largest finite value.
      min: bits of the magnitude of the most negative value.
      overflow: bits of what a finite value beyond them becomes; 0 if it becomes the largest.
      finite: bits beyond which inputs are not treated as numbers: all that are not, or NaNs only.
      quiet: bits set in such inputs; the container's quiet bit where infinities become NaN.
      zero_sign: mask of the sign a zero may keep; all bits, or none where there is no negative zero.
    """

    drop: Any
    min_field: Any
    leading: Any
    parity: Any
    step: Any
    smallest: Any
    flush: Any
    max: Any
    min: Any
    overflow: Any
    finite: Any
    quiet: Any
    zero_sign: Any


def traceable_params(fmt: Format, *, overflow: str | None, subnormals: str, container: Any) -> FormatParams:
    """Returns the parameters of `fmt` if every rounding is exact with them; documented at `Format.params`."""
    if needs_integers(fmt, layout_of(container), subnormals):
        raise ValueError(
            f"subnormals={subnormals!r}: {fmt.name} has the subnormals of {layout_of(container).name}, and traced "
            "parameters cannot ask for it. Give the format itself, or float64 arrays under jax_enable_x64."
        )
    return make_params(fmt, overflow=overflow, subnormals=subnormals, container=container)


def make_params(fmt: Format, *, overflow: str | None, subnormals: str, container: Any) -> FormatParams:
    """Returns the parameters of `fmt`; for a format that is not traced."""
    check_subnormals(subnormals, fmt)
    action = overflow_action(fmt, overflow)
    layout = layout_of(container)
    check_steps(fmt, layout)
    min_field, step = _around_zero(fmt, layout, subnormals)
    infinity = "saturate" if action == "saturate" else fmt.native_overflow
    words = {
        "drop": max(layout.mantissa_bits - fmt.mantissa_bits, 0),
        "min_field": min_field,
        "leading": 1 << layout.mantissa_bits if fmt.mantissa_bits else 0,
        # An exponent field is its own code less that of the smallest normal number, plus one.
        "parity": (fmt.min_exponent + layout.bias + 1) % 2 << layout.mantissa_bits if fmt.mantissa_bits == 0 else 0,
        "step": step,
        "smallest": 0 if subnormals == "denormals_are_zero" else step,
        "flush": layout.floor_bits(power_of_two(fmt.min_exponent)) if subnormals == "flush" else 0,
        "max": layout.floor_bits(fmt.magnitude(fmt.max_code)),
        "min": layout.floor_bits(abs(fmt.lowest)),
        "overflow": {"inf": layout.inf, "nan": layout.nan}.get(action, 0),
        "finite": layout.inf if infinity == "saturate" else layout.inf - 1,
        "quiet": layout.nan & ~layout.inf if infinity == "nan" else 0,
        "zero_sign": layout.sign if fmt.has_negative_zero else 0,
    }
    return FormatParams(**{key: layout.word(word) for key, word in words.items()})


def check_steps(fmt: Format, layout: Layout) -> None:
    """Refuses formats that arrays of this layout cannot be rounded to exactly.

    Where a format has subnormals of its own, its step must be so large that what the container may flush is less
    than half of it, and so small that a number of that last place exists. Else it must share the container's.
    """
    where = f"{fmt.name} in {layout.name} arrays"
    if not fmt.has_zero:
        raise ValueError(f"{where}: parameters cannot say that a format has no zero; give the format itself.")
    smallest_step, largest_step = power_of_two(2 - layout.bias), power_of_two(layout.bias - layout.mantissa_bits)
    if not _shares_subnormals(fmt, layout) and not smallest_step <= fmt.step < largest_step:
        raise ValueError(
            f"{where}: the smallest values lie where {layout.name} has only subnormals of another spacing, or too "
            "high; such roundings are not exact. Give float64 arrays under jax_enable_x64."
        )


def _shares_subnormals(fmt: Format, layout: Layout) -> bool:
    """Returns whether the subnormal numbers of the container are as many dropped bits from the format as all others."""
    field, missing = fmt.min_exponent + layout.bias, max(fmt.mantissa_bits - layout.mantissa_bits, 0)
    return field == 1 or (fmt.mantissa_bits >= layout.mantissa_bits and field - missing <= 1)


def needs_integers(fmt: Format, layout: Layout, subnormals: str) -> bool:
    """Returns whether `kernel.round_nearest_even` would decide about numbers that the container may flush."""
    return subnormals == "round" and fmt.min_exponent + layout.bias <= 1


def _around_zero(fmt: Format, layout: Layout, subnormals: str) -> tuple[int, int]:
    """Returns `FormatParams.min_field` and `.step`."""
    field = fmt.min_exponent + layout.bias
    if subnormals in ("denormals_are_zero", "round"):
        return max(field, 1), max(layout.floor_bits(power_of_two(fmt.min_exponent)), 1)
    field -= max(fmt.mantissa_bits - layout.mantissa_bits, 0)
    return field if field > 1 else 0, max(layout.floor_bits(fmt.step), 1)


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

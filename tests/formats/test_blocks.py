"""Block formats by name: what they are, how many bits they take, and what is refused."""

from fractions import Fraction

import numpy as np
import pytest

from precision_lab import formats
from precision_lab.formats import blocks
from precision_lab.formats.blocks import BLOCK_FORMATS, BlockFormat, block_format

SPECS = [*BLOCK_FORMATS, "bfp8", "bfp4@64", "mxfp4:rceil", "mxfp8@32x32", "mxint8:full", "mxint8@16:full,even"]


@pytest.mark.parametrize("spec", SPECS)
def test_a_name_gives_its_format_back(spec):
    fmt = block_format(spec)

    assert block_format(fmt.name) == fmt
    assert formats.format(spec) == fmt
    assert formats.format(fmt) is fmt
    assert hash(fmt) == hash(block_format(f" {spec.upper()} "))
    assert repr(fmt) == f"format({fmt.name!r})"


def test_aliases_and_defaults_are_canonical():
    assert block_format("mxfp8") is not None
    assert block_format("mxfp8").name == "mxfp8_e4m3"
    assert block_format("mxfp6").name == "mxfp6_e2m3"
    assert block_format("mxfp4@32:floor") == block_format("mxfp4")
    assert block_format("bfp8@16") == block_format("bfp8")
    assert block_format("mxfp4@16:even").name == "mxfp4@16:even"


@pytest.mark.parametrize(
    ("spec", "bits", "max_exponent", "scale"),
    [
        ("mxfp8", 8.25, 8, "float8_e8m0fnu"),
        ("mxfp8_e5m2", 8.25, 15, "float8_e8m0fnu"),
        ("mxfp6_e3m2", 6.25, 4, "float8_e8m0fnu"),
        ("mxfp6_e2m3", 6.25, 2, "float8_e8m0fnu"),
        ("mxfp4", 4.25, 2, "float8_e8m0fnu"),
        ("mxint8", 8.25, 0, "float8_e8m0fnu"),
        ("nvfp4", 4.5, 2, "float8_e4m3fn"),
        ("nvfp4_2d", 4.03125, 2, "float8_e4m3fn"),
        ("bfp8@16", 8.5, 0, "float8_e8m0fnu"),
    ],
)
def test_derived_facts_are_those_of_the_specifications(spec, bits, max_exponent, scale):
    """OCP MX 1.0, tables 1 and 2, and section 6.3; NVFP4: 4 + 8/16, the array's scale not counted."""
    fmt = block_format(spec)

    assert (fmt.bits, fmt.max_exponent, fmt.scale) == (bits, max_exponent, scale)


def test_true_bits_count_ragged_blocks_and_the_scale_of_the_array():
    assert block_format("mxfp4").bits_per_element((2, 32)) == Fraction(17, 4)
    assert block_format("mxfp4").bits_per_element((2, 33)) == Fraction(66 * 4 + 4 * 8, 66)
    assert block_format("mxfp4").bits_per_element((33, 2), axis=0) == Fraction(66 * 4 + 4 * 8, 66)
    assert block_format("nvfp4").stored_bits((16,)) == 64 + 8 + 32
    assert block_format("nvfp4_2d").stored_bits((3, 17, 16)) == 3 * 17 * 16 * 4 + 3 * 2 * 8 + 32


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mxfp5", "unknown block format 'mxfp5'. Known: mxfp8_e4m3, .*bfp8@16"),
        ("bfp2", "unknown block format"),
        ("mxfp4:sideways", r"cannot use 'sideways'; options are one rule .* floor, ceil, even, rceil"),
        ("mxfp4:full", "cannot use 'full'"),
        ("mxfp4:floor,ceil", "cannot use"),
        ("nvfp4:floor", r"cannot use 'floor'; options are none\."),
        ("nvfp4@32", "nvfp4 has blocks of 16 and no others"),
        ("mxfp4@0", "block must be one or two positive lengths"),
    ],
)
def test_what_is_no_block_format_is_refused(spec, message):
    with pytest.raises(ValueError, match=message):
        block_format(spec)


def test_formats_that_float32_cannot_hold_are_refused():
    for element in ("int8", "float8_e5m2", "e5m3"):
        assert BlockFormat("fine", formats.format(element), (8,)).max_exponent >= 0
    with pytest.raises(ValueError, match="values below float32's smallest"):
        BlockFormat("far", formats.format("e7m4"), (8,))
    with pytest.raises(ValueError, match="elements have a sign"):
        BlockFormat("unsigned", formats.format("uint8"), (8,))
    with pytest.raises(ValueError, match="rule must be one of floor"):
        BlockFormat("rule", formats.format("int8"), (8,), "round")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("rank", "axis"), [(1, 1), (2, -3), (2, (0, 1)), (0, None)])
def test_axes_that_do_not_fit_are_refused(rank, axis):
    with pytest.raises(ValueError, match=r"blocks of 32 along 1 axis\(es\); cannot lay them along"):
        block_format("mxfp4").axes(rank, axis)


def test_axes_are_counted_from_the_front():
    assert block_format("mxfp4").axes(3, None) == (2,)
    assert block_format("mxfp4").axes(3, -2) == (1,)
    assert block_format("nvfp4_2d").axes(3, None) == (1, 2)
    assert block_format("nvfp4_2d").axes(3, (0, -1)) == (0, 2)


def test_mxint8_is_fixed_point_with_six_bits_after_the_point():
    narrow, full = block_format("mxint8").element, block_format("mxint8:full").element

    assert (narrow.max, full.max, full.min, narrow.min_subnormal) == (127 / 64, 127 / 64, -2, 1 / 64)
    np.testing.assert_array_equal(narrow.grid(), np.arange(-127, 128) / 64)


def test_every_rule_is_described():
    assert set(blocks.RULES) == {"floor", "ceil", "even", "rceil", "amax"}

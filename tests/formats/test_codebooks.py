"""Codebooks: levels against what was published, nearest levels against exact distances."""

import bisect
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from precision_lab import formats
from precision_lab.formats.codebook_rounding import decode_codebook, encode_codebook, round_to_codebook
from precision_lab.formats.codebooks import CODEBOOKS, Codebook, codebook

BOOKS = [*list(CODEBOOKS.values()), codebook([3.0, -1.5, 0.25, 0.25], name="own"), codebook(range(40), name="forty")]
by_book = pytest.mark.parametrize("book", BOOKS, ids=str)
# QLoRA, appendix E, and bitsandbytes' functional.py.
NF4 = """-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334
 -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224
 0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0"""


def hard_values(book):
    """Returns levels, midpoints, their float32 neighbours, and specials other than NaN."""
    points = np.array(book.grid().tolist() + [float(half) for half, _ in book.midpoints()]).astype(np.float32)
    near = [points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(-np.inf))]
    return np.concatenate([*near, np.float32([0.0, -0.0, 1e-45, -1e-45, np.inf, -np.inf, 3e38])])


def nearest(value, book):
    """Returns the nearest level by exact distances, ties as the codebook says."""
    if np.isinf(value):
        return book.max if value > 0 else book.min
    place = bisect.bisect(book.grid().tolist(), float(value))
    around = book.grid().tolist()[max(place - 2, 0) : place + 2]
    distance = {level: abs(Fraction(level) - Fraction(float(value))) for level in around}
    best = sorted(level for level in distance if distance[level] == min(distance.values()))
    return {"lower": best[0], "upper": best[-1], "zero": min(best, key=abs)}[book.ties]


def test_nf4_levels_are_the_published_ones_bit_for_bit():
    np.testing.assert_array_equal(np.float32(CODEBOOKS["nf4"].levels), np.float32(NF4.split()))


def test_bitsandbytes_fp4_levels_are_its_table_over_twelve():
    table = np.float32([0, 0.0625, 8, 12, 4, 6, 2, 3]) / np.float32(12)

    np.testing.assert_array_equal(np.float32(CODEBOOKS["bnb_fp4"].levels), np.concatenate([table, -table]))


def test_dynamic_levels_are_those_of_float32_interval_centres():
    """The published construction in float32, which may be off by its own rounding errors."""
    levels = [0.0, 1.0]
    for i in range(7):
        edges = np.linspace(np.float32(0.1), np.float32(1), 2**i + 1, dtype=np.float32)
        centres = (edges[:-1] + edges[1:]) / 2 * np.float32(10.0 ** (i - 6))
        levels += [*centres, *-centres]

    np.testing.assert_allclose(CODEBOOKS["dynamic8"].grid(), np.sort(levels), rtol=5e-7)


@by_book
def test_every_way_takes_the_nearest_level(book):
    x = hard_values(book)
    expected = np.array([nearest(value, book) for value in x])

    codes = book.encode(x)
    rounded, traced = jax.jit(lambda x: (round_to_codebook(x, book), encode_codebook(x, book)))(x)

    np.testing.assert_array_equal(book.decode(codes), expected)
    np.testing.assert_array_equal(traced, codes)
    np.testing.assert_array_equal(rounded, expected.astype(np.float32))
    np.testing.assert_array_equal(decode_codebook(traced, book), rounded)


@by_book
def test_levels_round_trip_and_rounding_twice_changes_nothing(book):
    np.testing.assert_array_equal(book.decode(book.encode(book.grid())), book.grid())
    for dtype in (jnp.float16, jnp.bfloat16, jnp.float32):
        once = round_to_codebook(jnp.linspace(-2, 2, 101, dtype=dtype), book)
        assert once.dtype == dtype
        np.testing.assert_array_equal(round_to_codebook(once, book), once)


def test_hand_worked_ties_and_zeros():
    """BinaryConnect: +1 for x >= 0. BitNet rounds halves to even, that is to zero. NF4 keeps zero."""
    x = np.float32([-0.5, 0.5, 0.0, -0.0, -1e-45, 1e-45])

    np.testing.assert_array_equal(round_to_codebook(x, "ternary"), [0, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(round_to_codebook(x, "binary"), [-1, 1, 1, 1, -1, 1])
    np.testing.assert_array_equal(round_to_codebook(x[2:4], "nf4"), [0, 0])


def test_nan_stays_nan_and_is_refused_by_encode():
    x = np.float32([np.nan, 1.0])

    for book in CODEBOOKS.values():
        np.testing.assert_array_equal(np.isnan(round_to_codebook(x, book)), [True, False])
        with pytest.raises(ValueError, match="has no NaN, but 1 of 2 values are NaN"):
            book.encode(x)


def test_gradient_is_straight_through():
    gradient = jax.grad(lambda x: 2 * jnp.sum(round_to_codebook(x, "nf4")))(jnp.float32([0.1, 5.0, -0.3]))

    np.testing.assert_array_equal(gradient, [2, 2, 2])


def test_names_and_sizes():
    assert formats.format("nf4") is CODEBOOKS["nf4"]
    assert {name: book.bits for name, book in CODEBOOKS.items()} == {
        **{"nf4": 4, "bnb_fp4": 4, "dynamic8": 8, "dynamic8_unsigned": 8, "ternary": 2, "binary": 1}
    }
    assert CODEBOOKS["ternary"].storage_bits == 8 / 5
    mine = codebook([0.0, 5.0], name="mine_in_this_test", register_as=True)
    assert formats.format("mine_in_this_test") == mine


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: codebook([1.0]), "needs 2 to 256 finite levels"),
        (lambda: codebook([1.0, np.inf]), "needs 2 to 256 finite levels"),
        (lambda: codebook([1.0, 2.0], ties="even"), "ties must be one of lower, upper, zero"),
        (lambda: Codebook("x", (0.0, 1.0, 2.0), packed=6), "6 codes of 3 levels do not fit a byte"),
        (lambda: CODEBOOKS["nf4"].decode([16]), r"lie in \[0, 15\], got values from 16 to 16"),
        (lambda: round_to_codebook(np.float32([1]), "nf5"), "unknown codebook 'nf5'"),
    ],
)
def test_what_cannot_be_done_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()

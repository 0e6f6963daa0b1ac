"""Inputs and comparisons that the tests of number formats share."""

import ml_dtypes
import numpy as np

from precision_lab import formats

DETERMINISTIC = [name for name in formats.ROUNDINGS if name != "stochastic"]
ALL = list(formats.FORMATS.values())
GENERIC = [
    formats.format(spec)
    for spec in (
        "e5m3",
        "e3m0:finite",
        "e5m3:bias=12,finite",
        "e4m0",
        "e6m9:fn",
        "int3",
        "int11",
        "fixed8.4",
        "ufixed6.3",
        "fixed9.2:narrow",
    )
]
# What fits a table of codes, and what a float32 array can be rounded to (every one but float64 changes values there).
CODED = [fmt for fmt in ALL + GENERIC if fmt.bits <= 16]
ROUNDABLE = [fmt for fmt in ALL + GENERIC if fmt.name not in ("float64", "float32")]
NARROWER_THAN_FLOAT32 = [fmt for fmt in ROUNDABLE if fmt.has_zero]
SIGNED = [fmt for fmt in NARROWER_THAN_FLOAT32 if fmt.signed]
SYMMETRIC = [fmt for fmt in SIGNED if fmt.min == -fmt.max]
ML_DTYPES_FLOATS = [fmt for fmt in CODED if fmt.kind == "float" and fmt.dtype is not None]


def every_float16() -> np.ndarray:
    """Returns all 65,536 float16 bit patterns."""
    return np.arange(1 << 16).astype(np.uint16).view(np.float16)


def every_bfloat16() -> np.ndarray:
    """Returns all 65,536 bfloat16 bit patterns."""
    return np.arange(1 << 16).astype(np.uint16).view(ml_dtypes.bfloat16)


def random_float32_bits(count: int, seed: int = 0) -> np.ndarray:
    """Returns float32 of random bits: every exponent as often, NaNs, infinities and subnormals included."""
    return np.random.default_rng(seed).integers(0, 1 << 32, count, dtype=np.uint32).view(np.float32)


def hard_float32(fmt: formats.Format, count: int = 2048, seed: int = 0) -> np.ndarray:
    """Returns values where rounding to `fmt` is decided: grid points, ties, their neighbours, edges, specials."""
    grid = fmt.grid() if fmt.bits <= 9 else _part_of_grid(fmt, seed)
    grid = np.concatenate([grid, [fmt.max, fmt.max + float(spacing_at_max(fmt)), fmt.min_normal, fmt.min_subnormal]])
    with np.errstate(over="ignore", under="ignore"):
        grid = np.unique(grid.astype(np.float32))
        ties = ((grid[1:].astype(np.float64) + grid[:-1]) / 2).astype(np.float32)
    points = np.concatenate([grid, ties])
    points = np.concatenate(
        [points, np.nextafter(points, np.float32(np.inf)), np.nextafter(points, np.float32(-np.inf))]
    )
    special = np.float32([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 1e-39, 3.4028235e38, -3.4028235e38])
    points = np.random.default_rng(seed).permutation(np.concatenate([points, -points]))[: count // 2]
    points = np.concatenate([special, points])
    return np.concatenate([points, random_float32_bits(count - points.size, seed)])


def _part_of_grid(fmt: formats.Format, seed: int) -> np.ndarray:
    """Returns pairs of neighbouring values of a format with too many of them."""
    codes = np.random.default_rng(seed).integers(0, fmt.max_code, 100)
    return np.array([float(fmt.magnitude(int(code) + step)) for code in codes for step in (0, 1)])


def spacing_at_max(fmt: formats.Format):
    """Returns the distance from the largest value to the one before it."""
    return fmt.magnitude(fmt.max_code) - fmt.magnitude(fmt.max_code - 1)


def assert_same_numbers(actual, expected) -> None:
    """Checks bits, signs of zero included, but takes all NaNs for equal; both sides widened to float64."""
    with np.errstate(invalid="ignore"):
        actual, expected = (np.asarray(side).astype(np.float64) for side in (actual, expected))
    same = (actual == expected) & (np.signbit(actual) == np.signbit(expected))
    same |= np.isnan(actual) & np.isnan(expected)

    wrong = np.flatnonzero(~same.ravel())
    shown = [(actual.ravel()[i], expected.ravel()[i]) for i in wrong[:5]]
    assert wrong.size == 0, f"{wrong.size} of {same.size} differ; first (actual, expected): {shown} at {wrong[:5]}"

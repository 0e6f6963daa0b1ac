"""The options of rounding: their names, and what each means for a given format."""

from __future__ import annotations

from precision_lab.formats.scalar import Format, Overflow

# Name of the rounding, and which of the two neighbours it takes.
ROUNDINGS: dict[str, str] = {
    "nearest_even": "the nearer; on a tie the one whose code is even",
    "nearest_away": "the nearer; on a tie the one farther from zero",
    "toward_zero": "the one nearer to zero (truncation)",
    "up": "the larger",
    "down": "the smaller",
    "to_odd": "the one whose code is odd, so that a second, coarser rounding is still right",
}
OVERFLOWS = ("native", "saturate", "inf", "nan")
SUBNORMALS = ("keep",)


def check_rounding(rounding: str) -> str:
    """Returns `rounding` if it is one that can be done here; raises ValueError otherwise."""
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding must be one of {', '.join(ROUNDINGS)}, got {rounding!r}.")
    return rounding


def check_subnormals(subnormals: str) -> str:
    """Returns `subnormals` if it is one that can be done here; raises ValueError otherwise."""
    if subnormals not in SUBNORMALS:
        raise ValueError(f"subnormals must be {' or '.join(map(repr, SUBNORMALS))}, got {subnormals!r}.")
    return subnormals


def overflow_action(fmt: Format, overflow: str | None) -> Overflow:
    """Returns what a value beyond `fmt.max` becomes, "saturate", "inf" or "nan"; None means as specified ("native").

    Raises:
      ValueError: an unknown name, or a result that the format has no code for.
    """
    if overflow is not None and overflow not in OVERFLOWS:
        raise ValueError(f"overflow must be one of {', '.join(OVERFLOWS)} or None, got {overflow!r}.")
    if overflow == "inf" and not fmt.has_inf:
        raise ValueError(f"overflow='inf': {fmt.name} has no infinity. Choose {_alternatives(fmt)}.")
    if overflow == "nan" and not fmt.has_nan:
        raise ValueError(f"overflow='nan': {fmt.name} has no NaN. Choose {_alternatives(fmt)}.")
    return fmt.native_overflow if overflow in (None, "native") else overflow  # pyright: ignore[reportReturnType]


def _alternatives(fmt: Format) -> str:
    """Returns the overflow options that `fmt` can honour, for an error message."""
    possible = ["'saturate'"] + ["'inf'"] * fmt.has_inf + ["'nan'"] * fmt.has_nan
    return " or ".join(possible)

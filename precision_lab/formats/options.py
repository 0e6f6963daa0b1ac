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
    "stochastic": "either, at random, the nearer the likelier; the mean is the value",
}
OVERFLOWS: dict[str, str] = {
    "native": "as the format's specification has it",
    "saturate": "the largest value, from infinities too",
    "saturate_finite": "the largest value; infinities become what the specification has",
    "inf": "infinity",
    "nan": "NaN",
}
# What becomes of a value below the smallest normal number.
SUBNORMALS: dict[str, str] = {
    "keep": "the nearest subnormal number",
    "flush": "rounded first, then zero if it is still subnormal",
    "denormals_are_zero": "zero, before rounding",
    "round": "zero or the smallest normal number, as the rounding says",
}


def check_rounding(rounding: str, *, random: bool = False) -> str:
    """Returns `rounding` if it is one that can be done with or without random bits; raises ValueError otherwise."""
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding must be one of {', '.join(ROUNDINGS)}, got {rounding!r}.")
    if rounding == "stochastic" and not random:
        raise ValueError("rounding='stochastic' needs randomness; give key= or bits=.")
    if rounding != "stochastic" and random:
        raise ValueError(f"rounding={rounding!r} uses no randomness; leave out key= and bits=, or say 'stochastic'.")
    return rounding


def check_subnormals(subnormals: str, fmt: Format) -> str:
    """Returns `subnormals` if `fmt` can have it; raises ValueError otherwise."""
    if subnormals not in SUBNORMALS:
        raise ValueError(f"subnormals must be one of {', '.join(SUBNORMALS)}, got {subnormals!r}.")
    if subnormals != "keep" and (fmt.kind != "float" or not fmt.has_zero):
        raise ValueError(f"subnormals={subnormals!r}: {fmt.name} has no subnormal numbers. Choose 'keep'.")
    return subnormals


def overflow_action(fmt: Format, overflow: str | None) -> Overflow:
    """Returns what a value beyond `fmt.max` becomes, one of `OVERFLOWS`; None and "native" mean as specified.

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
    possible = ["'saturate'", "'saturate_finite'"] + ["'inf'"] * fmt.has_inf + ["'nan'"] * fmt.has_nan
    return " or ".join(possible)

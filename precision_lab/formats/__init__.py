"""Number formats: what they are, exact rounding to them, their codes, and what they cost in memory.

Everything here works without JAX except `round_to`, which is loaded when first used.
"""

from typing import TYPE_CHECKING, Any

from precision_lab.formats.catalogue import ALIASES, FORMATS, format
from precision_lab.formats.options import ROUNDINGS
from precision_lab.formats.params import FormatParams, stack_formats
from precision_lab.formats.scalar import Format

if TYPE_CHECKING:
    from precision_lab.formats.rounding import round_to

__all__ = ["ALIASES", "FORMATS", "ROUNDINGS", "Format", "FormatParams", "format", "round_to", "stack_formats"]


def __getattr__(name: str) -> Any:
    if name == "round_to":
        from precision_lab.formats.rounding import round_to

        return round_to
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""Granularity: which elements of an array share one scale."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Any, Literal

Kind = Literal["tensor", "channel", "token", "group", "block"]

_SPEC = re.compile(r"(?:per_)?(tensor|channel|token|group|block)_?\(?(\d+)?(?:[x,](\d+))?\)?")
_SPOKEN = re.compile(r"(?:per_?)?([a-z_]*)(.*)")
_SIZES = {"tensor": 0, "channel": 0, "token": 0, "group": 1, "block": 2}


@dataclass(frozen=True, slots=True)
class Granularity:
    """What shares one scale; `str` gives what `granularity` parses.

    Attributes:
      kind: "tensor" all elements; "channel" and "token" all along the contracted axes (one scale for each output
        channel of weights, or each row of activations); "group" runs along the last contracted axis; "block" tiles of
        the last two axes.
      sizes: run length for "group", rows and columns for "block", else empty. A last, smaller run has its own scale.
    """

    kind: Kind = "tensor"
    sizes: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuses what is no granularity."""
        if self.kind not in _SIZES or len(self.sizes) != _SIZES[self.kind] or any(size < 1 for size in self.sizes):
            raise ValueError(
                f"granularity {self.kind!r}, sizes {self.sizes}: expected tensor, channel, token, groupN or blockRxC."
            )

    def __str__(self) -> str:
        return self.kind + "x".join(map(str, self.sizes))

    def runs(self, shape: tuple[int, ...], axis: int | tuple[int, ...] | None) -> tuple[int | None, ...]:
        """Returns, for each axis of `shape`, how many neighbours share a scale; None means the whole axis.

        Args:
          shape: of the array.
          axis: the contracted axis or axes; only "channel", "token" and "group" need it.

        Raises:
          ValueError: no axis where one is needed, one the array has not, or an array with too few axes.
        """
        if self.kind == "tensor":
            return (None,) * len(shape)
        if self.kind == "block":
            if len(shape) < 2:
                raise ValueError(f"granularity {self} needs an array with two axes, got shape {shape}.")
            return (1,) * (len(shape) - 2) + self.sizes
        axes = contracted(shape, axis, str(self))
        if self.kind == "group":
            axes, run = axes[-1:], self.sizes[0]
            return tuple(run if each in axes else 1 for each in range(len(shape)))
        return tuple(None if each in axes else 1 for each in range(len(shape)))


def contracted(shape: tuple[int, ...], axis: int | tuple[int, ...] | None, what: str) -> tuple[int, ...]:
    """Returns the contracted axes counted from the front; raises ValueError if they are none of `shape`'s.

    An array with one axis has no other to contract.
    """
    axis = 0 if axis is None and len(shape) == 1 else axis
    if axis is None:
        raise ValueError(f"granularity {what} needs axis=, the contracted axis of the array {shape}; or say 'tensor'.")
    rank = len(shape)
    given = (axis,) if isinstance(axis, int) else tuple(axis)
    axes = tuple(each + rank if each < 0 else each for each in given)
    if not axes or len(set(axes)) != len(axes) or not all(0 <= each < rank for each in axes):
        raise ValueError(f"axis={axis} names no axes of an array of shape {shape}.")
    return axes


def granularity(spec: Any) -> Granularity:
    """Returns the granularity that `spec` names: "tensor", "channel", "token", "group32", "block128x128".

    "per_" in front and parentheses, as in "per_group(32)", are taken too.

    Raises:
      ValueError: it names none; the nearest is named.
    """
    if isinstance(spec, Granularity):
        return spec
    word = str(spec).strip().lower().replace(" ", "")
    match = _SPEC.fullmatch(word)
    if match is None:
        known = "Expected tensor, channel, token, groupN or blockRxC"
        raise ValueError(f"unknown granularity {spec!r}. {_nearest(word)}{known}.")
    sizes = tuple(int(size) for size in match.groups()[1:] if size)
    return Granularity(match[1], sizes)  # pyright: ignore[reportArgumentType]


def _nearest(word: str) -> str:
    """Returns the sentence that says what a word was probably meant to be, or nothing."""
    kind, sizes = _SPOKEN.fullmatch(word).groups()  # pyright: ignore[reportOptionalMemberAccess]
    near = difflib.get_close_matches(kind, _SIZES, n=1) if kind else ["group"] * sizes.isdigit()
    if not near:
        return ""
    meant = near[0] + (sizes if _SPEC.fullmatch(near[0] + sizes) and _SIZES[near[0]] else "")
    return f"Nearest: {meant!r}. "

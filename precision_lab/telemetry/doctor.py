"""doctor: what the numbers of a checkpoint or state say about their types, past, present and to come.

print(pl.doctor(state, formats=["float16", "float8_e4m3fn"]))
print(pl.doctor(loaded, against=saved))       # which tensors were cast on the way, and what that lost
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from precision_lab import formats as catalogue
from precision_lab.formats import Format
from precision_lab.rewrite.printing import table_text
from precision_lab.telemetry import telltales
from precision_lab.telemetry.census import Fit, census, is_floating, subnormals
from precision_lab.telemetry.changes import Change, change
from precision_lab.telemetry.findings import Finding, number_of, of_changes, of_leaves, percent
from precision_lab.telemetry.reading import Reading

_DEFAULT = ("float16", "bfloat16")
_WIDEST_BYTES = 8  # of a number that JAX can count; NumPy's long double is wider


@dataclass(frozen=True)
class Leaf:
    """One array, and what there is to say about it; numbers of what is not floating are zero or None.

    Attributes:
      path: where it is, as "params/head/kernel"; "array" for a tree that is one array; see `arrays_by_path`.
      dtype, shape, nbytes: as stored.
      amax, amin: largest and smallest finite magnitude, zeros aside; 0 and infinite if there is none.
      zeros, infs, nans: counts.
      subnormal: non-zero values below the smallest normal number of its own dtype.
      exponents: of the smallest and the largest magnitude, k of [2**k, 2**(k + 1)); None without any. Those of float64
        outside float32's range are clipped to it.
      fits: what each candidate format would make of it.
      misread_as: 16-bit type whose bits it seems to hold under another name; empty if none.
      narrower: 16-bit type that holds all its values though its dtype is wider; empty if none.
      constant: the one value of all elements, if there is one.
      whole_numbers: the smallest and largest of values that are all whole, if they are.
      is_record: whether it is of bytes without a type.
      change: what became of it since the other checkpoint, if there is one.
      reading: exponents and sums, None if it is not floating or wider than float64.
    """

    path: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    amax: float = 0.0
    amin: float = math.inf
    zeros: int = 0
    infs: int = 0
    nans: int = 0
    subnormal: int = 0
    exponents: tuple[int, int] | None = None
    fits: tuple[Fit, ...] = ()
    misread_as: str = ""
    narrower: str = ""
    constant: float | None = None
    whole_numbers: tuple[int, int] | None = None
    is_record: bool = False
    change: Change | None = None
    reading: Reading | None = None

    @property
    def count(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    def to_dict(self) -> dict[str, Any]:
        """Returns the numbers as a plain dictionary; those of formats are counts of values."""
        names = ("path", "dtype", "shape", "nbytes", "count", "amax", "amin", "zeros", "infs", "nans", "subnormal")
        names += ("exponents", "misread_as", "narrower", "constant", "whole_numbers")
        row = {name: getattr(self, name) for name in names}
        for fit in self.fits:
            row |= {f"{fit.format}_{kind}": getattr(fit, kind) for kind in _KINDS}
        return row if self.change is None else row | {f"change_{k}": v for k, v in vars(self.change).items()}


_KINDS = ("overflow", "subnormal", "flushed", "changed")


@dataclass(frozen=True)
class Diagnosis(Sequence[Leaf]):
    """The arrays of a state, and what was found. Prints as sentences, then a table.

    Attributes:
      leaves: the arrays, in the order of the tree.
      findings: what to know, what is certainly wrong first.
      formats: the candidate formats.
    """

    leaves: tuple[Leaf, ...]
    findings: tuple[Finding, ...]
    formats: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.leaves)

    def __getitem__(self, index: Any) -> Any:
        return self.leaves[index]

    def __iter__(self) -> Iterator[Leaf]:
        return iter(self.leaves)

    def at(self, path: str) -> Leaf:
        """Returns the array of a path.

        Raises:
          KeyError: there is none.
        """
        for leaf in self.leaves:
            if leaf.path == path:
                return leaf
        raise KeyError(f"no array '{path}'; there are {', '.join(leaf.path for leaf in self.leaves)}.")

    def to_dicts(self) -> list[dict[str, Any]]:
        """Returns one plain dictionary per array."""
        return [leaf.to_dict() for leaf in self.leaves]

    def frame(self) -> Any:
        """Returns the table as a pandas DataFrame.

        Raises:
          ImportError: pandas is not installed.
        """
        try:
            import pandas as pd  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError("doctor(...).frame() needs pandas: pip install 'precision-lab[notebook]'.") from error
        return pd.DataFrame(self.to_dicts())

    def sentences(self) -> list[str]:
        """Returns the findings in words, or that there are none."""
        size = f"{number_of(len(self), 'array')}, {number_of(sum(leaf.count for leaf in self), 'value')}"
        size += f", {number_of(sum(leaf.nbytes for leaf in self), 'byte')}."
        if not self.findings:
            held = self.formats and any(leaf.reading for leaf in self)  # of what is not floating nothing was asked
            fits = f": {' and '.join(self.formats)} would hold every floating value without loss of range"
            return [size, f"nothing to report{fits if held else ''}."]
        return [size, *(f"- {one.text}" for one in self.findings)]

    def heads(self) -> list[str]:
        """Returns the names of the columns of the table."""
        return ["array", "dtype", "shape", "bytes", "amax", "exponents", *self.formats]

    def cells(self) -> list[list[str]]:
        """Returns the table, one row of texts per array."""
        return [_cells(leaf, self.formats) for leaf in self]

    def __str__(self) -> str:
        from rich.table import Column, Table

        path, *others = self.heads()
        table = Table(Column(path, no_wrap=True), *others)
        for row in self.cells():
            table.add_row(*row)
        return "\n".join([*self.sentences(), table_text(table, width=180)])

    __repr__ = __str__


def doctor(
    tree: Any,
    formats: Sequence[Any] = _DEFAULT,
    *,
    against: Any = None,
    tell: Callable[[str, int], None] | None = None,
) -> Diagnosis:
    """Returns what the arrays of a checkpoint or state hold, and what is wrong or would go wrong with their types.

    Of each array: dtype, range, values that are not finite; how many values each candidate format would make infinite,
    subnormal or zero; whether its bits look as if they had been read as the wrong 16-bit type, or its values as if they
    had been through fewer bits; whether it is constant, or holds only whole numbers.

    Args:
      tree: pytree of arrays, as parameters, a train state, an optimizer's state, or an `nnx.Module`. They are looked at
        in whole and on the host; leaves that are no arrays of numbers, or of wider ones than float64, are only listed.
      formats: candidate formats with a range of their own; one of scaled blocks has none.
      against: an earlier state of the same paths, to tell which arrays changed dtype on the way, and what that lost.
      tell: called with the path of each array when it is done, and 1.

    Raises:
      ValueError: a format has no range of its own, or no zero; or the tree has no arrays.

    That bits were read as the wrong type is told from the spread of the values (see `telltales`), which takes 512 of
    them and a distribution like that of weights; it is a suspicion, and its absence is no proof.
    """
    fmts = [_candidate(fmt) for fmt in formats]
    arrays, *earlier = arrays_by_path(tree) if against is None else arrays_by_path(tree, against)
    others = earlier[0] if earlier else None
    if not arrays:
        raise ValueError(f"doctor looks at arrays, and there are none in this {type(tree).__name__}.")
    leaves = []
    for path, x in arrays.items():
        leaves.append(_leaf(path, x, fmts, None if others is None else others.get(path)))
        if tell:
            tell(path, 1)
    found = of_leaves(leaves, fmts)
    if others is not None:
        missing, added = [p for p in others if p not in arrays], [p for p in arrays if p not in others]
        found = [*of_changes(leaves, missing, added), *found]
    return Diagnosis(tuple(leaves), tuple(found), tuple(fmt.name for fmt in fmts))


def arrays_by_path(*trees: Any) -> list[dict[str, np.ndarray]]:
    """Returns the arrays of each tree by path, on the host; PRNG keys as their words.

    Paths that would print alike in one of the trees, as of {"a/b": x, "a": {"b": y}}, are written out in all of them:
    "['a/b']" and "['a']['b']".
    """
    plain = (nnx.to_pure_dict(nnx.state(tree)) if isinstance(tree, nnx.Module) else tree for tree in trees)
    found = [jax.tree.leaves_with_path(tree) for tree in plain]
    alike = {name for each in found for name, n in Counter(_printed(path) for path, _ in each).items() if n > 1}

    def name(path: Any) -> str:
        short = _printed(path)
        return jax.tree_util.keystr(tuple(path)) if short in alike else short

    return [{name(path): _on_host(leaf) for path, leaf in each} for each in found]


def _printed(path: Any) -> str:
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/") or "array"


def _on_host(leaf: Any) -> np.ndarray:
    if hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    array = np.asarray(leaf)
    # Files may keep the other byte order, under which no format is known and bits cannot be viewed.
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def _candidate(fmt: Any) -> Format:
    """Returns a format that arrays can be held against.

    Raises:
      ValueError: it cannot be.
    """
    found = catalogue.format(fmt)
    if not isinstance(found, Format):
        raise ValueError(f"{found.name} has no range of its own, it depends on scales; give one such as float8_e4m3fn.")
    if not (found.has_zero and found.signed):
        raise ValueError(
            f"{found.name} has no {'zero' if found.signed else 'sign'}, so it can hold no tensor by itself."
        )
    return found


def _leaf(path: str, x: np.ndarray, fmts: Sequence[Format], other: np.ndarray | None) -> Leaf:
    """Looks at one array."""
    known = {"path": path, "dtype": x.dtype.name, "shape": x.shape, "nbytes": x.nbytes}
    record = telltales.is_record(x.dtype)
    if other is not None:
        known["change"] = change(other, x)
    if record or x.dtype in (np.uint16, np.int16):
        known |= {"is_record": record, "misread_as": telltales.misread_as(x) or ""}
    if not is_floating(x.dtype) or x.dtype.itemsize > _WIDEST_BYTES:
        return Leaf(**known)
    asked = [*fmts, *(fmt for fmt in telltales.FORMATS_OF_TELLTALES if fmt not in fmts)]
    reading, fits = census(x, asked)
    return Leaf(
        **known,
        **_range(x, reading),
        subnormal=subnormals(reading, reading.fmt),
        fits=fits[: len(fmts)],
        misread_as=(telltales.misread_as(x) or "") if x.dtype.itemsize == 2 else "",
        narrower=telltales.narrower(x, fits) or "",
        constant=telltales.constant(x),
        whole_numbers=telltales.whole_numbers(x),
        reading=reading,
    )


def _range(x: np.ndarray, reading: Reading) -> dict[str, Any]:
    """Returns the range of an array; the magnitudes of float64 are taken from itself."""
    binades = reading.binades
    amax, amin = reading.amax, reading.amin
    if x.dtype.itemsize > 4 and binades:
        given = np.abs(x[np.isfinite(x) & (x != 0)])
        amax, amin = float(given.max()), float(given.min())
    return {
        "amax": amax,
        "amin": amin,
        "zeros": reading.zeros,
        "infs": reading.infs,
        "nans": reading.nans,
        "exponents": (min(binades), max(binades)) if binades else None,
    }


def _cells(leaf: Leaf, fmts: Sequence[str]) -> list[str]:
    """Returns a row of the table."""
    shape = "x".join(map(str, leaf.shape)) or "scalar"
    spread = f"2^{leaf.exponents[0]} to 2^{leaf.exponents[1]}" if leaf.exponents else ""
    amax = f"{leaf.amax:.3g}" if leaf.reading else ""
    fits: Mapping[str, Fit] = {fit.format: fit for fit in leaf.fits}
    return [leaf.path, leaf.dtype, shape, f"{leaf.nbytes:,}", amax, spread,
            *(_fit_text(fits[name], leaf) if name in fits else "" for name in fmts)]  # fmt: skip


def _fit_text(fit: Fit, leaf: Leaf) -> str:
    """Returns what a format would make of an array: "exact", "rounds", or what it would lose."""
    words = {"overflow": "overflow", "flushed": "zero", "subnormal": "subnormal"}
    lost = [f"{percent(getattr(fit, kind), leaf.count)} {word}" for kind, word in words.items() if getattr(fit, kind)]
    return ", ".join(lost) or ("rounds" if fit.changed else "exact")

"""Storage: the bytes that each parameter takes, as it is or as `convert` would store it under a policy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen, nnx

from precision_lab.nn.conversion import How, named, stored_for, uses_of, ways_of
from precision_lab.nn.learned import learned_of
from precision_lab.policy import Policy
from precision_lab.ptq import round_to_nearest
from precision_lab.quant import QTensor
from precision_lab.rewrite.parameters import shape_of
from precision_lab.rewrite.printing import table_text


def bytes_under(target: Any, policy: Policy, params: Any, args: Any, kwargs: Any) -> dict[str, int]:
    """Returns the bytes of each parameter, by path, as `convert(target, policy, *args, params=params)` stores it.

    Nothing is quantized for this. A parameter that cannot be stored quantized takes the bytes of the policy's params
    dtype, of a function those of its own.
    """
    return {path: taken.nbytes for path, taken in taken_under(target, policy, params, args, kwargs).items()}


class Taken(NamedTuple):
    """The bytes of a parameter, and why it is not stored quantized though a policy quantizes it; empty if it is."""

    nbytes: int
    why_not: str


def taken_under(target: Any, policy: Policy, params: Any, args: Any, kwargs: Any) -> dict[str, Taken]:
    """Returns what each parameter takes, by path; see `bytes_under`."""
    own, uses = uses_of(target, policy, params, args, kwargs)
    ways, leaves = ways_of(own, uses, {}), named(own)
    is_model, learned = isinstance(target, nnx.Module | linen.Module), learned_of(target, params)
    found = {}
    for path, leaf in leaves.items():
        how = ways.get(path, How(None))
        if (use := how.use) is not None:
            like = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            stored = jax.eval_shape(lambda w, use=use: stored_for(w, use, {}, round_to_nearest), like)
        else:
            stored = jax.eval_shape(policy.cast_to_param, leaf) if is_model and path not in learned else leaf
        found[path] = Taken(nbytes(stored), how.why_not)
    return found


def nbytes(leaf: Any) -> int:
    """Returns the bytes of an array, or of all that a QTensor, stacked or not, stores."""
    return sum(int(np.prod(x.shape, dtype=np.int64)) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(leaf))


@dataclass(frozen=True)
class Stored:
    """How one parameter is stored.

    Attributes:
      path, shape: its path and the shape of its values.
      format: its dtype, or the format of its codes.
      granularity: what shares a scale; empty where there is none.
      nbytes: bytes of everything stored: codes, scales, zero points, padding.
    """

    path: str
    shape: tuple[int, ...]
    format: str
    granularity: str
    nbytes: int

    @property
    def elements(self) -> int:
        """Number of its elements."""
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def bits_per_element(self) -> Fraction:
        """True bits per element, exactly; 0 without elements."""
        return Fraction(8 * self.nbytes, self.elements) if self.elements else Fraction(0)


@dataclass(frozen=True)
class Storage(Sequence[Stored]):
    """What the parameters of a model take, one by one and together. Prints as a table."""

    rows: tuple[Stored, ...]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    @property
    def nbytes(self) -> int:
        """Bytes of all parameters."""
        return sum(row.nbytes for row in self.rows)

    @property
    def elements(self) -> int:
        """Elements of all parameters."""
        return sum(row.elements for row in self.rows)

    @property
    def of_float32(self) -> float:
        """Bytes as a share of what float32 takes; 0 without elements."""
        return self.nbytes / (4 * self.elements) if self.elements else 0.0

    def __str__(self) -> str:
        from rich.table import Table

        total = f"{self.nbytes} bytes, {self.of_float32:.4f} of float32"
        table = Table("parameter", "shape", "format", "granularity", "bytes", "bits per element", title=total)
        for row in self.rows:
            shape, bits = " x ".join(map(str, row.shape)), f"{float(row.bits_per_element):.4g}"
            table.add_row(row.path, shape, row.format, row.granularity, str(row.nbytes), bits)
        return table_text(table, width=140)


def storage(model_or_params: Any) -> Storage:
    """Returns what each parameter is stored as, and the bytes of that.

    Args:
      model_or_params: an `nnx.Module`, of which the `Param`s are listed; or a pytree of arrays and QTensors, such as
        the params or variables that `convert` returns.
    """
    tree = model_or_params
    if isinstance(tree, nnx.Module):
        flat = nnx.to_flat_state(nnx.state(tree, nnx.Param))
        return Storage(tuple(_stored("/".join(map(str, path)), each.get_raw_value()) for path, each in flat))
    return Storage(tuple(_stored(path, leaf) for path, leaf in named(tree).items()))


def _stored(path: str, leaf: Any) -> Stored:
    """Returns how one parameter is stored."""
    if isinstance(leaf, QTensor):
        quantizer = leaf.quantizer
        granularity = "" if quantizer.format.kind == "block" else str(quantizer.granularity)
        return Stored(path, shape_of(leaf), quantizer.format.name, granularity, nbytes(leaf))
    return Stored(path, tuple(np.shape(leaf)), str(leaf.dtype), "", nbytes(leaf))

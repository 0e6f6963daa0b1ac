"""Parameters on their way to where they are used: kept as they are stored until something needs their values.

A quantized parameter goes through jit, checkpoint, scan, transposes and casts as its packed self, so that a product can
take its codes; whatever else uses it gets its values.
"""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from precision_lab.quant import QTensor, Quantizer
from precision_lab.quant.tiles import Tiles
from precision_lab.rewrite.quantized import Codes, codes_in


class Use(NamedTuple):
    """How one operation uses a parameter.

    Attributes:
      site: name of the site.
      quantizer: what quantizes it there; None where its values are used as they are.
      axes: the axes of one slice of the parameter that the product contracts, or that a row of an embedding has.
      stack: leading axes over which the parameter is scanned.
      dtype: type that the model casts it to before.
      order: all axes of one slice in the order in which it is used.
      is_matrix: whether it is an operand of one matrix product, so that an adapter can be added to it.
    """

    site: str
    quantizer: Quantizer | None
    axes: tuple[int, ...] = ()
    stack: int = 0
    dtype: Any = None
    order: tuple[int, ...] = ()
    is_matrix: bool = False


class Uses:
    """Collects, while a function is traced, how each of its parameters is used.

    Attributes:
      by_path: uses of each parameter.
      places: by path, site and operand, where in the product the scales of a stored parameter are; see `noted`.
      weights: paths of what products quantize as weights, whether or not it was computed with before.
    """

    def __init__(self) -> None:
        self.by_path: dict[str, list[Use]] = {}
        self.places: dict[str, dict[tuple[str, str], np.ndarray]] = {}
        self.weights: set[str] = set()

    def note(self, path: str, use: Use) -> None:
        """Adds a use."""
        self.by_path.setdefault(path, []).append(use)


_META = ["path", "order", "dtype", "rank", "uses"]


@partial(jax.tree_util.register_dataclass, data_fields=["value"], meta_fields=_META)
@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter that is not an array yet.

    Attributes:
      value: a QTensor, whose leaves have leading axes where it is stacked for a scan; or an array.
      path: its path.
      order: axes of `value` in the order in which it is used.
      dtype: type in which it is used by all but products.
      rank: axes of the whole parameter.
      uses: where uses are noted, or None.
    """

    value: Any
    path: str
    order: tuple[int, ...]
    dtype: Any
    rank: int
    uses: Uses | None = None

    @classmethod
    def of(cls, value: Any, path: str, uses: Uses | None = None) -> Parameter:
        """Returns a parameter as its function is given it."""
        shape = shape_of(value)
        return cls(value, path, tuple(range(len(shape))), np.dtype(value.dtype), len(shape), uses)

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the shape in which it is used."""
        shape = shape_of(self.value)
        return tuple(shape[axis] for axis in self.order)

    @property
    def ndim(self) -> int:
        """Returns the number of axes."""
        return len(self.order)

    def dense(self) -> jax.Array:
        """Returns the values, in the type in which they are used."""
        if self.uses is not None:
            self.uses.note(self.path, Use("", None))
        return self.values().astype(self.dtype)

    def values(self) -> jax.Array:
        """Returns the values in the order of use: of a QTensor in float32, unrounded."""
        if not isinstance(self.value, QTensor):
            return self.value.astype(self.dtype).transpose(self.order)
        return dequantized(self.value).transpose(self.order)

    def codes(self) -> Codes:
        """Returns the codes of a QTensor and their scales, in the order of use."""
        codes = codes_in(self.value)
        return Codes(codes.values.transpose(self.order), codes.scale.transpose(self.order))

    def through(self, eqn: Any) -> Parameter | None:
        """Returns what a transpose or a cast makes of it, None for other operations."""
        if eqn.primitive.name == "transpose":
            return dataclasses.replace(self, order=tuple(self.order[axis] for axis in eqn.params["permutation"]))
        dtype = np.dtype(eqn.params.get("new_dtype", np.int32))
        # A second cast would hide what the first has rounded away.
        first = self.dtype == np.dtype(self.value.dtype) and dtype.name in ("float16", "bfloat16", "float32")
        if eqn.primitive.name == "convert_element_type" and first:
            return dataclasses.replace(self, dtype=dtype)
        return None

    def sliced(self) -> Parameter:
        """Returns a slice of a scan, whose first axis JAX has taken off the arrays."""
        return dataclasses.replace(self, order=tuple(axis - 1 for axis in self.order[1:]))

    def noted(
        self,
        site: str,
        quantizer: Quantizer | None,
        axes: tuple[int, ...],
        role: str,
        layout: Callable[[Any], Any],
        is_matrix: bool = False,
    ) -> None:
        """Notes that a site takes it as one operand, contracting `axes` as it is used there, in a layout.

        Of a quantizer with scales also where these are in the product: their numbers, counted as they are stored.
        """
        if self.uses is None:
            return
        own = tuple(self.order[axis] for axis in axes)
        use = Use(site, quantizer, own, self.rank - self.ndim, self.dtype, self.order, is_matrix)
        self.uses.note(self.path, use)
        if quantizer is not None and quantizer.format.kind != "block":
            shape = Tiles.of(shape_of(self.value), quantizer.granularity, own).scale_shape
            numbers = np.arange(math.prod(shape)).reshape(shape)
            self.uses.places.setdefault(self.path, {})[site, role] = layout(numbers.transpose(self.order))


def is_stored(value: Any) -> bool:
    """Returns whether a value is a parameter that is stored quantized."""
    return isinstance(value, Parameter) and isinstance(value.value, QTensor)


def is_qtensor(leaf: Any) -> bool:
    """Returns whether a node of a tree of parameters is a leaf as a whole."""
    return isinstance(leaf, QTensor)


def dense(value: Any) -> Any:
    """Returns the values of a parameter, and anything else as it is."""
    return value.dense() if isinstance(value, Parameter) else value


def passed(eqn: Any, given: list[Any]) -> list[Any] | None:
    """Returns the result of a transpose or a cast of a parameter, None for all else."""
    if len(given) != 1 or not isinstance(given[0], Parameter):
        return None
    result = given[0].through(eqn)
    return None if result is None else [result]


def can_scan(value: Any) -> bool:
    """Returns whether a scan over the first axis can slice a value as it is stored."""
    if not isinstance(value, Parameter):
        return True
    stacked = not is_stored(value) or bool(_stack(value.value))
    return stacked and value.order[:1] == (0,)


def shape_of(value: Any) -> tuple[int, ...]:
    """Returns the shape of an array, or of the array that a QTensor is, stacked or not."""
    return (*_stack(value), *value.shape) if isinstance(value, QTensor) else tuple(np.shape(value))


def dequantized(value: QTensor) -> jax.Array:
    """Returns the float32 values of a QTensor, stacked or not."""
    stack, unrounded = len(_stack(value)), dataclasses.replace(value, dtype=np.dtype(np.float32))
    read = QTensor.dequantize
    for _ in range(stack):
        read = jax.vmap(read)
    return read(unrounded)


def _stack(value: QTensor) -> tuple[int, ...]:
    """Returns the leading axes that the arrays of a stacked QTensor have."""
    return tuple(np.shape(value.packed)[:-1])


def abstract(leaf: Any) -> Any:
    """Returns what a function sees of a leaf: of a QTensor the shape and dtype of its values."""
    return jax.ShapeDtypeStruct(shape_of(leaf), leaf.dtype) if isinstance(leaf, QTensor) else leaf


def leaf_names(tree: Any) -> list[str]:
    """Returns the path of each leaf of a tree of parameters as sites have it, such as `blocks/0/att/kernel`.

    The box that Flax puts around an array, as in `nnx.State` or for its sharding, is no part of the path: a leaf called
    `value` that has no siblings goes by the name of what it is in.
    """
    paths = [path for path, _ in jax.tree.leaves_with_path(tree, is_leaf=is_qtensor)]
    siblings = collections.Counter(_written(path[:-1]) for path in paths)
    boxed = jax.tree_util.GetAttrKey("value")
    alone = [path[-1:] == (boxed,) and len(path) > 1 and siblings[_written(path[:-1])] == 1 for path in paths]
    return [_written(path[:-1] if drop else path) for path, drop in zip(paths, alone, strict=True)]


def _written(path: Any) -> str:
    """Writes a pytree path."""
    return jax.tree_util.keystr(tuple(path), simple=True, separator="/")

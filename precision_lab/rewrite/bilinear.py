"""Bilinear operations: what a product multiplies, apart from the formats it multiplies in.

Two kinds: matrix products of batches, to which every dot_general is brought, and convolutions. Each can be evaluated,
transposed in either operand (which gives a bilinear operation of the same kind) and batched. No dtype appears here
but the accumulator's.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from precision_lab.rewrite import _compat
from precision_lab.rewrite.accumulate import accumulated_convolution, accumulated_matmul
from precision_lab.rewrite.quantized import Codes, codes_of

INT32_TERMS = (2**31 - 1) // 127**2  # products of int8 codes that an int32 sum holds, whatever they are


class Term(NamedTuple):
    """A product waiting to be taken: an operation and its two operands."""

    op: Any
    lhs: jax.Array
    rhs: jax.Array


@dataclasses.dataclass(frozen=True)
class Matmul:
    """The product of (..., M, K) and (..., K, N), with the same leading axes.

    Transposes are written out, never left to the product, because XLA on CPU has no bfloat16 kernel for some orders.
    """

    def shape(self, lhs: tuple[int, ...], rhs: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of the product."""
        return (*lhs[:-1], rhs[-1])

    def contracted(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns the axes of the left and of the right operand that are summed over."""
        return (-1,), (-2,)

    def multiply(self, lhs: jax.Array, rhs: jax.Array, how: Any) -> jax.Array:
        """Returns the product of the operands, prepared and accumulated as `how` says."""
        numbers, axes = _numbers(lhs.ndim), self.contracted()
        if how.codes:
            pair = (codes_of(x, q, along) for x, q, along in zip((lhs, rhs), how.codes, axes, strict=True))
            return self.multiply_codes(*pair)
        lhs, rhs = how.prepared(lhs, 0, axes[0]), how.prepared(rhs, 1, axes[1])
        if not how.accum.is_native:
            return accumulated_matmul(lhs, rhs, how.accum)
        return lax.dot_general(lhs, rhs, numbers, precision=how.precision, preferred_element_type=how.accum.dtype)

    def multiply_codes(self, left: Codes, right: Codes) -> jax.Array:
        """Returns the product of two operands that are codes and scales."""
        sums = _sum_of_codes(left.values, right.values, _numbers(left.values.ndim))
        return sums * left.scale * right.scale

    def takes_codes(self) -> bool:
        """Returns whether codes can be multiplied, whatever they are."""
        return True

    def to_lhs(self, cotangent: jax.Array, lhs: Any, rhs: jax.Array) -> Term:
        """Returns the product that is the gradient of the left operand."""
        return Term(self, cotangent, _turned(rhs))

    def to_rhs(self, cotangent: jax.Array, lhs: jax.Array, rhs: Any) -> Term:
        """Returns the product that is the gradient of the right operand."""
        return Term(self, _turned(lhs), cotangent)

    def batched(self, lhs: Any, rhs: Any, axes: tuple[int | None, int | None]) -> tuple[Term, Callable]:
        """Returns one product for a batch of them, and what puts the batch axis of its result first.

        A batch of one operand only joins that operand's kept axis, so that the other is not repeated.
        """
        if axes[0] is not None and axes[1] is not None:
            return Term(self, jnp.moveaxis(lhs, axes[0], 0), jnp.moveaxis(rhs, axes[1], 0)), lambda out: out
        if axes[0] is not None:
            wide = jnp.moveaxis(lhs, axes[0], -3)
            folded = wide.reshape((*wide.shape[:-3], -1, wide.shape[-1]))
            return Term(self, folded, rhs), lambda out: jnp.moveaxis(
                out.reshape((*wide.shape[:-1], out.shape[-1])), -3, 0
            )
        assert axes[1] is not None
        wide = jnp.moveaxis(rhs, axes[1], -2)
        folded = wide.reshape((*wide.shape[:-2], -1))
        return Term(self, lhs, folded), lambda out: jnp.moveaxis(
            out.reshape((*out.shape[:-1], *wide.shape[-2:])), -2, 0
        )


@dataclasses.dataclass(frozen=True)
class Convolution:
    """A convolution and the layout operations around it, as a float32 jaxpr of (lhs, rhs).

    What the transposes and batches of a convolution are (dilated, grouped, flipped) is left to JAX, which is asked in
    float32; what it answers is again a jaxpr with one convolution in it.
    """

    jaxpr: Any

    def shape(self, lhs: tuple[int, ...], rhs: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of the result."""
        del lhs, rhs
        return self.jaxpr.out_avals[0].shape

    def contracted(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns the axes of the left and of the right operand that are summed over: features and space."""
        [eqn] = [eqn for eqn in self.jaxpr.jaxpr.eqns if eqn.primitive.name == "conv_general_dilated"]
        numbers = eqn.params["dimension_numbers"]
        return numbers.lhs_spec[1:], numbers.rhs_spec[1:]

    def multiply(self, lhs: jax.Array, rhs: jax.Array, how: Any) -> jax.Array:
        """Returns the convolution of the operands, prepared and accumulated as `how` says."""
        values = dict(zip(self.jaxpr.jaxpr.invars, (lhs, rhs), strict=True))
        for eqn in self.jaxpr.jaxpr.eqns:
            given = [atom.val if _compat.is_literal(atom) else values[atom] for atom in eqn.invars]
            if eqn.primitive.name == "conv_general_dilated":
                out = [self._convolve(eqn, given[0], given[1], how)]
            else:
                out = _compat.bind(eqn, given)
            values.update(zip(eqn.outvars, out, strict=True))
        return values[self.jaxpr.jaxpr.outvars[0]]

    def _convolve(self, eqn: Any, lhs: jax.Array, rhs: jax.Array, how: Any) -> jax.Array:
        """Evaluates the one convolution."""
        axes = self.contracted()
        if how.codes and self.takes_codes():
            left, right = (codes_of(x, q, along) for x, q, along in zip((lhs, rhs), how.codes, axes, strict=True))
            return _convolve_codes(eqn, left, right)
        lhs, rhs = how.prepared(lhs, 0, axes[0]), how.prepared(rhs, 1, axes[1])
        if not how.accum.is_native:
            return accumulated_convolution(lhs, rhs, eqn.params, how.accum)
        changed = {"preferred_element_type": how.accum.dtype}
        if how.precision is not None:
            changed["precision"] = (how.precision, how.precision)
        return eqn.primitive.bind(lhs, rhs, **(eqn.params | changed))

    def multiply_codes(self, left: Codes, right: Codes) -> jax.Array:
        """Returns the convolution of two operands that are codes and scales; of a convolution as a model has it."""
        [eqn] = self.jaxpr.jaxpr.eqns
        return _convolve_codes(eqn, left, right)

    def takes_codes(self) -> bool:
        """Returns whether sums of codes have one scale each, and fit into int32."""
        [eqn] = [eqn for eqn in self.jaxpr.jaxpr.eqns if eqn.primitive.name == "conv_general_dilated"]
        terms = math.prod(eqn.invars[1].aval.shape[axis] for axis in self.contracted()[1])
        return eqn.params["batch_group_count"] == 1 and terms <= INT32_TERMS

    def to_lhs(self, cotangent: jax.Array, lhs: Any, rhs: jax.Array) -> Term:
        """Returns the convolution that is the gradient of the left operand."""
        return Term(_transposed(self, 0, tuple(lhs.aval.shape), rhs.shape), cotangent, rhs)

    def to_rhs(self, cotangent: jax.Array, lhs: jax.Array, rhs: Any) -> Term:
        """Returns the convolution that is the gradient of the right operand."""
        return Term(_transposed(self, 1, lhs.shape, tuple(rhs.aval.shape)), lhs, cotangent)

    def batched(self, lhs: Any, rhs: Any, axes: tuple[int | None, int | None]) -> tuple[Term, Callable]:
        """Returns one convolution for a batch of them; its batch axis is first already."""
        return Term(_vmapped(self, axes, lhs.shape, rhs.shape), lhs, rhs), lambda out: out

    def __call__(self, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        """Evaluates in float32; for tracing."""
        return _compat.evaluate_jaxpr(self.jaxpr, lhs, rhs)[0]


@functools.cache
def convolution(
    primitive: Any, params: tuple[tuple[str, Any], ...], lhs: tuple[int, ...], rhs: tuple[int, ...]
) -> Convolution:
    """Returns a convolution equation as an operation; the same object for the same convolution."""
    options = dict(params) | {"preferred_element_type": None}
    return _traced(lambda x, y: primitive.bind(x, y, **options), lhs, rhs)


@functools.cache
def _transposed(op: Convolution, operand: int, lhs: tuple[int, ...], rhs: tuple[int, ...]) -> Convolution:
    """Returns the transpose in one operand, the cotangent in its place."""
    out = op.shape(lhs, rhs)
    like = jax.ShapeDtypeStruct((lhs, rhs)[operand], jnp.float32)
    if operand == 0:
        return _traced(lambda ct, y: jax.linear_transpose(lambda x: op(x, y), like)(ct)[0], out, rhs)
    return _traced(lambda x, ct: jax.linear_transpose(lambda y: op(x, y), like)(ct)[0], lhs, out)


@functools.cache
def _vmapped(
    op: Convolution, axes: tuple[int | None, int | None], lhs: tuple[int, ...], rhs: tuple[int, ...]
) -> Convolution:
    """Returns the operation over a batch, whose axis is first in the result."""
    return _traced(jax.vmap(op, axes), lhs, rhs)


def _traced(fn: Callable, lhs: tuple[int, ...], rhs: tuple[int, ...]) -> Convolution:
    """Traces a function of two float32 arrays."""
    return Convolution(jax.make_jaxpr(fn)(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (lhs, rhs))))


def _convolve_codes(eqn: Any, left: Codes, right: Codes) -> jax.Array:
    """Returns the float32 convolution of codes under their scales."""
    pair, changed = (left.values, right.values), {"preferred_element_type": _sum_of(left.values)}
    if pair[0].dtype != pair[1].dtype:  # JAX convolves one type only; bfloat16 holds every float8 exactly
        pair = tuple(codes.astype(jnp.bfloat16) for codes in pair)
    product = eqn.primitive.bind(*pair, **(eqn.params | changed))
    numbers = eqn.params["dimension_numbers"]
    scales = (
        _along(left.scale, numbers.out_spec[0], product.ndim),
        _along(right.scale, numbers.out_spec[1], product.ndim),
    )
    return product.astype(jnp.float32) * scales[0] * scales[1]


def _numbers(ndim: int) -> Any:
    """Returns the dimension numbers of (..., M, K) times (..., K, N)."""
    leading = tuple(range(ndim - 2))
    return (((ndim - 1,), (ndim - 2,)), (leading, leading))


def _sum_of_codes(left: jax.Array, right: jax.Array, numbers: Any) -> jax.Array:
    """Returns the float32 product of (..., M, K) and (..., K, N) codes, in int32 sums too short to overflow."""
    sums = [
        lax.dot_general(
            lax.slice_in_dim(left, start, min(start + INT32_TERMS, left.shape[-1]), axis=-1),
            lax.slice_in_dim(right, start, min(start + INT32_TERMS, left.shape[-1]), axis=-2),
            numbers,
            preferred_element_type=_sum_of(left),
        ).astype(jnp.float32)
        for start in range(0, max(left.shape[-1], 1), INT32_TERMS)
    ]
    return functools.reduce(jnp.add, sums)


def _sum_of(codes: jax.Array) -> Any:
    """Returns the type in which products of codes accumulate."""
    return jnp.int32 if codes.dtype == jnp.int8 else jnp.float32


def _along(scale: jax.Array, axis: int, ndim: int) -> jax.Array:
    """Returns scales that differ along one axis, along that of the result."""
    return jnp.expand_dims(scale.reshape(-1), tuple(each for each in range(ndim) if each != axis))


def contracted_axes(eqn: Any, operand: int) -> tuple[int, ...]:
    """Returns the axes of an operand of a dot_general or convolution equation that are summed over."""
    numbers = eqn.params["dimension_numbers"]
    if eqn.primitive.name == "dot_general":
        return tuple(numbers[0][operand])
    return tuple((numbers.lhs_spec, numbers.rhs_spec)[operand][1:])


def _turned(x: jax.Array) -> jax.Array:
    """Returns an array with its last two axes in the other order."""
    return lax.transpose(x, (*range(x.ndim - 2), x.ndim - 1, x.ndim - 2))


def _ordered(x: Any, axes: tuple[int, ...]) -> Any:
    """Returns an array with its axes in this order; a NumPy array stays one."""
    if axes == tuple(range(x.ndim)):
        return x
    return lax.transpose(x, axes) if isinstance(x, jax.Array) else x.transpose(axes)


def _shaped(x: Any, shape: Sequence[int]) -> Any:
    """Returns an array in this shape; a NumPy array stays one."""
    if x.shape == tuple(shape):
        return x
    return lax.reshape(x, shape) if isinstance(x, jax.Array) else x.reshape(shape)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Brings an operand, or scales of its rank, into the shape in which it is multiplied.

    Attributes:
      groups: the axes that become one axis each: those of the batch, which may be none, the rows and the columns. None
        leaves an array as it is.
    """

    groups: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]] | None = None

    def __call__(self, x: Any) -> Any:
        """Returns an array in the shape of the product; a NumPy array stays one."""
        if self.groups is None:
            return x
        sizes = [math.prod(x.shape[axis] for axis in group) for group in self.groups]
        return _shaped(_ordered(x, sum(self.groups, ())), sizes if self.groups[0] else sizes[1:])

    def merged_into(self, axes: tuple[int, ...]) -> tuple[int, ...] | None:
        """Returns the axes that become these, of the last two of the product; None if axes change their order."""
        if self.groups is None or sum(self.groups, ()) != tuple(range(len(sum(self.groups, ())))):
            return None
        return sum((self.groups[axis] for axis in axes), ())


class Layouts(NamedTuple):
    """An operation, and what brings arrays to it: operands, or scales of their rank, and its result.

    Attributes:
      op: what is multiplied.
      operands: brings the left and the right operand into its shape.
      restore: brings the result into the shape that its equation has.
    """

    op: Any
    operands: tuple[Layout, Layout]
    restore: Callable[[jax.Array], jax.Array]


def layouts_of(eqn: Any, lhs: tuple[int, ...], rhs: tuple[int, ...]) -> Layouts:
    """Returns a product as an operation of ours, and what brings operands of these shapes to it."""
    if eqn.primitive.name == "dot_general":
        return as_matmul(lhs, rhs, eqn.params["dimension_numbers"])
    op = convolution(eqn.primitive, tuple(eqn.params.items()), lhs, rhs)
    return Layouts(op, (Layout(), Layout()), Layout())


def as_matmul(lhs: tuple[int, ...], rhs: tuple[int, ...], dimension_numbers: Any) -> Layouts:
    """Returns the matrix product that a dot_general of operands of these shapes is."""
    (lhs_contracted, rhs_contracted), (lhs_batch, rhs_batch) = dimension_numbers
    lhs_kept = [axis for axis in range(len(lhs)) if axis not in (*lhs_batch, *lhs_contracted)]
    rhs_kept = [axis for axis in range(len(rhs)) if axis not in (*rhs_batch, *rhs_contracted)]
    out = [lhs[axis] for axis in (*lhs_batch, *lhs_kept)] + [rhs[axis] for axis in rhs_kept]
    groups = (lhs_batch, lhs_kept, lhs_contracted), (rhs_batch, rhs_contracted, rhs_kept)
    operands = [Layout(tuple(map(tuple, each))) for each in groups]  # pyright: ignore[reportArgumentType]
    return Layouts(Matmul(), (operands[0], operands[1]), lambda product: _shaped(product, out))

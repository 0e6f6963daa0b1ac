"""Batches of products that quantize: every member of a batch has scales of its own, in its derivatives too.

Under `vmap` a product is one of each example, and so is what a quantizer sees. A batch of products whose operands are
only cast may be one larger product; where operands are quantized that one would give them a common scale.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from precision_lab.rewrite.bilinear import Matmul, Term


def batch_of(op: Any, operands: Any, axes: tuple[int | None, int | None]) -> Term:
    """Returns the product of a batch of operands, whose batch axis is first in the result; None for no axis."""
    pair = [x if axis is None else jnp.moveaxis(x, axis, 0) for x, axis in zip(operands, axes, strict=True)]
    return Term(Batched(op, (axes[0] is not None, axes[1] is not None, True)), *pair)


@dataclasses.dataclass(frozen=True)
class Batched:
    """A batch of one operation.

    Attributes:
      op: what is done with each example.
      has_batch: whether the left operand, the right one and the result have a first axis for the batch. A result
        without one is the sum over the batch, and then both operands have it.
    """

    op: Any
    has_batch: tuple[bool, bool, bool]

    def shape(self, lhs: tuple[int, ...], rhs: tuple[int, ...]) -> tuple[int, ...]:
        """Returns the shape of the product."""
        of_one = self.op.shape(lhs[self.has_batch[0] :], rhs[self.has_batch[1] :])
        return (*((lhs if self.has_batch[0] else rhs)[:1] if self.has_batch[2] else ()), *of_one)

    def multiply(self, lhs: jax.Array, rhs: jax.Array, how: Any) -> jax.Array:
        """Returns the products of the examples or their sum, each prepared and accumulated as `how` says.

        A sum of products that are not to be taken in a hardware type of their own is one product of all examples.
        """
        one = functools.partial(self.op.multiply, how=how)
        of_codes = how.codes and (self.has_batch[2] or how.is_native_only)
        if of_codes or not isinstance(self.op, Matmul):
            return jax.vmap(one, self._axes()[:2])(lhs, rhs) if self.has_batch[2] else _sum(one, lhs, rhs)
        pair = []
        for operand, (x, along) in enumerate(zip((lhs, rhs), self.op.contracted(), strict=True)):
            prepare = functools.partial(how.prepared, operand=operand, axes=along)
            pair.append(jax.vmap(prepare)(x) if self.has_batch[operand] else prepare(x))
        ready = _Prepared(how.accum, how.precision)
        if not self.has_batch[2]:
            wide, tall = _side_by_side(pair[0], pair[1])
            return self.op.multiply(wide, tall, ready)
        term, batch_first = self.op.batched(pair[0], pair[1], (self._axes()[0], self._axes()[1]))
        return batch_first(term.op.multiply(term.lhs, term.rhs, ready))

    def to_lhs(self, cotangent: jax.Array, lhs: Any, rhs: jax.Array) -> Term:
        """Returns the product that is the gradient of the left operand."""
        of_lhs, of_rhs, of_out = self.has_batch
        return self._transposed(
            (of_out, of_rhs, of_lhs), cotangent, rhs, lhs, lambda ct, x, y: self.op.to_lhs(ct, y, x)
        )

    def to_rhs(self, cotangent: jax.Array, lhs: jax.Array, rhs: Any) -> Term:
        """Returns the product that is the gradient of the right operand."""
        of_lhs, of_rhs, of_out = self.has_batch
        return self._transposed(
            (of_lhs, of_out, of_rhs), lhs, cotangent, rhs, lambda x, ct, y: self.op.to_rhs(ct, x, y)
        )

    def batched(self, lhs: Any, rhs: Any, axes: tuple[int | None, int | None]) -> tuple[Term, Callable]:
        """Returns one product for a batch of them, and what puts the batch axis of its result first."""
        return batch_of(self, (lhs, rhs), axes), lambda out: out

    def _axes(self) -> tuple[int | None, ...]:
        """Returns the batch axis of both operands and the result."""
        return tuple(0 if has else None for has in self.has_batch)

    def _transposed(
        self, has_batch: tuple[bool, bool, bool], lhs: jax.Array, rhs: jax.Array, of: Any, transpose: Callable
    ) -> Term:
        """Returns the batch of what `transpose(lhs, rhs, of)` makes of each example; `of` has a shape only."""
        like = SimpleNamespace(aval=jax.ShapeDtypeStruct(of.aval.shape[has_batch[2] :], of.aval.dtype))
        found = []

        def of_one(lhs: jax.Array, rhs: jax.Array) -> tuple[jax.Array, jax.Array]:
            term = transpose(lhs, rhs, like)
            found.append(term.op)
            return term.lhs, term.rhs

        axes = tuple(0 if has else None for has in has_batch[:2])
        operands = jax.vmap(of_one, axes, axes)(lhs, rhs)
        return Term(Batched(found[0], has_batch), *operands)


class _Prepared(NamedTuple):
    """What a product asks of a `Casting`, for operands that are prepared already."""

    accum: Any
    precision: Any
    codes: None = None

    def prepared(self, x: jax.Array, operand: int, axes: tuple[int, ...]) -> jax.Array:
        """Returns an operand as it is."""
        del operand, axes
        return x


def _side_by_side(lhs: jax.Array, rhs: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns the matrices whose product is the sum of the products of a batch."""
    wide, tall = jnp.moveaxis(lhs, 0, -2), jnp.moveaxis(rhs, 0, -3)
    count = wide.shape[-2] * wide.shape[-1]
    return wide.reshape((*wide.shape[:-2], count)), tall.reshape((*tall.shape[:-3], count, tall.shape[-1]))


def _sum(one: Callable, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    """Returns the sum of the products of a batch, taken one after the other."""
    if not len(lhs):
        like = jax.eval_shape(one, *(jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in (lhs, rhs)))
        return jnp.zeros(like.shape, like.dtype)
    first, rest = one(lhs[0], rhs[0]), (lhs[1:], rhs[1:])
    return lax.scan(lambda total, pair: (total + one(*pair), None), first, rest)[0]

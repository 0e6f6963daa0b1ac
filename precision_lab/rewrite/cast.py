"""The cast treatment: a product whose three products, forward and backward, all have operands in the compute format.

Casting the operands and leaving the derivative to JAX multiplies a float32 cotangent with a low-precision operand,
which no matrix unit does. So these products own their derivative: the tangent of a product is taken by a bilinear
primitive of ours, whose transpose casts the cotangent too and is again such a product. It works in forward and reverse
mode, to any order, under every transformation; what runs are ordinary dot_generals and convolutions.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from precision_lab.formats import Format, round_to
from precision_lab.rewrite import _compat
from precision_lab.rewrite.bilinear import Term, as_matmul, convolution

NATIVE = frozenset(("float16", "bfloat16", "float32", "float64"))


@dataclasses.dataclass(frozen=True)
class Casting:
    """How one product is computed.

    Attributes:
      compute, accum: formats of operands and accumulator.
      result: dtype of the result.
      parameters: which operands are parameters. Those are kept for the backward pass as they are and cast again there,
        since they stay alive anyway; the others are kept in the compute format, at half the memory or less.
    """

    compute: Format
    accum: Format
    result: Any
    parameters: tuple[bool, bool]

    def cast(self, x: jax.Array) -> jax.Array:
        """Returns `x` in the compute format: in its dtype where XLA multiplies that, else on its grid in float32."""
        if self.compute.name in NATIVE:
            return x.astype(self.compute.dtype)
        return round_to(x.astype(jnp.float32), self.compute)

    def kept(self, x: jax.Array, operand: int) -> jax.Array:
        """Returns what the derivative needs of an operand."""
        return x if self.parameters[operand] else self.cast(x)

    def with_cotangent_for(self, operand: int, dtype: Any) -> Casting:
        """Returns the casting of the product that is the gradient of an operand of `dtype`."""
        parameters = tuple(flag and i != operand for i, flag in enumerate(self.parameters))
        return dataclasses.replace(self, result=dtype, parameters=parameters)


def cast_product(eqn: Any, lhs: jax.Array, rhs: jax.Array, how: Casting, *, of_tangents: bool = False) -> jax.Array:
    """Evaluates a dot_general or conv_general_dilated equation as `how` says.

    Args:
      eqn: the equation.
      lhs, rhs: its operands.
      how: formats.
      of_tangents: whether an operand may be a tangent. Then JAX will transpose the product rather than differentiate
        it, for which it has to be the bilinear primitive itself.
    """
    take = _bilinear_product if of_tangents else _product
    if eqn.primitive.name == "dot_general":
        term, restore = as_matmul(lhs, rhs, eqn.params["dimension_numbers"])
        return restore(take(term, how))
    op = convolution(eqn.primitive, tuple(eqn.params.items()), lhs.shape, rhs.shape)
    return take(Term(op, lhs, rhs), how)


def _product(term: Term, how: Casting) -> jax.Array:
    """Returns a product with its own derivative."""
    return _with_derivative(term.op, how)(term.lhs, term.rhs)


def _bilinear_product(term: Term, how: Casting) -> jax.Array:
    """Returns a product that can be transposed in either operand."""
    return _bilinear.bind(term.lhs, term.rhs, op=term.op, how=how)


@functools.lru_cache(maxsize=4096)
def _with_derivative(op: Any, how: Casting) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """Returns the function of two operands that `op` under `how` is."""

    @jax.custom_jvp
    def product(lhs: jax.Array, rhs: jax.Array) -> jax.Array:
        return _evaluate(lhs, rhs, op=op, how=how)

    def jvp(primals: Any, tangents: Any) -> tuple[jax.Array, Any]:
        lhs, rhs = primals
        pairs = ((tangents[0], how.kept(rhs, 1)), (how.kept(lhs, 0), tangents[1]))
        terms = [
            _bilinear_product(Term(op, *pair), how)
            for pair, tangent in zip(pairs, tangents, strict=True)
            if not isinstance(tangent, SymbolicZero)
        ]
        return product(lhs, rhs), functools.reduce(jnp.add, terms)

    product.defjvp(jvp, symbolic_zeros=True)
    return product


def _evaluate(lhs: jax.Array, rhs: jax.Array, *, op: Any, how: Casting) -> jax.Array:
    """Takes the product of the cast operands."""
    return op.multiply(how.cast(lhs), how.cast(rhs), how.accum.dtype).astype(how.result)


def _gradient_of_lhs(cotangent: jax.Array, lhs: Any, rhs: jax.Array, *, op: Any, how: Casting) -> jax.Array:
    """Transposes in the left operand."""
    return _product(op.to_lhs(cotangent, lhs, rhs), how.with_cotangent_for(0, lhs.aval.dtype))


def _gradient_of_rhs(cotangent: jax.Array, lhs: jax.Array, rhs: Any, *, op: Any, how: Casting) -> jax.Array:
    """Transposes in the right operand."""
    return _product(op.to_rhs(cotangent, lhs, rhs), how.with_cotangent_for(1, rhs.aval.dtype))


def _batched(operands: Any, axes: Any, *, op: Any, how: Casting) -> tuple[jax.Array, int]:
    """Takes the products of a batch at once."""
    term, batch_first = op.batched(*operands, axes)
    return batch_first(_bilinear_product(term, how)), 0


_bilinear = _compat.bilinear_primitive(
    "policy_product",
    evaluate=_evaluate,
    shape=lambda lhs, rhs, *, op, how: (op.shape(lhs, rhs), how.result),
    gradient_of_lhs=_gradient_of_lhs,
    gradient_of_rhs=_gradient_of_rhs,
    batched=_batched,
)

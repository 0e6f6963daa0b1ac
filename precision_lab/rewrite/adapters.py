"""Adapters: a product of low rank beside the product of a weight, y = x W + factor (x A) B."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from precision_lab.formats import FormatParams
from precision_lab.policy import Treatment
from precision_lab.rewrite.bilinear import Matmul, Term, layouts_of
from precision_lab.rewrite.cast import casting_of, product_of
from precision_lab.rewrite.traced_compute import product_under_params


class Adapter(NamedTuple):
    """What is added to a weight that is the matrix (in, out) of its product.

    Attributes:
      a: (in, rank).
      b: (rank, out).
      factor: scalar.
    """

    a: Any
    b: Any
    factor: Any


def is_matrix(eqn: Any, operand: int) -> bool:
    """Returns whether an operand of an equation is one matrix: not of a convolution, and not a stack of them."""
    return eqn.primitive.name == "dot_general" and not eqn.params["dimension_numbers"][1][operand]


def adapted(
    eqn: Any,
    x: jax.Array,
    out: jax.Array,
    adapter: Adapter,
    operand: int,
    treatment: Treatment,
    compute: FormatParams | None = None,
) -> jax.Array:
    """Returns a product with its adapter's added, which runs in the compute format without quantizers.

    Args:
      eqn: the dot_general.
      x: the operand that is not the weight.
      out: the product.
      adapter: what is added.
      operand: which operand the weight is.
      treatment: how the product is computed.
      compute: numbers in place of its compute format's.
    """
    layouts = layouts_of(eqn, eqn.invars[0].aval.shape, eqn.invars[1].aval.shape)
    plain = Treatment(compute=treatment.compute, accum=treatment.accum, execution=treatment.execution)
    x = layouts.operands[1 - operand](x)
    rows = x if operand == 1 else x.swapaxes(-1, -2)  # (..., rows, in)
    low = _product(rows, adapter.a, plain, compute)
    added = _product(low * jnp.asarray(adapter.factor, low.dtype), adapter.b, plain, compute)
    return out + layouts.restore(added if operand == 1 else added.swapaxes(-1, -2)).astype(out.dtype)


def _product(x: jax.Array, weight: jax.Array, treatment: Treatment, compute: FormatParams | None) -> jax.Array:
    """Returns (rows, in) times (in, out), float32."""
    how, _ = casting_of(treatment, (False, True), jnp.dtype(jnp.float32))
    take = lambda lhs, rhs, how: product_of(Term(Matmul(), lhs, rhs), how)  # noqa: E731
    return take(x, weight, how) if compute is None else product_under_params(take, x, weight, how, compute)

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
from jax import lax
from jax.custom_derivatives import SymbolicZero

from precision_lab.formats import Format, format, round_to
from precision_lab.policy import Accumulator, Treatment
from precision_lab.quant.core import Given
from precision_lab.rewrite import _compat
from precision_lab.rewrite.batched import batch_of
from precision_lab.rewrite.bilinear import Layout, Layouts, Matmul, Term, layouts_of
from precision_lab.rewrite.held import Numbers, axes_before, quantized_by, takes_codes
from precision_lab.rewrite.outliers import Outliers, decomposed
from precision_lab.rewrite.packed import block_rows, product_in_blocks
from precision_lab.rewrite.parameters import dense, is_stored
from precision_lab.rewrite.quantized import (
    NOTHING_GIVEN,
    Codes,
    fake_quantized,
    fake_quantized_and_codes,
    have_codes,
    why_no_codes,
)

PRODUCT = "policy_product"  # what our products go by, as functions and as a primitive
NATIVE = frozenset(("float16", "bfloat16", "float32", "float64"))
FLOAT32 = format("float32")
Pair = tuple[Any, Any]


@dataclasses.dataclass(frozen=True)
class Operand:
    """What becomes of one operand of a product before it is multiplied.

    Attributes:
      is_parameter: whether it is a parameter. Those are kept for the backward pass as they are and cast again there,
        since they stay alive anyway; the others are kept as the product needs them, at half the memory or less.
      quantizer: how it is quantized, along the axes that the product contracts; None for a cast.
    """

    is_parameter: bool = False
    quantizer: Any = None


@dataclasses.dataclass(frozen=True)
class Casting:
    """How one product is computed, and the two that are its gradients.

    Attributes:
      compute: format of the operands.
      accum: what the product accumulates in.
      result: dtype of the result.
      operands: the left and the right one.
      cotangent: the operand that takes the place of one of them in the gradients.
      dgrad, wgrad: format of the operands of the gradient of an operand that is no parameter, or is one.
      requantized: which of the gradients, of the left and of the right operand, quantize theirs again, along the axes
        that they contract.
      native: whether operands are of the format's dtype; else they are values on its grid in float32.
      outliers: which features are not quantized, None if all are.
      is_native_only: whether codes have to be multiplied as codes, and not as their values.
    """

    compute: Format
    accum: Accumulator
    result: Any
    operands: tuple[Operand, Operand]
    cotangent: Operand
    dgrad: Format
    wgrad: Format
    requantized: tuple[bool, bool]
    native: bool
    outliers: Outliers | None = None
    is_native_only: bool = False

    @property
    def sees_whole_arrays(self) -> bool:
        """Whether what becomes of a number in some operand or gradient depends on others around it."""
        quantizers = [one.quantizer for one in (*self.operands, self.cotangent) if one.quantizer is not None]
        return any(q.is_scaled or q.format.kind == "block" or q.rounding == "stochastic" for q in quantizers)

    def prepared(self, x: jax.Array, operand: int, axes: tuple[int, ...]) -> jax.Array:
        """Returns an operand as it is multiplied, by a product that contracts `axes` of it."""
        quantizer = self.operands[operand].quantizer
        return self.cast(x if quantizer is None else fake_quantized(x, quantizer, axes), self.compute)

    def cast(self, x: jax.Array, fmt: Format) -> jax.Array:
        """Returns `x` in a format: in its dtype where that is multiplied, else on its grid in float32."""
        if fmt.name in ("float32", "float64"):
            return x.astype(fmt.dtype)
        if not self.native or fmt.dtype is None:
            return round_to(x.astype(jnp.float32), fmt)
        return (round_to(x, fmt) if fmt.bits < 16 else x).astype(fmt.dtype)

    @property
    def codes(self) -> tuple[Any, Any] | None:
        """The quantizers of both operands if their codes can be multiplied in place of their values, else None."""
        pair = self.operands[0].quantizer, self.operands[1].quantizer
        takes_codes = self.native and self.accum.is_native and self.outliers is None
        return pair if takes_codes and have_codes(*pair) else None

    @property
    def precision(self) -> Any:
        """Precision of the product: operands of more than 10 mantissa bits in float32 would lose some in TF32."""
        simulated = not self.native or any(operand.quantizer is not None for operand in self.operands)
        return lax.Precision.HIGHEST if simulated and self.compute.mantissa_bits > 10 else None

    def kept(self, x: jax.Array, operand: int) -> jax.Array:
        """Returns what the gradient of the other operand needs of this one."""
        one = self.operands[operand]
        if one.is_parameter or (one.quantizer is not None and self.requantized[1 - operand]):
            return x
        return self.cast(x, self._gradient_format(1 - operand))

    def _gradient_format(self, operand: int) -> Format:
        """Returns the format of the operands of an operand's gradient."""
        return self.wgrad if self.operands[operand].is_parameter else self.dgrad

    def with_cotangent_for(self, operand: int, dtype: Any) -> Casting:
        """Returns the casting of the product that is the gradient of an operand of `dtype`."""
        other, fmt = self.operands[1 - operand], self._gradient_format(operand)
        quantizes = self.requantized[operand]
        pair = [other if quantizes else dataclasses.replace(other, quantizer=None)]
        pair.insert(operand, self.cotangent if quantizes else Operand())
        if have_both(pair):
            fmt = FLOAT32
        return dataclasses.replace(self, compute=fmt, dgrad=fmt, wgrad=fmt, result=dtype, operands=tuple(pair))

    def with_tangent(self, operand: int) -> Casting:
        """Returns the casting of the product in which the tangent of an operand stands in its place."""
        pair = list(self.operands)
        if not self.requantized[operand]:
            pair[1 - operand] = dataclasses.replace(pair[1 - operand], quantizer=None)
        pair[operand] = dataclasses.replace(self.cotangent, is_parameter=pair[operand].is_parameter)
        return dataclasses.replace(self, operands=tuple(pair))


def have_both(operands: Any) -> bool:
    """Returns whether both operands are quantized: then their grid is their format, and no cast follows."""
    return all(operand.quantizer is not None for operand in operands)


def casting_of(
    treatment: Treatment, parameters: tuple[bool, bool], result: Any
) -> tuple[Casting, tuple[Any, Any] | None]:
    """Returns how a product is computed under a treatment, and the quantizers that come before it, if any do.

    With backward="quantized" operands are quantized before the product, so that its gradients multiply what it
    multiplied and a quantizer's estimator has its say; else each of the three products quantizes its own.

    Args:
      treatment: what the policy says at the site.
      parameters: which operands are parameters.
      result: dtype of the result.

    Raises:
      ValueError: execution="native" of what has no arithmetic of its own.
    """
    compute = treatment.compute
    left, right = (Operand(*each) for each in zip(parameters, quantizers_of(treatment, parameters), strict=True))
    backward = treatment.backward or ("requantized" if treatment.gradient is not None else "quantized")
    overrides = [treatment.wgrad if is_parameter else treatment.dgrad for is_parameter in parameters]
    again = tuple(backward == "requantized" and override is None for override in overrides)
    casting = Casting(
        compute=FLOAT32 if have_both((left, right)) else compute,
        accum=treatment.accum,
        result=result,
        operands=(left, right),
        cotangent=Operand(quantizer=treatment.gradient),
        dgrad=treatment.dgrad or compute,
        wgrad=treatment.wgrad or compute,
        requantized=again,  # pyright: ignore[reportArgumentType]
        native=_is_native(treatment, (left, right)),
        outliers=_outliers(treatment, parameters),
        is_native_only=treatment.execution == "native",
    )
    before = left.quantizer, right.quantizer
    return casting, before if backward == "quantized" and any(before) else None


def _outliers(treatment: Treatment, parameters: tuple[bool, bool]) -> Outliers | None:
    """Returns which features of the activation that meets a parameter are not quantized."""
    if treatment.outliers is None or parameters.count(True) != 1:
        return None
    return Outliers(treatment.outliers, treatment.compute, parameters.index(False))


def _is_native(treatment: Treatment, operands: tuple[Operand, Operand]) -> bool:
    """Returns whether a product runs in the arithmetic of its formats' own types."""
    compute = treatment.compute
    if treatment.execution != "native":
        return treatment.execution == "auto" and compute.name in NATIVE
    if not have_both(operands) and compute.dtype is None:
        raise ValueError(f"execution=native: no array dtype holds compute={compute.name}; leave it simulated.")
    left, right = (operand.quantizer for operand in operands)
    pairs = [(left, right), (treatment.gradient, right), (left, treatment.gradient)]
    for pair in pairs if treatment.gradient else pairs[:1]:
        if all(pair) and (why := why_no_codes(*pair)):
            raise ValueError(f"execution=native: {why}; leave it simulated.")
    return True


def quantizers_of(treatment: Treatment, parameters: tuple[bool, bool]) -> tuple[Any, Any]:
    """Returns the quantizer of each operand: the weight's of a parameter, the activation's of what meets one."""
    if not any(parameters):
        return treatment.attention, treatment.attention
    left, right = (treatment.weight if is_parameter else treatment.activation for is_parameter in parameters)
    return left, right


def cast_product(
    eqn: Any,
    lhs: Any,
    rhs: Any,
    how: Casting,
    *,
    before: tuple[Any, Any] | None = None,
    of_tangents: bool = False,
    given: tuple[Any, Any] = (NOTHING_GIVEN, NOTHING_GIVEN),
) -> jax.Array:
    """Evaluates a dot_general or conv_general_dilated equation as `how` says.

    Args:
      eqn: the equation.
      lhs, rhs: its operands: arrays, or parameters as they are stored, which are quantized already.
      how: formats.
      before: quantizer of each operand before the product, whose estimators take part in the derivative.
      of_tangents: whether an operand may be a tangent. Then JAX will transpose the product rather than differentiate
        it, for which it has to be the bilinear primitive itself.
      given: of each operand, what its quantizer is not to find itself, in the shape that scales have in a matrix
        product, or scalars; or a state, whose values are always multiplied as they are, not as codes.
    """
    layouts = layouts_of(eqn, lhs.shape, rhs.shape)
    if before is not None:
        return layouts.restore(_product_of_quantized(layouts, (lhs, rhs), how, before, given))
    operands = (layout(dense(x)) for layout, x in zip(layouts.operands, (lhs, rhs), strict=True))
    return layouts.restore((_bilinear_product if of_tangents else product_of)(Term(layouts.op, *operands), how))


def product_of(term: Term, how: Casting) -> jax.Array:
    """Returns a product with its own derivative."""
    return _with_derivative(term.op, how)(term.lhs, term.rhs)


def _bilinear_product(term: Term, how: Casting) -> jax.Array:
    """Returns a product that can be transposed in either operand."""
    return _bilinear.bind(term.lhs, term.rhs, op=term.op, how=how)


def _product_of_quantized(
    layouts: Layouts, operands: Pair, how: Casting, before: Pair, given: tuple[Any, Any]
) -> jax.Array:
    """Returns the product of operands that are quantized first: of their codes where `how` can, else of values."""
    sides = list(zip(operands, before, layouts.op.contracted(), layouts.operands, given, strict=True))
    plain = dataclasses.replace(how, operands=tuple(dataclasses.replace(one, quantizer=None) for one in how.operands))
    if how.outliers is not None:
        return product_of(Term(layouts.op, *decomposed(layouts, operands, before, given, how.outliers)), plain)
    if (
        how.codes is None
        and how.accum.is_native
        and isinstance(layouts.op, Matmul)
        and (rows := block_rows(operands[1]))
    ):
        return _product_in_blocks(_values(*sides[0]), operands[1], rows, how)
    if how.codes is None or not layouts.op.takes_codes() or not all(map(takes_codes, given)):
        return product_of(Term(layouts.op, *(_values(*side) for side in sides)), plain)
    values, codes = zip(*(_values_and_codes(*side) for side in sides), strict=True)
    return _with_derivative(layouts.op, plain, how)(*values, *(part for each in codes for part in each))


def _product_in_blocks(x: jax.Array, weight: Any, rows: int, how: Casting) -> jax.Array:
    """Returns the product of an operand and a large weight that is stored."""
    plain = dataclasses.replace(how, operands=tuple(dataclasses.replace(one, quantizer=None) for one in how.operands))
    plain = dataclasses.replace(plain, result=jnp.dtype(jnp.float32))
    total = product_in_blocks(x, weight, rows, lambda part, block: product_of(Term(Matmul(), part, block), plain))
    return as_result(total, how)


def _values(x: Any, quantizer: Any, axes: tuple[int, ...], layout: Layout, given: Any) -> jax.Array:
    """Returns an operand on the grid of its quantizer, in the shape in which it is multiplied."""
    if is_stored(x):
        return layout(x.values())
    x = dense(x)
    if quantizer is None:
        return layout(x)
    if early := axes_before(layout, quantizer, axes, given):
        return layout(quantized_by(x, quantizer, early, given))
    return quantized_by(layout(x), quantizer, axes, given)


def _values_and_codes(
    x: Any, quantizer: Any, axes: tuple[int, ...], layout: Layout, given: Given | Numbers
) -> tuple[jax.Array, Codes]:
    """Returns the values of an operand, its codes and their scales, in the shape in which they are multiplied."""
    if is_stored(x):
        return layout(x.values()), Codes(*map(layout, x.codes()))
    x = dense(x)
    known, params = (given.given, given.params) if isinstance(given, Numbers) else (given, None)
    if early := axes_before(layout, quantizer, axes, given):
        value, codes = fake_quantized_and_codes(x, quantizer, early, known, params)
        return layout(value), Codes(*map(layout, codes))
    return fake_quantized_and_codes(layout(x), quantizer, axes, known, params)


@functools.lru_cache(maxsize=4096)
def _with_derivative(op: Any, how: Casting, forward: Casting | None = None) -> Callable[..., jax.Array]:
    """Returns the function of two operands that `op` under `how` is.

    With `forward` it is a function of six: of the derivative's operands, and of the codes and scales of each, whose
    product is the value.
    """

    def evaluate(lhs: jax.Array, rhs: jax.Array, *codes: jax.Array) -> jax.Array:
        if forward is None:
            return _evaluate(lhs, rhs, op=op, how=how)
        return as_result(op.multiply_codes(Codes(*codes[:2]), Codes(*codes[2:])), forward)

    evaluate.__name__ = PRODUCT
    product = jax.custom_jvp(evaluate)

    def jvp(primals: Any, tangents: Any) -> tuple[jax.Array, Any]:
        (lhs, rhs, *codes), tangents = primals, tangents[:2]
        pairs = ((tangents[0], how.kept(rhs, 1)), (how.kept(lhs, 0), tangents[1]))
        terms = [
            _bilinear_product(Term(op, *pair), how.with_tangent(operand))
            for operand, (pair, tangent) in enumerate(zip(pairs, tangents, strict=True))
            if not isinstance(tangent, SymbolicZero)
        ]
        return product(lhs, rhs, *codes), functools.reduce(lax.add, terms)

    product.defjvp(jvp, symbolic_zeros=True)
    return product


def _evaluate(lhs: jax.Array, rhs: jax.Array, *, op: Any, how: Casting) -> jax.Array:
    """Takes the product of the cast operands."""
    return as_result(op.multiply(lhs, rhs, how), how)


def as_result(out: jax.Array, how: Casting) -> jax.Array:
    """Returns a product in the dtype of its result."""
    info = jnp.finfo(how.result)
    if info.bits >= 32:
        return out.astype(how.result)
    # XLA may drop the rounding of a cast that is undone later, but neither of these. reduce_precision has no
    # subnormals, so it serves only where the result has the exponents of float32.
    if info.nexp == jnp.finfo(jnp.float32).nexp:
        return lax.reduce_precision(out, info.nexp, info.nmant).astype(how.result)
    return lax.optimization_barrier(out.astype(how.result))


def _gradient_of_lhs(cotangent: jax.Array, lhs: Any, rhs: jax.Array, *, op: Any, how: Casting) -> jax.Array:
    """Transposes in the left operand."""
    return product_of(op.to_lhs(cotangent, lhs, rhs), how.with_cotangent_for(0, lhs.aval.dtype))


def _gradient_of_rhs(cotangent: jax.Array, lhs: jax.Array, rhs: Any, *, op: Any, how: Casting) -> jax.Array:
    """Transposes in the right operand."""
    return product_of(op.to_rhs(cotangent, lhs, rhs), how.with_cotangent_for(1, rhs.aval.dtype))


def _batched(operands: Any, axes: Any, *, op: Any, how: Casting) -> tuple[jax.Array, int]:
    """Takes the products of a batch at once."""
    if how.sees_whole_arrays:
        return _bilinear_product(batch_of(op, operands, axes), how), 0
    term, batch_first = op.batched(*operands, axes)
    return batch_first(_bilinear_product(term, how)), 0


_bilinear = _compat.bilinear_primitive(
    PRODUCT,
    evaluate=_evaluate,
    shape=lambda lhs, rhs, *, op, how: (op.shape(lhs, rhs), how.result),
    gradient_of_lhs=_gradient_of_lhs,
    gradient_of_rhs=_gradient_of_rhs,
    batched=_batched,
)

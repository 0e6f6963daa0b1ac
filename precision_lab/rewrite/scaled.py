"""Products whose operands and cotangent are quantized under scales that come from outside, one for each tensor.

With y = s_l s_r P(x / s_l, w / s_r), where P rounds its operands to their formats as they are, the gradients of P see a
cotangent that has to be divided by a scale of its own before it is rounded. So the scales enter and leave through two
functions whose derivatives multiply by other scales than they do forward.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from precision_lab.policy import Treatment
from precision_lab.quant import Quantizer
from precision_lab.rewrite.cast import Casting, cast_product

ROLES = ("lhs", "rhs", "output_cotangent")


class Amaxes(NamedTuple):
    """The magnitudes that scales are made of.

    Attributes:
      by_role: float32 scalar of each of `ROLES`; none of the cotangent where that is not quantized.
      margin: bits of headroom.
    """

    by_role: Mapping[str, Any]
    margin: int

    def scale(self, role: str, quantizer: Quantizer) -> jax.Array:
        """Returns real / code: the magnitude over the largest value of the format, 1 for a magnitude of zero."""
        amax = jnp.asarray(self.by_role[role], jnp.float32)
        return jnp.where(amax > 0, amax / jnp.float32(quantizer.format.max) * jnp.float32(2.0**self.margin), 1)


def scaled_product(
    eqn: Any, lhs: jax.Array, rhs: jax.Array, how: Casting, amaxes: Amaxes, *, before: bool
) -> jax.Array:
    """Evaluates a product under given scales.

    Args:
      eqn: dot_general or conv_general_dilated equation.
      lhs, rhs: its operands.
      how: how it is computed; its quantizers, all with one scale for each tensor, are used without their own.
      amaxes: what the scales are made of. Values beyond the largest of a format become that.
      before: whether operands are quantized before the product, see `casting_of`.
    """
    left, right = (operand.quantizer for operand in how.operands)
    gradient = how.cotangent.quantizer
    bare = dataclasses.replace(
        how,
        operands=tuple(dataclasses.replace(one, quantizer=unscaled(one.quantizer)) for one in how.operands),
        cotangent=dataclasses.replace(how.cotangent, quantizer=gradient and unscaled(gradient)),
        result=np.dtype(np.float32),  # sums of codes are large; the result gets its dtype under its scale
    )
    of_lhs, of_rhs = amaxes.scale("lhs", left), amaxes.scale("rhs", right)
    of_gradient = amaxes.scale("output_cotangent", gradient) if gradient else jnp.float32(1)
    lhs = _entering(lhs.astype(jnp.float32), of_lhs, of_rhs * of_gradient, _limit(left))
    rhs = _entering(rhs.astype(jnp.float32), of_rhs, of_lhs * of_gradient, _limit(right))
    pair = (bare.operands[0].quantizer, bare.operands[1].quantizer) if before else None
    product = cast_product(eqn, lhs, rhs, bare, before=pair)
    out = _leaving(product, of_lhs * of_rhs, of_gradient, _limit(gradient) if gradient else float("inf"))
    return out.astype(how.result)


def unscaled(quantizer: Quantizer) -> Quantizer:
    """Returns the quantizer that rounds to the same format without a scale."""
    return dataclasses.replace(quantizer, scheme="unscaled", calibration=None)


def takes_scales(quantizer: Quantizer | None) -> bool:
    """Returns whether one scale for the whole tensor, found from its amax, is all that a quantizer says."""
    if quantizer is None or quantizer.format.kind not in ("int", "float"):
        return False
    plain = Quantizer(quantizer.format, granularity="tensor", rounding=quantizer.rounding)
    return quantizer == plain and quantizer.is_scaled


def scaled_roles(treatment: Treatment, has_parameter: bool) -> tuple[str, ...]:
    """Returns the tensors at a site that take given scales; none where one of its quantizers needs its own."""
    operands = (treatment.activation, treatment.weight) if has_parameter else (treatment.attention,) * 2
    if not all(map(takes_scales, operands)) or not treatment.accum.is_native or treatment.outliers is not None:
        return ()
    if treatment.gradient is None:
        return ROLES[:2]
    return ROLES if takes_scales(treatment.gradient) else ()


def _limit(quantizer: Quantizer) -> float:
    return float(quantizer.format.max)


@jax.custom_vjp
def _entering(x: jax.Array, scale: Any, of_others: Any, limit: Any) -> jax.Array:
    """Returns `x` in units of its scale, within the format; its gradient takes on the scales of the other factors."""
    return jnp.clip(x / jnp.broadcast_to(scale, x.shape), -limit, limit)


def _entering_forward(x: jax.Array, scale: Any, of_others: Any, limit: Any) -> tuple[jax.Array, Any]:
    return _entering(x, scale, of_others, limit), of_others


def _entering_backward(of_others: Any, cotangent: jax.Array) -> tuple[Any, ...]:
    return cotangent * of_others, None, None, None


_entering.defvjp(_entering_forward, _entering_backward)


@jax.custom_vjp
def _leaving(product: jax.Array, scale: Any, of_gradient: Any, limit: Any) -> jax.Array:
    """Returns a product of codes with its scale; its cotangent comes in units of the gradient's."""
    return product * scale


def _leaving_forward(product: jax.Array, scale: Any, of_gradient: Any, limit: Any) -> tuple[jax.Array, Any]:
    return product * scale, (of_gradient, limit)


def _leaving_backward(kept: Any, cotangent: jax.Array) -> tuple[Any, ...]:
    of_gradient, limit = kept
    return jnp.clip(cotangent / jnp.broadcast_to(of_gradient, cotangent.shape), -limit, limit), None, None, None


_leaving.defvjp(_leaving_forward, _leaving_backward)

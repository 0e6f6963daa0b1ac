"""Gradients through rounding, whose true derivative is zero almost everywhere and of no use."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from precision_lab.formats.catalogue import format
from precision_lab.formats.scalar import Format

# Besides these, the format that cotangents are rounded to.
GRADIENTS: dict[str, str] = {
    "straight_through": "the cotangent as it is",
    "clipped": "the cotangent where the input is in the range of the format, zero elsewhere",
    "zero": "zero",
}


def check_gradient(gradient: Any) -> None:
    """Refuses what is neither a name of `GRADIENTS` nor a format."""
    if isinstance(gradient, str) and gradient in GRADIENTS:
        return
    try:
        format(gradient)
    except (TypeError, ValueError) as error:
        raise ValueError(f"gradient must be one of {', '.join(GRADIENTS)} or a format, got {gradient!r}.") from error


def tangent(x: jax.Array, least: Any, most: Any, t: jax.Array, gradient: Any) -> jax.Array:
    """Returns the tangent of `x` rounded to a format with values from `least` to `most`."""
    if gradient == "zero":
        return jnp.zeros_like(t)
    if gradient != "clipped":
        return t
    inside = (x >= jnp.asarray(least, x.dtype)) & (x <= jnp.asarray(most, x.dtype))
    return jnp.where(inside, t, jnp.zeros_like(t))


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def round_cotangent(y: jax.Array, fmt: Format) -> jax.Array:
    """Returns `y`; its cotangent is rounded to `fmt`, to nearest even, and overflows as the format does."""
    return y


def _forward(y: jax.Array, fmt: Format) -> tuple[jax.Array, None]:
    return y, None


def _backward(fmt: Format, residuals: None, cotangent: jax.Array) -> tuple[jax.Array]:
    from precision_lab.formats.rounding import round_to

    return (round_to(cotangent, fmt),)


round_cotangent.defvjp(_forward, _backward)

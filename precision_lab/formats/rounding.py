"""round_to: arrays rounded to a format inside JAX, exactly, whatever XLA does around it."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from precision_lab.formats import kernel
from precision_lab.formats.catalogue import format
from precision_lab.formats.containers import as_float, as_word, from_bits, to_bits, within
from precision_lab.formats.options import check_rounding, check_subnormals, overflow_action
from precision_lab.formats.params import FormatParams, layout_of
from precision_lab.formats.scalar import Format


def round_to(
    x: Any, fmt: Any, *, rounding: str = "nearest_even", overflow: str | None = None, subnormals: str = "keep"
) -> jax.Array:
    """Returns `x` with every element on the grid of `fmt`, in the dtype of `x`.

    The result is the correctly rounded one, bit for bit, on every backend: the arithmetic is on integers, so neither
    excess precision, nor flushed subnormals, nor fused multiply-adds can change it. The gradient is straight through:
    the tangent of the result is the tangent of `x`.

    Args:
      x: floating array of any shape; float16, bfloat16, float32, or float64 under `jax_enable_x64`. Python floats
        are taken in JAX's default float dtype.
      fmt: a format or its name, which is compiled in; or `FormatParams`, which may be traced, stacked and vmapped.
      rounding: one of `ROUNDINGS`, which says what each does.
      overflow: what becomes of a value that rounds beyond the largest one: "saturate", "inf" or "nan"; None is
        "native", as the format's specification has it. A rounding directed towards zero stops at the largest value.
        Under "saturate" infinities become the largest value too.
      subnormals: "keep".

    Returns:
      An array like `x`. NaN stays NaN, also where the format has none, so that bad inputs stay visible. Zero keeps
      its sign where the format has a negative zero. Where the format reaches beyond the dtype of `x`, the largest
      value is the largest that both have.

    Raises:
      TypeError: `x` is not floating, or float64 without x64, where JAX would have rounded it before us.
      ValueError: an unknown format or option, or one that the format or dtype cannot honour.
    """
    check_rounding(rounding)
    check_subnormals(subnormals)
    x = _floating(x)
    if isinstance(fmt, FormatParams):
        if overflow is not None:
            raise ValueError(f"overflow={overflow!r} with FormatParams: give it to Format.params() or stack_formats().")
        _check_words(x, fmt)
        return _round_traced(x, fmt, rounding)
    fmt = format(fmt)
    return _round_static(x, fmt, rounding, overflow_action(fmt, overflow))


def _floating(x: Any) -> jax.Array:
    """Returns `x` as a JAX array if that keeps its values; raises TypeError otherwise."""
    given = np.dtype(getattr(x, "dtype", jnp.result_type(float)))
    if given == np.float64 and not jax.config.jax_enable_x64:  # pyright: ignore[reportAttributeAccessIssue]
        raise TypeError(
            "round_to got float64 while jax_enable_x64 is off: JAX would round it to float32 first. "
            "Pass x.astype(np.float32) if that is meant, or enable x64."
        )
    array = jnp.asarray(x)
    if array.dtype not in (jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64):
        raise TypeError(f"round_to expects float16, bfloat16, float32 or float64, got {array.dtype} {array.shape}.")
    return array


def _check_words(x: jax.Array, params: FormatParams) -> None:
    """Refuses parameters that were made for another container than that of `x`."""
    word = np.dtype(layout_of(x.dtype).word)
    given = np.dtype(params.max.dtype)
    if given != word:
        raise ValueError(
            f"FormatParams of {given} leaves do not fit {x.dtype} arrays: make them with container={x.dtype.name!r}."
        )


@partial(jax.custom_jvp, nondiff_argnums=(1, 2, 3))
@partial(jax.jit, static_argnums=(1, 2, 3), inline=True)
def _round_static(x: jax.Array, fmt: Format, rounding: str, overflow: str) -> jax.Array:
    """Returns `x` rounded to a format known at compile time."""
    layout = layout_of(x.dtype)
    params = within(np, x.dtype, fmt.params(overflow=overflow, container=x.dtype))
    bits = to_bits(x)
    if rounding == "nearest_even" and kernel.has_fast_path(layout, fmt):
        return from_bits(kernel.round_nearest_even(jnp, layout, bits, params, as_float, as_word), x.dtype)
    return from_bits(kernel.round_bits(jnp, layout, bits, params, rounding), x.dtype)


@_round_static.defjvp
def _round_static_jvp(fmt: Format, rounding: str, overflow: str, primals: Any, tangents: Any) -> Any:
    return _round_static(primals[0], fmt, rounding, overflow), tangents[0]


@partial(jax.custom_jvp, nondiff_argnums=(2,))
@partial(jax.jit, static_argnums=(2,), inline=True)
def _round_traced(x: jax.Array, params: FormatParams, rounding: str) -> jax.Array:
    """Returns `x` rounded to a format whose numbers are operands."""
    params = within(jnp, x.dtype, params)
    return from_bits(kernel.round_bits(jnp, layout_of(x.dtype), to_bits(x), params, rounding), x.dtype)


@_round_traced.defjvp
def _round_traced_jvp(rounding: str, primals: Any, tangents: Any) -> Any:
    x, params = primals
    return _round_traced(x, params, rounding), tangents[0]

"""round_to: arrays rounded to a format inside JAX, exactly, whatever XLA does around it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from precision_lab.formats import kernel
from precision_lab.formats.adders import has_adder, round_by_adder
from precision_lab.formats.catalogue import format
from precision_lab.formats.containers import as_float, as_word, from_bits, to_bits, within
from precision_lab.formats.gradients import GRADIENTS, check_gradient, round_cotangent, tangent
from precision_lab.formats.options import ROUNDINGS, check_rounding, check_subnormals, overflow_action
from precision_lab.formats.params import FormatParams, Layout, layout_of, make_params, needs_integers
from precision_lab.formats.powers import round_powers
from precision_lab.formats.randomness import How, make_draw, random_words
from precision_lab.formats.scalar import Format


def round_to(
    x: Any,
    fmt: Any,
    *,
    rounding: Any = "nearest_even",
    overflow: str | None = None,
    subnormals: str = "keep",
    key: jax.Array | None = None,
    bits: Any = None,
    n_bits: int | None = None,
    centred: bool = False,
    gradient: Any = "straight_through",
    axis: int | tuple[int, ...] | None = None,
) -> jax.Array:
    """Returns `x` with every element on the grid of `fmt`, in the dtype of `x`.

    The result is the correctly rounded one, bit for bit, on every backend: the arithmetic is on integers, so neither
    excess precision, nor flushed subnormals, nor fused multiply-adds can change it.

    Args:
      x: floating array of any shape; float16, bfloat16, float32, or float64 under `jax_enable_x64`. Python floats
        are taken in JAX's default float dtype.
      fmt: a format or its name, which is compiled in; or `FormatParams`, which may be traced, stacked and vmapped.
        Block formats ("mxfp4", "nvfp4") find their scales and round as `round_to_blocks` does, codebooks ("nf4")
        take the nearest level as `round_to_codebook` does; those functions have the options of their own. Neither
        can honour `overflow`, `subnormals` or gradient="clipped", and codebooks no other `rounding`, since their ties
        are part of them, and no `n_bits`: their levels are unevenly spaced, what lies between is no string of bits.
      rounding: one of `ROUNDINGS`, which says what each does; or an integer array without axes, the index of one
        there, which may be traced. An index that is none, or is that of "stochastic" without `key` or `bits`, makes
        every element NaN.
      overflow: what becomes of a value that rounds beyond the largest one, one of `OVERFLOWS`; None is "native", as
        the format's specification has it. A rounding directed towards zero stops at the largest value.
      subnormals: what becomes of a value below the smallest normal number, one of `SUBNORMALS`.
      key: randomness of stochastic rounding, as a JAX key; use another one at every call and, under vmap, for every
        row, or the errors are correlated.
      bits: the same as unsigned integers of the shape of `x`, uniformly distributed. All of their bits are used,
        and the rounding is exactly unbiased, if they are at least as many as are discarded (never more than 31 of
        32 count; the bias below is then under 2**-31 of the smallest value).
      n_bits: use only so many random bits, the lowest, as hardware does: the discarded part is truncated to `n_bits`
        bits before it is compared, which biases results by -2**-(n_bits + 1) ulp.
      centred: with `n_bits`, add half of the last random bit first; then the bias averages to zero.
      gradient: "straight_through" passes the cotangent, "clipped" only where `x` is in the range of the format,
        "zero" none; a format or its name rounds the cotangent to that format, to nearest even.
      axis: the axis that blocks lie along, or two for square tiles; None means the last ones. For block formats only.

    Returns:
      An array like `x`. NaN stays NaN, also where the format has none, so that bad inputs stay visible. Zero keeps
      its sign where the format has a negative zero. Where the format reaches beyond the dtype of `x`, the largest
      value is the largest that both have. Negative values become 0 in unsigned integers, and like zero NaN in
      float8_e8m0fnu, or its smallest value if overflow="saturate".

    Raises:
      TypeError: `x` is not floating, or float64 without x64, where JAX would have rounded it before us.
      ValueError: an unknown format or option, or one that the format or dtype cannot honour.
    """
    x = _floating(x)
    check_gradient(gradient)
    fmt = fmt if isinstance(fmt, FormatParams) else format(fmt)
    if getattr(fmt, "kind", None) in ("block", "codebook"):
        _refuse(fmt, overflow=overflow, subnormals=subnormals, gradient=gradient)
        random = {"key": key, "bits": bits, "n_bits": n_bits, "centred": centred}
        return _with_gradient(_round_composed(x, fmt, rounding, random, axis), gradient)
    _refuse(fmt, axis=axis)
    random = key is not None or bits is not None
    how = How(_checked_rounding(rounding, random), random, n_bits, centred, gradient)
    words = random_words(x, key, bits, how)
    mode = None if isinstance(rounding, str) else jnp.asarray(rounding)
    if isinstance(fmt, FormatParams):
        _check_params(x, fmt, overflow, subnormals)
        rounded = _round_traced(x, fmt, mode, words, how)
    else:
        check_subnormals(subnormals, fmt)
        rounded = _round_static(x, mode, words, fmt, overflow_action(fmt, overflow), subnormals, how)
    return rounded if gradient in GRADIENTS else _with_gradient(rounded, gradient)


# The values at which an option asks for nothing.
_UNASKED = {
    "overflow": (None, "native"),
    "subnormals": ("keep",),
    "n_bits": (None,),
    "centred": (False,),
    "axis": (None,),
}


def _refuse(fmt: Any, **options: Any) -> None:
    """Refuses options that formats of this kind cannot honour."""
    for option, given in options.items():
        asked = given == "clipped" if option == "gradient" else given not in _UNASKED[option]
        if asked:
            name = "FormatParams" if isinstance(fmt, FormatParams) else fmt.name
            what = {"block": "a block format", "codebook": "a codebook"}.get(getattr(fmt, "kind", ""), "without blocks")
            raise ValueError(f"{option}={given!r} cannot be used with {name}, which is {what}; leave it out.")


def _round_composed(x: jax.Array, fmt: Any, rounding: Any, random: dict[str, Any], axis: Any) -> jax.Array:
    """Returns `x` rounded to a block format or a codebook; `random` are the options of stochastic rounding."""
    from precision_lab.formats.block_rounding import round_to_blocks
    from precision_lab.formats.codebook_rounding import round_to_codebook

    if not isinstance(rounding, str):
        raise ValueError(f"rounding of {fmt.name} must be a name, got {rounding!r}: an index is for single numbers.")
    if fmt.kind == "block":
        return round_to_blocks(x, fmt, axis=axis, rounding=rounding, **random)
    check_rounding(rounding, random=random["key"] is not None or random["bits"] is not None)
    if rounding != "nearest_even":
        raise ValueError(f"rounding={rounding!r} cannot be used with {fmt.name}: a codebook takes the nearest level.")
    _refuse(fmt, axis=axis, n_bits=random["n_bits"], centred=random["centred"])
    return round_to_codebook(x, fmt)


def _with_gradient(rounded: jax.Array, gradient: Any) -> jax.Array:
    """Returns what was rounded straight through with the cotangent that `gradient` says instead."""
    if gradient == "zero":
        return jax.lax.stop_gradient(rounded)
    return rounded if gradient == "straight_through" else round_cotangent(rounded, _elementwise(gradient))


def _checked_rounding(rounding: Any, random: bool) -> str | None:
    """Returns a rounding's name; None for an index, which may be traced and is refused only if it cannot be one."""
    if isinstance(rounding, str):
        return check_rounding(rounding, random=random)
    if not np.issubdtype(np.dtype(getattr(rounding, "dtype", type(rounding))), np.integer) or np.ndim(rounding):
        raise TypeError(f"rounding must be a name or an integer without axes, got {rounding!r}.")
    return None


def _elementwise(gradient: Any) -> Format:
    """Returns the format that a cotangent is rounded to; refuses those whose values are no grid of single numbers."""
    fmt = format(gradient)
    if not isinstance(fmt, Format):
        raise ValueError(f"gradient={fmt.name!r}: cotangents are rounded to floats, integers or fixed point only.")
    return fmt


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


def _check_params(x: jax.Array, params: FormatParams, overflow: str | None, subnormals: str) -> None:
    """Refuses parameters made for another container than that of `x`, and options that belong into them."""
    for name, given, default in (("overflow", overflow, None), ("subnormals", subnormals, "keep")):
        if given != default:
            raise ValueError(f"{name}={given!r} with FormatParams: give it to Format.params() or stack_formats().")
    word, given = np.dtype(layout_of(x.dtype).word), np.dtype(params.max.dtype)
    if given != word:
        raise ValueError(
            f"FormatParams of {given} leaves do not fit {x.dtype} arrays: make them with container={x.dtype.name!r}."
        )


def _by_name(mode: Any, how: How, one: Callable[[str], jax.Array], like: jax.Array) -> jax.Array:
    """Returns `one` of the rounding's name, which is known or that of the index `mode`; NaN for other indices."""
    if how.rounding is not None:
        return one(how.rounding)
    names = [name for name in ROUNDINGS if how.random or name != "stochastic"]
    branches = [partial(one, name) for name in names] + [lambda: jnp.full_like(like, jnp.nan)]
    return jax.lax.switch(jnp.where((mode >= 0) & (mode < len(names)), mode, len(names)), branches)


@partial(jax.custom_jvp, nondiff_argnums=(3, 4, 5, 6))
@partial(jax.jit, static_argnums=(3, 4, 5, 6), inline=True)
def _round_static(
    x: jax.Array, mode: Any, words: Any, fmt: Format, overflow: str, subnormals: str, how: How
) -> jax.Array:
    """Returns `x` rounded to a format known at compile time."""
    layout = layout_of(x.dtype)
    if not fmt.has_zero:
        return _by_name(mode, how, lambda name: _round_powers(x, words, fmt, overflow, name, how), x)
    p = _static_params(x, fmt, overflow, subnormals)
    nearest = _nearest_even(fmt, p, layout, subnormals)
    return _by_name(mode, how, lambda name: _round(x, words, p, name, how, nearest), x)


def _nearest_even(fmt: Format, p: FormatParams, layout: Layout, subnormals: str) -> Callable[[Any], Any] | None:
    """Returns the cheapest exact function from words to rounded words; None if only the kernel's general one is."""
    if subnormals in ("keep", "flush") and has_adder(fmt, layout):
        return lambda bits: round_by_adder(layout, bits, fmt, p)
    return None if needs_integers(fmt, layout, subnormals) else _nearest_even_of(p, layout)


def _nearest_even_of(p: FormatParams, layout: Layout) -> Callable[[Any], Any]:
    """Returns the function from words to rounded words for parameters that may be traced."""
    return lambda bits: kernel.round_nearest_even(jnp, layout, bits, p, as_float, as_word)


def _round(
    x: jax.Array, words: Any, p: FormatParams, rounding: str, how: How, nearest: Callable[[Any], Any] | None
) -> jax.Array:
    """Returns `x` rounded by the kernel, or by `nearest` if that is asked for; `p` fits its dtype."""
    layout, bits = layout_of(x.dtype), to_bits(x)
    if rounding == "nearest_even" and nearest is not None:
        return from_bits(nearest(bits), x.dtype)
    return from_bits(kernel.round_bits(jnp, layout, bits, p, rounding, make_draw(layout, words, how)), x.dtype)


def _round_powers(x: jax.Array, words: Any, fmt: Format, overflow: str, rounding: str, how: How) -> jax.Array:
    """Returns `x` rounded to a format without zero, which must be within reach of its dtype."""
    if x.dtype == jnp.float16:
        raise ValueError(f"float16 does not reach down to {fmt.min:g}, the least value of {fmt.name}; give float32.")
    layout = layout_of(x.dtype)
    draw = make_draw(layout, words, how)
    return from_bits(round_powers(jnp, layout, to_bits(x), fmt, overflow, rounding, draw), x.dtype)


def _static_params(x: jax.Array, fmt: Format, overflow: str, subnormals: str) -> FormatParams:
    """Returns the parameters of `fmt` for arrays like `x`."""
    return within(np, x.dtype, make_params(fmt, overflow=overflow, subnormals=subnormals, container=x.dtype))


@_round_static.defjvp
def _round_static_jvp(fmt: Format, overflow: str, subnormals: str, how: How, primals: Any, tangents: Any) -> Any:
    x = primals[0]
    rounded = _round_static(*primals, fmt, overflow, subnormals, how)
    return rounded, tangent(x, fmt.min, fmt.max, tangents[0], how.gradient)


@partial(jax.custom_jvp, nondiff_argnums=(4,))
@partial(jax.jit, static_argnums=(4,), inline=True)
def _round_traced(x: jax.Array, params: FormatParams, mode: Any, words: Any, how: How) -> jax.Array:
    """Returns `x` rounded to a format whose numbers are operands."""
    p = within(jnp, x.dtype, params)
    nearest = _nearest_even_of(p, layout_of(x.dtype))
    return _by_name(mode, how, lambda name: _round(x, words, p, name, how, nearest), x)


@_round_traced.defjvp
def _round_traced_jvp(how: How, primals: Any, tangents: Any) -> Any:
    x, params = primals[:2]
    p = within(jnp, x.dtype, params)
    least, most = from_bits(p.min, x.dtype), from_bits(p.max, x.dtype)
    return _round_traced(*primals, how), tangent(x, -least, most, tangents[0], how.gradient)

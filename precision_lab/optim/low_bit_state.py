"""Optimizer moments in few bits: stored quantized between steps, float32 while a step computes with them.

    tx = low_bit_state(optax.adam(1e-3), "dynamic8@group2048")

The parameters are not touched; for those see `master_weights`, `kahan` and `stochastic_rounding`, which go around this.
"""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from precision_lab import formats
from precision_lab.optim.masters import MasterWeightsState
from precision_lab.optim.nesting import refuse_low_hyperparameters
from precision_lab.optim.rounding import KahanState, StochasticRoundingState
from precision_lab.optim.state import LossScaleState
from precision_lab.optim.transformation import as_transformation, transformation
from precision_lab.optim.trees import fill_hidden, hide_untrainable, keep_dtypes, strong, to_float32
from precision_lab.quant import QTensor, Quantizer, quantize, quantizer
from precision_lab.quant.options import default_scheme
from precision_lab.rewrite.quantized import key_for

MIN_SIZE = 4096
"""Values below which an array stays as it is, as in bitsandbytes."""

NON_NEGATIVE = ("nu", "nu_max", "sum_of_squares")
"""Fields of optax's states that hold second moments."""

_FIRST = ("mu", "trace")
_HYPERPARAMETERS = ("hyperparams", "hyperparams_states")

_KINDS = ("tensor", "group")
_SIGNED_SCHEMES = ("full", "full_clipped", "signed_max")
_AROUND = (MasterWeightsState, KahanState, StochasticRoundingState, LossScaleState, optax.MultiStepsState)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["stored"], meta_fields=["shape"])
@dataclasses.dataclass(frozen=True)
class LowBitMoment:
    """One array of optimizer state as it is stored.

    Attributes:
      stored: the values in one axis, so that groups are runs of neighbours whatever the shape.
      shape: shape of the array.
    """

    stored: QTensor
    shape: tuple[int, ...]

    def dequantize(self) -> jax.Array:
        """Returns the array, in the dtype that the optimizer keeps it in."""
        return self.stored.dequantize().reshape(self.shape)

    @property
    def nbytes(self) -> int:
        """Returns the bytes of codes and scales."""
        return self.stored.nbytes


class LowBitState(NamedTuple):
    """State of `low_bit_state`: that of the inner transformation, its large arrays as `LowBitMoment`."""

    inner: Any


def low_bit_state(inner: Any, spec: Any, *, min_size: int = MIN_SIZE) -> optax.GradientTransformationExtraArgs:
    """Returns `inner` with the floating arrays of its state stored quantized.

    Every step dequantizes the state, calls `inner`, and quantizes what it returns. Arrays of second moments, which are
    never negative, take the unsigned relative of the format: `dynamic8_unsigned`, `uint8`; floats keep their own.
    Arrays of fewer than `min_size` values, counters and hyperparameters stay as they are. Gradients and parameters come
    to `inner` in float32, and its updates leave in float32.

    It goes around the optimizer proper and inside everything else, so that masters and accumulated gradients are not
    quantized: `master_weights(low_bit_state(optax.adam(lr), ...))`, `optax.MultiSteps(low_bit_state(...), k)`.

    Args:
      inner: optax transformation.
      spec: quantizer or its string, with one scale for the tensor or for groups of neighbours: `dynamic8@group2048`,
        `int8@tensor`, `float8_e4m3fn@group128`, `mxfp8`, `bfloat16`. Random bits of stochastic rounding come from the
        values.
      min_size: the smallest array that is quantized.

    Raises:
      TypeError: `inner` is no transformation.
      ValueError: a quantizer that cannot be honoured here; from `init`, if nothing would be quantized, or if `inner`
        holds something that belongs around this.

    Source: Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2021, arXiv:2110.02861, sections 2 and 3,
      without its stable embedding layer; small arrays as in bitsandbytes (`min_8bit_size`).
    """
    inner, qz = as_transformation(inner), _usable(quantizer(spec))

    def init(params: Any) -> LowBitState:
        state = strong(inner.init(to_float32(hide_untrainable(params))))
        refuse_low_hyperparameters(state)
        _refuse_inside(state)
        packed = _packed(state, qz, min_size)
        if not any(map(_is_low_bit, jax.tree.leaves(packed, is_leaf=_is_low_bit))):
            raise ValueError(
                f"low_bit_state({qz}) would change nothing: the optimizer keeps no floating array of {min_size} values "
                "or more. Give it momentum, or lower min_size."
            )
        return LowBitState(packed)

    def update(updates: Any, state: LowBitState, params: Any = None, **extra_args: Any) -> Any:
        before = _unpacked(state.inner)
        like = updates if params is None else params
        wide = None if params is None else to_float32(hide_untrainable(params))
        grads = to_float32(hide_untrainable(updates, like=like))
        steps, after = inner.update(grads, before, params=wide, **extra_args)
        after = keep_dtypes(after, before)
        packed = jax.tree_util.tree_map_with_path(
            lambda path, old, new: _pack(path, new, qz) if _is_low_bit(old) else new,
            state.inner,
            after,
            is_leaf=_is_low_bit,
        )
        return fill_hidden(steps, updates), LowBitState(packed)

    return transformation(init, update)


def second_moments(opt_state: Any) -> Iterator[jax.Array]:
    """Yields the arrays of second moments in an optimizer state, those in few bits dequantized."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(opt_state, is_leaf=_is_low_bit):
        if _is_second_moment(path):
            yield leaf.dequantize() if _is_low_bit(leaf) else leaf


def zero_second_moment_fraction(opt_state: Any) -> jax.Array:
    """Returns the share of second moments that are exactly zero, where a step is a gradient over `eps`; float32.

    Raises:
      ValueError: the state holds no second moments.
    """
    moments = list(second_moments(opt_state))
    if not moments:
        raise ValueError("this optimizer state holds no second moments.")
    zeros = sum(jnp.sum(moment == 0, dtype=jnp.float32) for moment in moments)
    return zeros / jnp.float32(sum(moment.size for moment in moments))


def unsigned(qz: Quantizer) -> Quantizer:
    """Returns the quantizer of the same kind for values that are never negative, itself if there is none.

    Raises:
      ValueError: its scheme is for signed integers alone.
    """
    fmt = qz.format
    name = f"{fmt.name}_unsigned" if fmt.kind == "codebook" else f"u{fmt.name}" if fmt.kind == "int" else ""
    if fmt.kind == "int" and not fmt.signed:
        return qz
    try:
        found = formats.format(name) if name else None
    except ValueError:
        found = None
    if found is None:
        return qz
    if qz.scheme in _SIGNED_SCHEMES:
        raise ValueError(
            f"low_bit_state: {qz} would store second moments, which are never negative, as {found.name}, but scheme "
            f"{qz.scheme!r} is for signed integers. Leave the scheme out, or say 'affine'."
        )
    scheme = None if qz.scheme == default_scheme(fmt) else qz.scheme
    return dataclasses.replace(qz, format=found, scheme=scheme)


def _usable(qz: Quantizer) -> Quantizer:
    """Returns the quantizer, if moments can be stored by it."""
    fmt = qz.format
    if fmt.kind == "block" and len(fmt.block) > 1:
        raise ValueError(f"low_bit_state: {qz} has tiles of two axes, but moments are stored in one.")
    if fmt.kind != "block" and qz.is_scaled and qz.granularity.kind not in _KINDS:
        raise ValueError(
            f"low_bit_state: {qz} has scales by {qz.granularity.kind}, but moments enter no product. Say @tensor, or "
            f"@groupN for N neighbours: {fmt.name}@group256."
        )
    if not (fmt.grid().min() < 0 if fmt.kind == "codebook" else getattr(fmt, "signed", True)):
        raise ValueError(
            f"low_bit_state: {qz} holds no negative values, but first moments are. Choose a signed format."
        )
    if qz.estimator != "ste":
        raise ValueError(
            f"low_bit_state: {qz} estimates a gradient, but none goes through moments. Drop the estimator."
        )
    return qz


def _packed(state: Any, qz: Quantizer, min_size: int) -> Any:
    """Returns the state with its large floating arrays quantized."""

    def leaf(path: Any, x: Any) -> Any:
        floating = getattr(x, "dtype", None) in (jnp.float32, jnp.float16, jnp.bfloat16)
        kept = any(getattr(key, "name", None) in _HYPERPARAMETERS for key in path)
        return _pack(path, x, qz) if floating and x.size >= min_size and not kept else x

    return jax.tree_util.tree_map_with_path(leaf, state)


def _pack(path: Any, x: jax.Array, qz: Quantizer) -> LowBitMoment:
    """Returns an array of state as it is stored."""
    qz = unsigned(qz) if _is_second_moment(path) else qz
    flat = x.reshape(-1)
    return LowBitMoment(quantize(flat, qz, axis=0, key=key_for(flat.astype(jnp.float32), qz)), x.shape)


def _unpacked(state: Any) -> Any:
    """Returns the state as `inner` made it."""
    return jax.tree.map(lambda x: x.dequantize() if _is_low_bit(x) else x, state, is_leaf=_is_low_bit)


def _is_low_bit(x: Any) -> bool:
    return isinstance(x, LowBitMoment)


def _is_second_moment(path: Any) -> bool:
    """Returns whether a path goes through a field of a state that holds second moments.

    The first name decides; parameters behind it may have names such as these themselves.
    """
    names = (getattr(key, "name", None) for key in path)
    return next((name for name in names if name in _FIRST or name in NON_NEGATIVE), None) in NON_NEGATIVE


def _refuse_inside(state: Any) -> None:
    """Raises ValueError if the inner state holds what must not be quantized."""

    def is_found(x: Any) -> bool:
        return isinstance(x, (*_AROUND, LowBitState))

    found = next((x for x in jax.tree.leaves(state, is_leaf=is_found) if is_found(x)), None)
    if found is not None:
        name = type(found).__name__.removesuffix("State")
        raise ValueError(
            f"low_bit_state stands around {name}, whose arrays are no moments. Put it inside, around the optimizer "
            "alone: master_weights(low_bit_state(optax.adam(1e-3), 'dynamic8@group2048'))."
        )

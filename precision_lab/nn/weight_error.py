"""What quantization makes of the weights of a model: squared errors by path, under the scales of its products."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from precision_lab.nn.conversion import named, uses_of
from precision_lab.policy import Policy
from precision_lab.rewrite import Use, is_qtensor
from precision_lab.rewrite.quantized import fake_quantized


class WeightError(NamedTuple):
    """Float32 scalars: the sum of the squared errors of a weight, and that of its squares."""

    error: jax.Array
    norm: jax.Array


def quantized_weights(target: Any, policy: Any, *args: Any, params: Any = None, **kwargs: Any) -> dict[str, jax.Array]:
    """Returns, by path, each weight of floats that a policy quantizes, as it is multiplied or looked up.

    Args:
      target: an `nnx.Module`, a `linen.Module`, or a function `fn(params, *args, **kwargs)`.
      policy: a Policy or what parses to one.
      args, kwargs: an example of what it is called with, arrays or structs; nothing is executed on it.
      params: a Linen model's variables, or a function's params.

    Raises:
      ValueError: a weight is quantized in several ways, so that it has several values; or a rule matches nothing.
    """
    found = _every_value(target, policy, params, args, kwargs)
    for path, (_, values) in found.items():
        if len(values) > 1:
            raise ValueError(f"'{path}' is quantized in {len(values)} ways, so there is no one value that it has.")
    return {path: values[0] for path, (_, values) in found.items()}


def weight_error(target: Any, policy: Any, *args: Any, params: Any = None, **kwargs: Any) -> dict[str, WeightError]:
    """Returns, by path, what a policy's quantizers lose of each weight; arguments as for `quantized_weights`.

    A weight that is quantized in several ways, such as an embedding that is the output layer too, counts once for each.

    Raises:
      ValueError: a rule matches nothing.
    """
    found = _every_value(target, policy, params, args, kwargs)
    return {path: _error(weight.astype(jnp.float32), values) for path, (weight, values) in found.items()}


def relative_mse(errors: Mapping[str, WeightError]) -> jax.Array:
    """Returns the squared error of all weights together over the sum of their squares; NaN where there are none."""
    total = [jnp.sum(jnp.stack([getattr(one, name) for one in errors.values()] or [jnp.zeros(())])) for name in _FIELDS]
    return total[0] / total[1]


_FIELDS = WeightError._fields


def _every_value(
    target: Any, policy: Any, params: Any, args: Any, kwargs: Any
) -> dict[str, tuple[jax.Array, list[jax.Array]]]:
    """Returns, by path, each weight of floats that a policy quantizes, and the different values that it has in use."""
    own, uses = uses_of(target, Policy.parse(policy), params, args, kwargs)
    found = {}
    for path, leaf in named(own).items():
        quantized = [use for use in uses.by_path.get(path, ()) if use.quantizer is not None]
        # What else there is to a use, such as the order of its axes, changes no value.
        ways = {(use.quantizer, use.axes, use.stack, use.dtype): use for use in quantized}
        if ways and not is_qtensor(leaf):
            found[path] = leaf, [_as_used(leaf, use) for use in ways.values()]
    return found


def _as_used(weight: jax.Array, use: Use) -> jax.Array:
    """Returns a weight on its quantizer's grid: each slice of a stacked one by itself."""
    quantize = functools.partial(fake_quantized, quantizer=use.quantizer, axes=use.axes)  # pyright: ignore[reportArgumentType]
    for _ in range(use.stack):
        quantize = jax.vmap(quantize)
    return quantize(weight.astype(use.dtype))


def _error(weight: jax.Array, values: Sequence[jax.Array]) -> WeightError:
    """Returns what a weight loses, over all values that it is used with."""
    errors = [jnp.sum((value - weight) ** 2) for value in values]
    return WeightError(jnp.sum(jnp.stack(errors)), len(values) * jnp.sum(weight**2))

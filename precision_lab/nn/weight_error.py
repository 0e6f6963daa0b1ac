"""What quantization makes of the weights of a model: squared errors by path, under the scales of its products."""

from __future__ import annotations

import functools
from collections.abc import Mapping
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
    own, uses = uses_of(target, Policy.parse(policy), params, args, kwargs)
    found = {}
    for path, leaf in named(own).items():
        ways = {use._replace(site="") for use in uses.by_path.get(path, ()) if use.quantizer is not None}
        if len(ways) > 1:
            raise ValueError(f"'{path}' is quantized in {len(ways)} ways, so there is no one value that it has.")
        if ways and not is_qtensor(leaf):
            found[path] = _as_used(leaf, ways.pop())
    return found


def weight_error(target: Any, policy: Any, *args: Any, params: Any = None, **kwargs: Any) -> dict[str, WeightError]:
    """Returns, by path, what a policy's quantizers lose of each weight; arguments and errors of `quantized_weights`."""
    own, _ = uses_of(target, Policy.parse(policy), params, args, kwargs)
    weights = named(own)
    return {
        path: _error(weights[path].astype(jnp.float32), values)
        for path, values in quantized_weights(target, policy, *args, params=params, **kwargs).items()
    }


def relative_mse(errors: Mapping[str, WeightError]) -> jax.Array:
    """Returns the squared error of all weights together over the sum of their squares; NaN where there are none."""
    total = [jnp.sum(jnp.stack([getattr(one, name) for one in errors.values()] or [jnp.zeros(())])) for name in _FIELDS]
    return total[0] / total[1]


_FIELDS = WeightError._fields


def _as_used(weight: jax.Array, use: Use) -> jax.Array:
    """Returns a weight on its quantizer's grid: each slice of a stacked one by itself."""
    quantize = functools.partial(fake_quantized, quantizer=use.quantizer, axes=use.axes)  # pyright: ignore[reportArgumentType]
    for _ in range(use.stack):
        quantize = jax.vmap(quantize)
    return quantize(weight)


def _error(weight: jax.Array, values: jax.Array) -> WeightError:
    """Returns what a weight loses."""
    return WeightError(jnp.sum((values - weight) ** 2), jnp.sum(weight**2))

"""LoRA and QLoRA: adapters of low rank beside weights that stay as they are, in floats or packed.

The model's code and the paths of its parameters do not change; the adapters are variables of their own, which are all
that trains.

    base = pl.convert(model, "weight=nf4@group64,double", x)            # QLoRA; leave it out for LoRA
    tuned = nn.add_lora(base, x, rank=8, key=jax.random.key(0))
    optimizer = nnx.Optimizer(tuned, optax.adamw(1e-3), wrt=nnx.LoRAParam)
    grads = nnx.grad(loss, argnums=nnx.DiffState(0, nnx.LoRAParam))(tuned, batch)

Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", 2021, arXiv:2106.09685, section 4.1; Dettmers
  et al., "QLoRA", 2023, arXiv:2305.14314, section 3, equations 5 and 6.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

from precision_lab.nn.carried import CONVERTED, LORA, LORA_FACTOR, adapters_of
from precision_lab.nn.conversion import named, replaced, uses_of
from precision_lab.nn.linen_policy import linen_under_policy
from precision_lab.nn.nnx_policy import carried_by, nnx_under_policy, replace_params
from precision_lab.policy import Policy
from precision_lab.policy.patterns import glob_matches
from precision_lab.rewrite import Adapter, Use, call, is_qtensor


class LoRAFactor(nnx.Variable):
    """The factor alpha / rank of a model's adapters; no parameter."""


def add_lora(
    target: Any,
    *args: Any,
    rank: int,
    key: jax.Array,
    alpha: float | None = None,
    paths: str = "**",
    params: Any = None,
    policy: Any = None,
    **kwargs: Any,
) -> Any:
    """Returns `target` with an adapter beside each of its weights: y = x W + (alpha / rank) (x A) B.

    A starts at random, normal with variance 1 / rank, B at zero, so the model computes at first what it did before.
    Adapters are float32 and multiply in the compute format of the site, without its quantizers.

    Args:
      target: an `nnx.Module` or `linen.Module`, converted or not, or a function `fn(params, *args)`, its params packed
        or not.
      args, kwargs: an example of what it is called with; nothing is executed on it.
      rank: columns of A and rows of B.
      key: randomness of A.
      alpha: 2 * rank unless given.
      paths: glob of the parameters that get one, such as "**/query/kernel".
      params: a Linen model's variables, or a function's params.
      policy: what the target is under; that of a model under one unless given, else "float32".

    Returns:
      For an NNX model a copy with `nnx.LoRAParam`s by path under `lora_adapters`. For a Linen model (module,
      variables), adapters in the collection `lora_adapters`. For a function (function, params), params being
      `{"base", "lora_adapters", "lora_factor"}`.

    Raises:
      TypeError: arguments are missing or not for this target.
      ValueError: no weight matches, a rank below 1, a model that has adapters, or a function that convert returned.
    """
    if rank < 1:
        raise ValueError(f"rank={rank}: an adapter has a rank of 1 or more.")
    if hasattr(target, CONVERTED):
        raise ValueError(
            "this function is one that convert returned, whose products are out of reach: give add_lora the function "
            "that was converted, policy= as it was, and the packed params. Static scales would be lost."
        )
    if hasattr(target, LORA) or (isinstance(params, Mapping) and LORA in params):
        raise ValueError(
            "this target has adapters, which new ones would replace: merge them first, by merge_lora, or start from "
            "the function without them and its params['base']."
        )
    policy = _policy_of(target, policy)
    own, uses = uses_of(target, policy, params, args, kwargs)
    shapes = {path: leaf.shape for path, leaf in named(own).items()}
    chosen = _chosen(uses.by_path, shapes, paths)
    keys = jax.random.split(key, len(chosen))
    pairs = {path: _pair(one, sizes, rank) for one, (path, sizes) in zip(keys, chosen.items(), strict=True)}
    factor = jnp.float32((2 * rank if alpha is None else alpha) / rank)
    return _assembled(target, policy, params, pairs, factor)


def merge_lora(target: Any, *args: Any, params: Any = None, **kwargs: Any) -> Any:
    """Returns what `add_lora` was given, with W + (alpha / rank) A B in the place of each weight W.

    Packed weights become floating arrays, which the model's policy gets rules to leave alone: to quantize the sum again
    is a second rounding, which at few bits costs what the adapter gained.

    Args:
      target: an NNX model or a Linen module with adapters.
      args, kwargs: an example, as for `add_lora`.
      params: a Linen model's variables.

    Raises:
      TypeError: `target` has no adapters, or is a function, whose `params["base"]` is its own.
    """
    if isinstance(target, nnx.Module) and hasattr(target, LORA):
        adapters = carried_by(target)["adapters"]
        bare = nnx.clone(target)
        for name in (LORA, LORA_FACTOR):
            delattr(bare, name)
        sums = _sums(bare, adapters, None, args, kwargs)
        replace_params(bare, sums)
        return nnx_under_policy(bare, _without_weights(bare, sums)) if hasattr(type(bare), "precision_policy") else bare
    if isinstance(target, linen.Module) and LORA in (params or {}):
        adapters = adapters_of(params[LORA], params[LORA_FACTOR]["value"])
        base = {name: tree for name, tree in params.items() if name not in (LORA, LORA_FACTOR)}
        sums = _sums(target, adapters, base, args, kwargs)
        merged = {**base, "params": replaced(base["params"], sums)}
        return linen_under_policy(target, _without_weights(target, sums)), merged
    raise TypeError(f"merge_lora takes an NNX or Linen model with adapters, got {type(target).__name__} without.")


def _without_weights(target: Any, merged: Mapping[str, Any]) -> Policy:
    """Returns the policy of a model with rules that leave merged weights as they are."""
    policy = _policy_of(target, None)
    for path in merged if policy.quantizes else ():
        policy = policy.with_rule(path, weight=None)
    return policy


def _sums(target: Any, adapters: Mapping[str, Adapter], params: Any, args: Any, kwargs: Any) -> dict[str, jax.Array]:
    """Returns, by path, the weights with their adapters added."""
    own, uses = uses_of(target, _policy_of(target, None), params, args, kwargs)
    weights = named(own)
    return {path: _sum(weights[path], adapter, uses.by_path[path][0]) for path, adapter in adapters.items()}


def _sum(weight: Any, adapter: Adapter, use: Use) -> jax.Array:
    """Returns a weight with its adapter added, in the dtype of its values."""
    values = weight.dequantize() if is_qtensor(weight) else weight
    order = (*use.axes, *(axis for axis in use.order if axis not in use.axes))  # (in, out) as axes of the weight
    sizes = [values.shape[axis] for axis in order]
    product = jnp.matmul(adapter.a, adapter.b, precision=jax.lax.Precision.HIGHEST)
    added = (adapter.factor * product).reshape(sizes).transpose(np.argsort(order))
    return (values.astype(jnp.float32) + added).astype(values.dtype)


def _policy_of(target: Any, policy: Any) -> Policy:
    """Returns a given policy, else the one that a model is under, else float32."""
    return Policy.parse(policy or getattr(type(target), "precision_policy", None) or "float32")


def _chosen(uses: Mapping[str, list[Use]], shapes: Mapping[str, tuple[int, ...]], paths: str) -> dict[str, Any]:
    """Returns the weights that match, as the sizes (in, out) that they have in their products.

    Raises:
      ValueError: there is none.
    """
    # Two products may take a weight in two orders, of which one adapter can be for one only.
    ways = {path: {(use.axes, use.order, use.is_matrix, use.stack) for use in each} for path, each in uses.items()}
    found = {path: uses[path] for path, each in ways.items() if len(each) == 1 and next(iter(each))[2:] == (True, 0)}
    chosen = {path: each[0] for path, each in found.items() if glob_matches(paths, path)}
    if not chosen:
        known = (
            ", ".join(list(found)[:5]) or "none: an adapter is for a matrix in one order, not for convolutions or scans"
        )
        raise ValueError(f"paths='{paths}' matches no weight that can have an adapter; there are {known}.")
    return {path: _sizes(shapes[path], use) for path, use in chosen.items()}


def _sizes(shape: tuple[int, ...], use: Use) -> tuple[int, int]:
    """Returns the sizes of what is contracted and of what is not."""
    inputs = math.prod(shape[axis] for axis in use.axes)
    return inputs, math.prod(shape) // max(inputs, 1)


def _pair(key: jax.Array, sizes: tuple[int, int], rank: int) -> dict[str, jax.Array]:
    """Returns A and B as they start."""
    a = jax.random.normal(key, (sizes[0], rank)) / jnp.sqrt(jnp.float32(rank))
    return {"a": a, "b": jnp.zeros((rank, sizes[1]))}


def _assembled(target: Any, policy: Policy, params: Any, pairs: dict[str, Any], factor: jax.Array) -> Any:
    """Returns the target with its adapters."""
    if isinstance(target, nnx.Module):
        variables = {path: nnx.Dict({k: nnx.LoRAParam(v) for k, v in pair.items()}) for path, pair in pairs.items()}
        copy = nnx_under_policy(target, policy)
        setattr(copy, LORA, nnx.Dict(variables))
        setattr(copy, LORA_FACTOR, LoRAFactor(factor))
        return copy
    if isinstance(target, linen.Module):
        return linen_under_policy(target, policy), {**params, LORA: pairs, LORA_FACTOR: {"value": factor}}

    def adapted(params: Any, /, *args: Any, **kwargs: Any) -> Any:
        adapters = adapters_of(params[LORA], params[LORA_FACTOR])
        return policy.cast_to_output(call(target, policy, params["base"], args, kwargs, adapters=adapters))

    return adapted, {"base": params, LORA: pairs, LORA_FACTOR: factor}

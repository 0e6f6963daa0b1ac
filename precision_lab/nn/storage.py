"""Storage: the bytes that each parameter takes, as it is or as `convert` would store it under a policy."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
from flax import linen, nnx

from precision_lab.nn.conversion import named, stored_for, uses_of, ways_of
from precision_lab.policy import Policy
from precision_lab.ptq import round_to_nearest


def bytes_under(target: Any, policy: Policy, params: Any, args: Any, kwargs: Any) -> dict[str, int]:
    """Returns the bytes of each parameter, by path, as `convert(target, policy, *args, params=params)` stores it.

    Nothing is quantized for this. A parameter that cannot be stored quantized takes the bytes of the policy's params
    dtype, of a function those of its own.
    """
    own, uses = uses_of(target, policy, params, args, kwargs)
    ways, leaves = ways_of(own, uses, {}), named(own)
    is_model = isinstance(target, nnx.Module | linen.Module)
    found = {}
    for path, leaf in leaves.items():
        use = ways[path].use if path in ways else None
        if use is not None:
            like = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            found[path] = nbytes(jax.eval_shape(lambda w, use=use: stored_for(w, use, {}, round_to_nearest), like))
        else:
            kept = jax.eval_shape(policy.cast_to_param, leaf) if is_model else leaf
            found[path] = nbytes(kept)
    return found


def nbytes(leaf: Any) -> int:
    """Returns the bytes of an array, or of all that a QTensor, stacked or not, stores."""
    return sum(int(np.prod(x.shape, dtype=np.int64)) * np.dtype(x.dtype).itemsize for x in jax.tree.leaves(leaf))

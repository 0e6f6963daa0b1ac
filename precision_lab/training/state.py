"""The state of a training run: everything that the next step depends on, and nothing else."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

NEVER = -1
"""Value of `TrainState.first_nonfinite` as long as every applied step had a finite loss."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """A pytree of arrays; what else a step needs is a function of the config and of `step`.

    Attributes:
      step: int32, updates so far, skipped ones included.
      params: parameters as the policy stores them, nested dicts.
      model_state: what else the model holds (batch statistics, dropout counters), nested dicts.
      opt_state: state of the optimizer, with the loss scale and the master weights.
      first_nonfinite: int32, number of the first applied step whose loss was not finite, or NEVER.
    """

    step: jax.Array
    params: Any
    model_state: Any
    opt_state: Any
    first_nonfinite: jax.Array


@jax.jit
def all_finite(tree: Any) -> jax.Array:
    """Returns, as a boolean scalar, whether every floating element of a tree of arrays is finite."""
    floating = [x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)]
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(x)) for x in floating], bool))

"""Which leaf of a tree of gradients is not finite: one pass, one number."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def first_bad_leaf(tree: Any, like: Any) -> tuple[jax.Array, int]:
    """Returns the number of the first leaf with an infinity or NaN, and the number that stands for none.

    Args:
      tree: floating or complex arrays, and MaskedNode or None where nothing is to be checked.
      like: tree whose leaves are numbered, in the order of `jax.tree.leaves`; `tree` has its structure.

    Returns:
      An int32 scalar, and the number of leaves of `like`, which is that scalar if everything is finite.
    """
    structure = jax.tree.structure(like)
    none = structure.num_leaves
    numbered = [(n, x) for n, part in enumerate(structure.flatten_up_to(tree)) for x in jax.tree.leaves(part)]
    if not numbered:
        return jnp.full((), none, jnp.int32), none
    finite = jnp.stack([jnp.all(jnp.isfinite(x)) for _, x in numbered])
    numbers = np.asarray([n for n, _ in numbered], np.int32)
    return jnp.min(jnp.where(finite, np.int32(none), numbers)), none


def agree(first: jax.Array, axis_name: Any) -> jax.Array:
    """Returns the least of the members of the mapped axes, so that all or none of them find a bad leaf."""
    return first if axis_name is None else jax.lax.pmin(first, axis_name)

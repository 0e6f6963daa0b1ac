"""Trees of gradients and parameters: which leaves are numbers to train, and how to hide the others from optax.

Integer, boolean, float0 and PRNG-key leaves are nobody's gradient: they are hidden from the inner transformation as
`optax.MaskedNode` and come back as they were. So are the leaves of Flax's collection `_overwrite_with_gradient`
(scales and amax histories of float8 products), whose "gradient" is their next value. None and MaskedNode hold no leaf
and need no care.
"""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax

Tree = TypeVar("Tree")

_OVERWRITTEN = "_overwrite_with_gradient"


def path_text(path: Any) -> str:
    """Returns the path of a leaf as text, such as "block_0/attention/kernel"."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def is_overwritten(path: Any) -> bool:
    """Returns whether the "gradient" of the leaf at `path` is its next value."""
    return _OVERWRITTEN in path_text(path).split("/")


def is_trainable(path: Any, x: Any) -> bool:
    """Returns whether `x` is a floating or complex leaf that a gradient is subtracted from."""
    return jnp.issubdtype(_dtype(x), jnp.inexact) and not is_overwritten(path)


def is_low_precision(x: Any) -> bool:
    """Returns whether `x` is a floating leaf of fewer than 32 bits."""
    return jnp.issubdtype(_dtype(x), jnp.floating) and jnp.finfo(_dtype(x)).bits < 32


def to_float32(tree: Tree) -> Tree:
    """Returns `tree` with floating leaves of fewer than 32 bits widened to float32, which is exact."""
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32) if is_low_precision(x) else x, tree)


def hide_untrainable(tree: Any, like: Any = None) -> Any:
    """Returns `tree` with MaskedNode where `like` (by default `tree` itself) has a leaf that is not trainable."""
    like = tree if like is None else like
    keep = jax.tree_util.tree_map_with_path(is_trainable, like)
    return jax.tree.map(lambda kept, x: x if kept else optax.MaskedNode(), keep, tree)


def fill_hidden(tree: Any, source: Any) -> Any:
    """Returns `tree` with what `source` holds in the places where `tree` has MaskedNode."""
    return jax.tree.map(lambda x, s: s if is_masked(x) else x, tree, source, is_leaf=is_masked)


def is_masked(x: Any) -> bool:
    return isinstance(x, optax.MaskedNode)


def strong(tree: Tree) -> Tree:
    """Returns `tree` with Python scalars and weakly typed arrays as strongly typed arrays.

    A weak type in a state becomes strong after one update, which breaks scan, cond and donation.
    """
    return jax.tree.map(_strong_leaf, tree)


def _strong_leaf(x: Any) -> Any:
    if isinstance(x, bool | int | float | complex) or getattr(x, "weak_type", False):
        return jnp.asarray(x, dtype=jnp.result_type(x))
    return x


def keep_dtypes(new: Tree, old: Tree) -> Tree:
    """Returns `new` with every array in the dtype that it has in `old`."""
    return jax.tree.map(lambda n, o: n if _dtype(n) == _dtype(o) else jnp.asarray(n, _dtype(o)), new, old)


def select(flag: jax.Array, new: Tree, old: Tree) -> Tree:
    """Returns `new` where the scalar `flag` holds, else `old`, bit for bit and in the dtypes of `old`."""
    return jax.tree.map(lambda n, o: jnp.where(flag, n, o), keep_dtypes(new, old), old)


def _dtype(x: Any) -> Any:
    return x.dtype if hasattr(x, "dtype") else jnp.result_type(x)

"""Casting the floating arrays of a tree, and nothing else in it."""

from typing import Any, TypeVar

import numpy as np

Tree = TypeVar("Tree")

CASTABLE = frozenset(("float16", "bfloat16", "float32"))


def cast_floating(tree: Tree, dtype: Any) -> Tree:
    """Returns `tree` with its float16, bfloat16 and float32 arrays cast to `dtype`.

    float64 and float8 arrays stay (someone chose them), as do quantized arrays with all that is in them, nodes whose
    class has `keeps_dtype`, integers, booleans, PRNG keys, complex numbers, None and Python scalars. Casting to float64
    or float8 is possible, since then you chose it. The very same object is returned where nothing changes.
    """
    import jax

    from precision_lab.quant import QTensor

    def stays(node: Any) -> bool:
        return isinstance(node, QTensor) or getattr(type(node), "keeps_dtype", False)

    leaves, treedef = jax.tree.flatten(tree, is_leaf=stays)
    cast = [leaf if stays(leaf) else _cast_leaf(leaf, np.dtype(dtype)) for leaf in leaves]
    if all(new is old for new, old in zip(cast, leaves, strict=True)):
        return tree
    return jax.tree.unflatten(treedef, cast)


def _cast_leaf(leaf: Any, dtype: np.dtype) -> Any:
    """Casts one leaf, or returns it as it is."""
    import jax

    if isinstance(leaf, jax.ShapeDtypeStruct):
        castable = leaf.dtype != dtype and str(leaf.dtype) in CASTABLE
        return leaf.update(dtype=dtype) if castable else leaf
    if not hasattr(leaf, "astype") or leaf.dtype == dtype or str(leaf.dtype) not in CASTABLE:
        return leaf
    return leaf.astype(dtype)

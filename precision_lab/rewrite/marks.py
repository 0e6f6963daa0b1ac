"""Marks: names put on values, which survive every transformation and cost nothing.

A mark is an identity that compiles to nothing. Its tangent is marked too, and where that is transposed the mark goes
to the cotangent, so one mark in a forward pass also finds the gradient of the value. `harvest` reads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

from precision_lab import formats
from precision_lab.rewrite import _compat

Tree = TypeVar("Tree")

MARKED = "precision_mark"
OPERANDS, OUTPUT, SHADOW = ("lhs", "rhs"), "output", "shadow"
_TANGENT, _COTANGENT = "_tangent", "_cotangent"

# Whether sites get marks now: not if None; else a tuple of policies, whose results at each site get marks too. Part of
# the keys of JAX's caches, so a function traced without marks is traced again.
observing = jax.make_user_context(None)


class Mark(NamedTuple):
    """What a marked value is.

    Attributes:
      site: name of a site, or the name that a user gave.
      role: "lhs", "rhs" or "output" of a site, "value" of a user's mark; with "_cotangent" for the gradient with
        respect to it. "shadow0" and so on are outputs that other policies would have had.
      fmt: format that the value is rounded to next, or has.
      cotangent_fmt: the same of its cotangent.
    """

    site: str
    role: str
    fmt: Any = None
    cotangent_fmt: Any = None

    @property
    def is_cotangent(self) -> bool:
        """Whether the value is a gradient."""
        return self.role.endswith(_COTANGENT)

    @property
    def is_tangent(self) -> bool:
        """Whether the value is a tangent of forward mode."""
        return self.role.endswith(_TANGENT)


def _tangent(mark: Mark) -> Mark:
    return mark._replace(role=mark.role + _TANGENT)


def _cotangent(mark: Mark) -> Mark:
    return mark._replace(role=mark.role.removesuffix(_TANGENT) + _COTANGENT, fmt=mark.cotangent_fmt)


_, _bind = _compat.marker_primitive(MARKED, tangent=_tangent, cotangent=_cotangent)


def mark(tree: Tree, name: str) -> Tree:
    """Returns `tree` with its floating arrays marked, so that an observed function reports on them and their gradients.

    Args:
      tree: pytree of arrays; an array alone goes by `name`, a leaf by `name/path`. Others stay as they are.
      name: what the report calls it.

    Returns:
      The same values. Use them in place of `tree`: a mark that nothing depends on is dropped as dead code.
    """

    def marked(path: Any, leaf: Any) -> Any:
        below = jax.tree_util.keystr(tuple(path), simple=True, separator="/")
        return mark_value(leaf, f"{name}/{below}" if below else name, "value")

    return jax.tree.map_with_path(marked, tree)


def mark_value(x: Any, site: str, role: str, fmt: Any = None, cotangent_fmt: Any = None) -> Any:
    """Returns `x` marked if it is a floating array; a format that is not given is that of its dtype."""
    if not hasattr(x, "dtype") or not jnp.issubdtype(x.dtype, jnp.floating):
        return x
    own = formats.format(x.dtype)
    return _bind(jnp.asarray(x), Mark(site, role, fmt or own, cotangent_fmt or own))


def carry(x: jax.Array, mark: Any, carried: Sequence[Any]) -> jax.Array:
    """Returns `x` with a mark that carries arrays, which a harvest gets in place of `x`."""
    return _bind(x, mark, *carried)

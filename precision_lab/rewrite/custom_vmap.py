"""Functions with a batching rule of their own (`jax.custom_batching.custom_vmap`), rewritten with that rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
from jax.custom_batching import custom_vmap

from precision_lab.rewrite import _compat


def bind_custom_vmap(eqn: Any, operands: Sequence[Any], rewritten: _compat.Rewrite) -> list[Any]:
    """Evaluates a custom_vmap call with its function and its batching rule rewritten.

    Args:
      eqn: the call; its parameters `rule`, `in_tree` and `out_tree` are JAX's own.
      operands: its inputs.
      rewritten: maps a jaxpr to one of the same signature.
    """
    rule, tree = eqn.params["rule"], eqn.params["in_tree"]
    call = rewritten(eqn.params["call"], _compat.Part.CALL)

    def batched(size: int, has_batch: Sequence[bool], *flat: Any) -> tuple[list[Any], list[bool]]:
        static: list[Any] = []

        def original(*given: Any) -> list[Any]:
            out, out_has_batch = rule(size, list(tree.unflatten(has_batch)), *tree.unflatten(given))
            static[:] = jax.tree.leaves(out_has_batch)
            return jax.tree.leaves(out)

        jaxpr = rewritten(jax.make_jaxpr(original)(*flat), _compat.Part.CALL)
        return _compat.evaluate_jaxpr(jaxpr, *flat), static

    run = custom_vmap(lambda *flat: _compat.evaluate_jaxpr(call, *flat))
    run.def_vmap(batched)
    return list(run(*operands))

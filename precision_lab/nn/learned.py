"""What quantizers of a model have learned: float32, in whatever dtype a policy stores the other parameters.

A step in bfloat16 would be off by up to 0.4 %, and then no code is what it was trained to be.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import jax
from flax import nnx

from precision_lab.nn.fake_quant import QuantParam
from precision_lab.policy import Policy
from precision_lab.rewrite import is_qtensor, leaf_names

STATS = "quant_stats"
_LEARNED = ("scale", "offset", "alpha")


def learned_of(target: Any, variables: Any = None) -> frozenset[str]:
    """Returns the paths of the parameters of a model that are learned numbers of `FakeQuant`s or `LinenFakeQuant`s.

    Args:
      target: an NNX model, or anything else.
      variables: the collections of a Linen model.
    """
    if isinstance(target, nnx.Module):
        paths = dict(nnx.to_flat_state(nnx.state(target, QuantParam)))
        return frozenset("/".join(map(str, path)) for path in paths)
    if not isinstance(variables, Mapping):
        return frozenset()
    return frozenset(_learned(variables.get("params", {}), variables.get(STATS, {})))


def stored(policy: Policy, params: Any, learned: frozenset[str]) -> Any:
    """Returns params as a policy stores them, but for those at the paths of `learned`, which stay as they are."""
    cast = policy.cast_to_param(params)
    if not learned:
        return cast
    before, structure = jax.tree.flatten(params, is_leaf=is_qtensor)
    after = jax.tree.leaves(cast, is_leaf=is_qtensor)
    pairs = zip(leaf_names(params), before, after, strict=True)
    return structure.unflatten([old if name in learned else new for name, old, new in pairs])


def _learned(params: Any, stats: Any, above: str = "") -> Iterator[str]:
    """Yields the paths of learned numbers, which stand where a count of steps is among the statistics."""
    if not isinstance(params, Mapping) or not isinstance(stats, Mapping):
        return
    if "steps" in stats:
        yield from (above + name for name in _LEARNED if name in params)
    for name in set(params) & set(stats):
        yield from _learned(params[name], stats[name], f"{above}{name}/")

"""Calls of Linen modules whose quantizers have a state: learned numbers in "params", running ones in "quant_stats"."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from flax.core.scope import in_filter

from precision_lab.nn.learned import STATS, learned_of, stored
from precision_lab.nn.qat import QAT, State
from precision_lab.nn.quantizer_states import STATES
from precision_lab.policy import Policy


def started(
    qat: QAT, fn: Callable[..., Any], params: Any, rest: Any, args: Any, kwargs: Any, options: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Returns params and other collections of an `init`, with the states of quantizers.

    Args:
      qat: what trains them.
      fn: `apply` as a function of (params, rest, args, kwargs).
      params, rest: the collections as the module has them.
      args, kwargs: as given to `init`, random keys first.
      options: of `QAT.started`.
    """
    rngs = args[0] if args else kwargs["rngs"]
    given = {key: value for key, value in kwargs.items() if key not in ("rngs", "mutable")}
    given |= {"rngs": rngs if isinstance(rngs, Mapping) else {"params": rngs}, "mutable": True}
    state = qat.started(fn, params, [rest, args[1:], given], {}, **options)
    stats = {**rest.get(STATS, {}), STATES: state["running"]}
    learned = {STATES: state["learned"]} if state["learned"] else {}
    return {**params, **learned}, {**rest, STATS: stats}


def stepped(
    qat: QAT, fn: Callable[..., Any], params: Any, rest: Any, args: Any, kwargs: Any, options: dict[str, Any]
) -> Any:
    """Returns what `apply` returns; with "quant_stats" mutable it is a step of training. Arguments as of `started`.

    Raises:
      ValueError: the variables have no states.
    """
    state, params, rest = taken(params, rest)
    train = in_filter(kwargs.get("mutable", False), STATS)
    out, after = qat.stepped(fn, params, [rest, args, kwargs], {}, state, train=train, **options)
    if not train:
        return out
    value, changed = out
    return value, {**changed, STATS: {**changed.get(STATS, {}), STATES: after["running"]}}


def taken(params: Any, rest: dict[str, Any]) -> tuple[State, Any, dict[str, Any]]:
    """Returns the state among a module's variables, and its own params and other collections.

    Raises:
      ValueError: there is none.
    """
    stats = dict(rest.get(STATS, {}))
    if STATES not in stats:
        raise ValueError(
            f"the variables have no {STATES!r} in the collection {STATS!r}; make them by init of the prepared module."
        )
    params = dict(params)
    state: State = {"learned": params.pop(STATES, {}), "running": stats.pop(STATES)}
    rest = {name: tree for name, tree in rest.items() if name != STATS} | ({STATS: stats} if stats else {})
    return state, params, rest


def stored_params(policy: Policy, params: Any, rest: Mapping[str, Any]) -> Any:
    """Returns params as a policy stores them, but for what quantizers have learned; `rest` are other collections."""
    return stored(policy, params, learned_of(None, {"params": params, **rest}))

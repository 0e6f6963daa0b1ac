"""Wrong nestings: our transformations inside an optax wrapper that spoils them, found when the state is made.

`loss_scaling` takes gradients as backpropagation left them, so it must be the outermost optax transformation. Inside
`optax.chain` whatever stands before it sees scaled gradients, and clipping them is silently wrong; inside
`MultiSteps` one overflow poisons the accumulator for good; inside `apply_if_finite` an overflow never reaches it, so
that the scale never falls.

`master_weights` and the in-place roundings return the difference to a rounded parameter, not a direction: nothing may
come after them in a chain, and what comes before them would compute in 16 bits, where four gradients of 300 have an
infinite norm. `inject_hyperparams` around them stores hyperparameters in the dtype of the parameters (b2 = 0.999 is 1
in bfloat16), and `apply_if_finite` around them fails on the float32 updates. All three belong inside.

Nothing in the arguments of `init` tells where it was called from, so this looks at the call stack, once, when a
state is made. Legitimate around `loss_scaling` is what hands gradients in and updates on unchanged and is not an optax
transformation: your own step, `nnx.Optimizer`, Flax's `TrainState`, `jit`, `vmap`, `scan`, `shard_map`; also optax's
functions on trees of state, such as `optax.tree_utils.tree_map_params`, which call `init` only to see its structure.
Around the others MultiSteps, masked and multi_transform are fine as well.
"""

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import jax

from precision_lab.optim.trees import is_low_precision

_STRUCTURE_ONLY = ("optax.tree_utils", "optax.tree")
_SCALING_WAY_OUT = {
    "MultiSteps": "loss_scaling(optax.MultiSteps(inner, k), scale)",
    "apply_if_finite": "loss_scaling(inner, scale), which skips non-finite steps by itself",
}
_HYPER = "it would store hyperparameters in 16 bits. Write {name}(optax.inject_hyperparams(optax.adamw)(...))"
_CHAIN = (
    "what comes before would compute in 16 bits, and what comes after would get roundings instead of directions. "
    "Write {name}(optax.{wrapper}(...))"
)
_ROUNDING_WAY_OUT = {
    "chain": _CHAIN,
    "named_chain": _CHAIN,
    "inject_hyperparams": _HYPER,
    "inject_stateful_hyperparams": _HYPER,
    "apply_if_finite": "it cannot skip float32 updates of 16-bit parameters. Write loss_scaling({name}(inner), "
    "StaticLossScale(1.0)), which skips non-finite steps",
}


def refuse_optax_around(name: str) -> None:
    """Raises ValueError if the caller was called, however deep, by an optax transformation's `init`."""
    wrapper = next(_optax_callers(sys._getframe(1)), None)
    if wrapper is None:
        return
    way_out = _SCALING_WAY_OUT.get(wrapper, f"{name}(optax.{wrapper}(...), scale)")
    raise ValueError(
        f"{name} must be the outermost optax transformation, but it stands inside optax.{wrapper}, which would see "
        f"gradients before they are unscaled and checked. Write {way_out}."
    )


def refuse_spoilers_around(name: str) -> None:
    """Raises ValueError if the caller, a rounding transformation, was called by one that must stand inside it."""
    for wrapper in _optax_callers(sys._getframe(1)):
        if wrapper in _ROUNDING_WAY_OUT:
            why = _ROUNDING_WAY_OUT[wrapper].format(name=name, wrapper=wrapper)
            raise ValueError(f"{name} stands inside optax.{wrapper}: {why}.")


def refuse_low_hyperparameters(state: Any) -> None:
    """Raises ValueError if `inject_hyperparams` in `state` keeps a hyperparameter in fewer than 32 bits."""
    for holder in jax.tree.leaves(state, is_leaf=_has_hyperparameters):
        low = [key for key, x in (holder.hyperparams if _has_hyperparameters(holder) else {}).items() if _is_low(x)]
        if low:
            raise ValueError(
                f"optax.inject_hyperparams keeps {', '.join(map(repr, low))} in {holder.hyperparams[low[0]].dtype}, "
                "the dtype of the parameters, where b2 = 0.999 may be 1. Put master_weights, stochastic_rounding, "
                "kahan or nearest_rounding around it, inside loss_scaling."
            )


def _optax_callers(frame: FrameType | None) -> Iterator[str]:
    """Yields the optax wrappers on the call stack above `frame`, the nearest first."""
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.split(".")[0] == "optax" and not module.startswith(_STRUCTURE_ONLY):
            yield frame.f_code.co_qualname.split(".")[0]
        frame = frame.f_back


def _has_hyperparameters(x: Any) -> bool:
    return isinstance(getattr(x, "hyperparams", None), dict)


def _is_low(x: Any) -> bool:
    return hasattr(x, "dtype") and is_low_precision(x)

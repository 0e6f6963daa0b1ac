"""Wrong nestings: `loss_scaling` inside an optax wrapper, found when the state is made.

`loss_scaling` takes gradients as backpropagation left them, so it must be the outermost optax transformation. Inside
`optax.chain` whatever stands before it sees scaled gradients, and clipping them is silently wrong; inside
`MultiSteps` one overflow poisons the accumulator for good; inside `apply_if_finite` an overflow never reaches it, so
that the scale never falls. Nothing in the arguments of `init` tells where it was called from, so this looks at the
call stack, once, when a state is made.

Legitimate around it is what hands gradients in and updates on unchanged and is not an optax transformation: your own
step, `nnx.Optimizer`, Flax's `TrainState`, `jit`, `vmap`, `scan`, `shard_map`; also optax's functions on trees of
state, such as `optax.tree_utils.tree_map_params`, which call `init` only to see its structure. `nearest_rounding`
and `master_weights` may stand on either side.
"""

import sys
from types import FrameType

_STRUCTURE_ONLY = ("optax.tree_utils", "optax.tree")
_WAY_OUT = {
    "MultiSteps": "loss_scaling(optax.MultiSteps(inner, k), scale)",
    "apply_if_finite": "loss_scaling(inner, scale), which skips non-finite steps by itself",
}


def refuse_optax_around(name: str) -> None:
    """Raises ValueError if the caller was called, however deep, by an optax transformation's `init`."""
    wrapper = _optax_caller(sys._getframe(1))
    if wrapper is None:
        return
    way_out = _WAY_OUT.get(wrapper, f"{name}(optax.{wrapper}(...), scale)")
    raise ValueError(
        f"{name} must be the outermost optax transformation, but it stands inside optax.{wrapper}, which would see "
        f"gradients before they are unscaled and checked. Write {way_out}."
    )


def _optax_caller(frame: FrameType | None) -> str | None:
    """Returns the optax wrapper nearest to `frame` on the call stack, or None."""
    while frame is not None:
        module = frame.f_globals.get("__name__", "")
        if module.split(".")[0] == "optax" and not module.startswith(_STRUCTURE_ONLY):
            return frame.f_code.co_qualname.split(".")[0]
        frame = frame.f_back
    return None

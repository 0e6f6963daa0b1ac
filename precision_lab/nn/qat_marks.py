"""What the marks of held states carry, gathered: the state that quantizers start with, and that after a step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from precision_lab.quant import Quantizer, QuantizerState, observer
from precision_lab.quant.observers import ObserverState
from precision_lab.quant.starts import PACT_ALPHA
from precision_lab.rewrite import Collector, Site, StateMark, Traced, harvest

_BEFORE_DATA = {"scale": 1.0, "alpha": PACT_ALPHA}
_COUNTERS = ("steps", "updates", "frozen")


def wants_state(site: Site, roles: Mapping[str, Quantizer], delay: int) -> None:
    """Raises ValueError where a site has quantizers with a state and the policy leaves no place for one."""
    treatment = site.treatment
    if treatment is None or not site.is_product:
        return
    if treatment.gradient is not None and (delay or treatment.gradient.calibration == "ema"):
        what = "cannot wait for the end of a delay" if delay else "has no running range"
        raise ValueError(f"'{site.name}': gradient={treatment.gradient} {what}; leave one of them out.")
    if roles and (treatment.gradient is not None or treatment.backward in ("original", "requantized")):
        said = ", ".join(repr(str(qz)) for qz in roles.values())
        raise ValueError(
            f"'{site.name}' quantizes by {said} with a state, but gradient= "
            "and backward= quantize each of its products anew, without one; leave one of them out."
        )
    if roles and treatment.execution == "native":
        raise ValueError(
            f"'{site.name}': execution=native multiplies codes, but a quantizer with a state is simulated in training; "
            "say execution=auto, and pl.convert the trained model, whose products take codes."
        )


def read_starts(traced: Traced, arrays: Sequence[Any]) -> tuple[Any, dict[tuple[str, str], QuantizerState]]:
    """Returns outputs, and the state that each quantizer starts with, by site and operand."""

    def first(a: Any, b: Any) -> Any:
        return jax.tree.map(lambda x, y: jnp.where(_spread(a["count"], x) > 0, x, y), a, b)

    out, found = _gathered(traced, arrays, first)
    states = {}
    for mark, kept in found.items():
        for axis in _shared_axes(mark):
            kept = jax.tree.map(lambda leaf, axis=axis: jnp.take(leaf, 0, axis), kept)
        seen, state = kept["count"] > 0, jax.tree.unflatten(mark.structure, kept["leaves"])
        states[mark.site, mark.role] = QuantizerState(*(_started(seen, numbers) for numbers in state))
    return out, states


def _started(seen: Any, numbers: Mapping[str, Any]) -> dict[str, Any]:
    """Returns numbers of a quantizer as they start, from nothing where it was not reached."""
    return {
        name: jnp.where(_spread(seen, x), x, x.dtype.type(_BEFORE_DATA.get(name, 0))) for name, x in numbers.items()
    }


def read_steps(traced: Traced, arrays: Sequence[Any], before: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Returns outputs, which can be differentiated, and the running numbers after the step."""
    out, found = _gathered(traced, arrays, lambda a, b: jax.tree.map(jnp.add, a, b))
    running = {site: dict(roles) for site, roles in before.items()}
    for mark, kept in found.items():
        for axis in _shared_axes(mark):
            kept = jax.tree.map(lambda leaf, axis=axis: jnp.sum(leaf, axis, dtype=leaf.dtype), kept)
        sums = jax.tree.unflatten(mark.structure, kept["leaves"]).running
        running[mark.site][mark.role] = _moved(before[mark.site][mark.role], sums, kept["count"], mark.quantizer)
    return out, running


def _gathered(traced: Traced, arrays: Sequence[Any], merge: Any) -> tuple[Any, dict[StateMark, Any]]:
    """Returns outputs and, of each mark, how often it was passed and what it carried, one for each turn of a scan."""

    def measure(pairs: Sequence[tuple[Any, Any]]) -> list[Any]:
        return [{"count": jnp.int32(1), "leaves": list(leaves)} for _, leaves in pairs]

    def nothing(shapes: Any) -> Any:
        return jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)

    def wants(mark: Any) -> bool:
        return isinstance(mark, StateMark)

    collector = Collector(wants, measure, merge, nothing, stacked=True, differentiable=True)
    return harvest(traced.jaxpr, arrays, collector)  # pyright: ignore[reportReturnType]


def _shared_axes(mark: StateMark) -> list[int]:
    """Returns the axes of scans whose iterations share a state, last first."""
    return [axis for axis, is_over_layers in reversed(list(enumerate(mark.scans))) if not is_over_layers]


def _moved(before: Mapping[str, Any], sums: Mapping[str, Any], count: Any, qz: Quantizer) -> dict[str, Any]:
    """Returns running numbers after a step in which they were read `count` times, from the sum of what was read.

    They are the mean of what was read, but for counts of events, which add up.
    """
    times = jnp.maximum(count, 1)
    after = {}
    for name, total in sums.items():
        old, n = before[name], _spread(times, total)
        if not jnp.issubdtype(total.dtype, jnp.integer):
            after[name] = total / n.astype(total.dtype)
        elif name in _COUNTERS:
            after[name] = total // n
        else:
            after[name] = total - (n - 1) * old
    if "low" in after:
        seen = ObserverState(*(after[name] for name in ObserverState._fields[:-1]), histogram=None)
        scale, zero_point = observer(qz).scale(seen)
        for name, mean in (("scale", scale), ("zero_point", zero_point)):
            if name in after:  # one reading is its own mean, bit for bit
                after[name] = jnp.where(_spread(count, mean) == 1, sums[name], mean)
    return {name: jnp.where(_spread(count, new) > 0, new, before[name]) for name, new in after.items()}


def _spread(count: Any, like: Any) -> Any:
    """Returns counts with axes of length 1 after those that they have, to the rank of an array."""
    return jnp.reshape(count, np.shape(count) + (1,) * (np.ndim(like) - np.ndim(count)))

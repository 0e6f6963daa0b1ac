"""The state that a quantizer can have, learned scales, offsets and clips or running ranges, and functions of it.

    state = init_state("int4@channel,lsq", kernel, axis=0)
    value, state = quantize_with_state(kernel, "int4@channel,lsq", state, axis=0, train=True)

A value is always `fake_quantize(x, qz, **known_scales(qz, state))`. Learned numbers move by their gradients alone,
which the optimizer applies to `state.learned`; running ones move when a training step looks at an array.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from precision_lab.quant.arithmetic import divide
from precision_lab.quant.estimators import replace_gradient
from precision_lab.quant.fake import fake_quantize
from precision_lab.quant.histograms import Histogram
from precision_lab.quant.numbers import QuantizerParams, static_params
from precision_lab.quant.observers import ObserverState, observer
from precision_lab.quant.options import LEARNED
from precision_lab.quant.parsing import quantizer
from precision_lab.quant.quantizer import Quantizer
from precision_lab.quant.starts import needs_data, start_of
from precision_lab.quant.tiles import Tiles

Axis = int | tuple[int, ...] | None

# No scale that is learned is below this: far under any that quantizes something, and large enough to divide by.
_LEAST_SCALE = np.float32(2.0**-64)
_MOST_COUNTS = 2**31 - 1
_IS_FROZEN, _FROZEN = "frozen", "frozen_"


class QuantizerState(NamedTuple):
    """What a quantizer knows besides its string: a pytree whose names are those of a module's variables.

    Attributes:
      learned: float32 arrays of the shape of scales that gradients flow to: "scale" for "lsq", "scale" and "offset" for
        "lsq+", "alpha" for "pact": the clip itself, as in its paper, whose step is alpha / largest code. Else empty.
      running: "steps", int32, the training steps so far. If ranges are kept: what an `ObserverState` holds by name
        ("low", "high", "updates", "nonfinite", and "counts" and "exponent" of a histogram), and "scale" and, under
        "affine", "zero_point", float32, as read off it last. If learned numbers are to be frozen: "frozen", int32, 1
        once they are, and "frozen_scale" and so on, what they are then.
    """

    learned: dict[str, Any]
    running: dict[str, Any]


def needs_state(qz: Any) -> bool:
    """Returns whether a quantizer asks for something that only state can hold: a learned scale, or a running range.

    True for the estimators "lsq", "lsq+" and "pact" and for calibration "ema".
    """
    return quantizer(qz).has_state


def may_be_static(qz: Any) -> bool:
    """Returns whether a quantizer can have running ranges, and so a scale that does not depend on the array at hand."""
    qz = quantizer(qz)
    has_scale = qz.is_scaled and qz.estimator != "dorefa" and qz.scale_format != "double"
    return has_scale and qz.estimator not in LEARNED


def init_state(
    qz: Any,
    x: Any,
    *,
    axis: Axis = None,
    running: bool | None = None,
    start: str | None = None,
    freeze: int | None = None,
) -> QuantizerState:
    """Returns the state of a quantizer before the first step; that of a dynamic one holds nothing but a step counter.

    Args:
      qz: a quantizer or anything that `quantizer` takes.
      x: array that learned numbers start from, NaN and infinities left out: the weights, or a batch of activations. A
        `jax.ShapeDtypeStruct` is enough for running ranges, which begin empty, and for PACT.
      axis: the contracted axis or axes, as for `fake_quantize`.
      running: whether ranges are kept, by the quantizer's calibration; by default only for "ema".
      start: the calibration whose range a learned grid covers at first. By default the quantizer's ("int8,lsq,mse"; 8
        bits need it, as LSQ's own start is four times too wide), and where that is "absmax", the paper's: 2 mean|x| /
        sqrt(largest code) for "lsq"; for "lsq+" mean and three deviations, or the range of `x` for unsigned formats;
        alpha = 10 for "pact", which only weight decay shrinks while no value reaches it. A group of zeros starts at
        the scale 1.
      freeze: that of the calls to come, as for `quantize_with_state`; it makes a place for what is frozen.

    Raises:
      ValueError: a quantizer whose options its state cannot honour, or arguments that it has no use for.
      TypeError: a learned quantizer that starts from data, and a shape instead of data.
    """
    qz = quantizer(qz)
    learned = qz.estimator in LEARNED
    keeps = running if running is not None else qz.calibration == "ema"
    _check(qz, learned=learned, running=keeps, start=start)
    shape = tuple(x.shape)
    state = QuantizerState({}, {"steps": jnp.zeros((), jnp.int32)})
    if learned:
        if isinstance(x, jax.ShapeDtypeStruct) and needs_data(qz, start):
            raise TypeError(f"{qz!r} starts from data; give an array of shape {shape}, not its shape alone.")
        found = start_of(x, qz, Tiles.of(shape, qz.granularity, axis), start)
        # Copies: a state in which two arrays are one buffer cannot be donated to a step.
        place = {} if freeze is None else _frozen({name: jnp.array(array) for name, array in found.items()}, False)
        return QuantizerState(found, {**state.running, **place})
    if keeps:
        state.running.update(_by_name(qz, observer(qz, axis=axis).init(shape), axis))
    return state


def quantize_with_state(
    x: Any,
    qz: Any,
    state: QuantizerState,
    *,
    axis: Axis = None,
    train: bool,
    delay: int = 0,
    freeze: int | None = None,
    momentum: float = 0.1,
    key: jax.Array | None = None,
    params: QuantizerParams | None = None,
) -> tuple[jax.Array, QuantizerState]:
    """Returns `x` quantized with what the state knows, and the state after it.

    In training the step is counted and running ranges take `x` in first, NaN and infinities counted and left out; in
    evaluation the state comes back as it was. Ranges that have seen nothing take `x` for this call. A histogram stops
    when one of its scales has counted 2**31 values.

    Args:
      x: float16, bfloat16 or float32 array with as many scales as the state has.
      qz: the quantizer that the state was made for, or what parses to it.
      state: of `init_state`, or of the step before.
      axis: as for `fake_quantize`.
      train: whether this is a step of training.
      delay: training steps, at first, in which the value is `x` unchanged; ranges are collected already.
      freeze: training steps after which ranges and learned numbers stay as they are; None for never. From then on
        `state.learned` has no gradient and no say, whatever the momentum or weight decay of an optimizer makes of it.
      momentum: how far an "ema" range moves towards each array, in (0, 1].
      key: randomness, for rounding "stochastic".
      params: numbers to use instead of those of `qz`, as for `fake_quantize`; not with running ranges.

    Raises:
      ValueError: a state of another quantizer or shape, or what `fake_quantize` refuses.
      TypeError: as `fake_quantize`.
    """
    qz = quantizer(qz)
    check_schedule(delay, freeze, momentum)
    _check_call(qz, state, freeze, params)
    steps = state.running["steps"]
    known = state
    if "updates" in state.running:
        known = state._replace(running=_observed(x, qz, state.running, axis, momentum, train=train, freeze=freeze))
    if _IS_FROZEN in state.running:
        assert freeze is not None
        current = {name: jax.lax.stop_gradient(array) for name, array in _current(state).items()}
        known = state._replace(running={**state.running, **_frozen(current, steps >= freeze)})
    scales: dict[str, Any] = known_scales(qz, known, params=params)
    value = fake_quantize(x, qz, axis=axis, key=key, params=params, **scales)
    value = jnp.where(steps < delay, x, value) if delay else value
    if not train:
        return value, state
    return value, QuantizerState(state.learned, {**known.running, "steps": steps + 1})


def known_scales(qz: Any, state: QuantizerState, *, params: QuantizerParams | None = None) -> dict[str, jax.Array]:
    """Returns what a state says of "scale", "zero_point" and "offset": keywords for `fake_quantize` and `quantize`.

    Empty for a dynamic quantizer; of frozen numbers, what they were at the freeze. A learned scale that the optimizer
    has moved below 2**-64 is 2**-64, with its gradient as it was, so that it finds its way back.

    Args:
      qz: the quantizer that the state was made for.
      state: the state; running ranges must have seen an array.
      params: numbers that are used instead of those of `qz`.
    """
    qz = quantizer(qz)
    learned = _current(state)
    if "alpha" in learned:
        largest = (static_params(qz) if params is None else params).high
        learned["scale"] = divide(learned.pop("alpha"), largest)
    if learned:
        return {**learned, "scale": _positive(learned["scale"])}
    return {name: state.running[name] for name in ("scale", "zero_point") if name in state.running}


def _current(state: QuantizerState) -> dict[str, jax.Array]:
    """Returns learned numbers, those of the freeze where they are frozen."""
    learned = {name: jnp.asarray(array, jnp.float32) for name, array in state.learned.items()}
    if _IS_FROZEN not in state.running:
        return learned
    over = jnp.asarray(state.running[_IS_FROZEN]) > 0
    return {name: jnp.where(_alike(over, x), state.running[_FROZEN + name], x) for name, x in learned.items()}


def _frozen(learned: dict[str, Any], over: Any) -> dict[str, jax.Array]:
    """Returns the running numbers that say whether a freeze is over, and with which learned numbers."""
    kept = {_FROZEN + name: array for name, array in learned.items()}
    return {_IS_FROZEN: jnp.asarray(over, jnp.int32), **kept}


def _alike(over: jax.Array, x: jax.Array) -> jax.Array:
    """Returns a flag, which may have leading axes for layers, of the rank of an array."""
    return jnp.reshape(over, over.shape + (1,) * (x.ndim - over.ndim))


def _positive(scale: jax.Array) -> jax.Array:
    """Returns a scale that can be divided by, with the gradient of `scale`; NaN stays visible."""
    return replace_gradient(jnp.maximum(scale, _LEAST_SCALE), scale)


def _observed(
    x: jax.Array,
    qz: Quantizer,
    running: dict[str, Any],
    axis: Axis,
    momentum: float,
    *,
    train: bool,
    freeze: int | None,
) -> dict[str, Any]:
    """Returns running numbers after a look at `x`, where one is due."""
    obs = observer(qz, axis=axis, momentum=momentum)

    def look(running: dict[str, Any]) -> dict[str, Any]:
        seen = obs.update(_observer_state(running), jax.lax.stop_gradient(x))
        return {**running, **_by_name(qz, seen, axis)}

    due = running["updates"] == 0
    if train:
        due = True if freeze is None else due | (running["steps"] < freeze)
    if "counts" in running:
        share = Tiles.of(jnp.shape(x), qz.granularity, axis).per_scale
        due &= jnp.max(jnp.sum(running["counts"], 1)) <= _MOST_COUNTS - share
    return look(running) if due is True else jax.lax.cond(due, look, dict, running)


def _by_name(qz: Quantizer, seen: ObserverState, axis: Axis) -> dict[str, Any]:
    """Returns what an observer knows, and the scale it finds, by name."""
    named = {name: value for name, value in seen._asdict().items() if name != "histogram"}
    if seen.histogram is not None:
        named.update(seen.histogram._asdict())
    scale, zero_point = observer(qz, axis=axis).scale(seen)
    return {**named, "scale": scale, **({} if zero_point is None else {"zero_point": zero_point})}


def _observer_state(running: dict[str, Any]) -> ObserverState:
    """Returns the inverse of `_by_name`."""
    histogram = Histogram(running["counts"], running["exponent"]) if "counts" in running else None
    return ObserverState(**{name: running[name] for name in ObserverState._fields[:-1]}, histogram=histogram)


def _check(qz: Quantizer, *, learned: bool, running: bool, start: str | None) -> None:
    """Refuses what a state cannot do."""
    if learned and (running or qz.calibration == "ema"):
        raise ValueError(f"{qz!r}: a scale is learned or follows a running range, not both; leave out one of them.")
    if learned and qz.scheme not in ("symmetric", "full", "full_clipped"):
        way = "say 'lsq+', which learns an offset" if qz.scheme == "affine" else "say 'symmetric' or 'full'"
        raise ValueError(f"{qz!r}: a learned scale leaves nothing of scheme {qz.scheme!r}; {way}.")
    if learned and qz.scale_format == "double":
        raise ValueError(f"{qz!r}: scales quantized together cannot be learned one by one; leave out 'double'.")
    if start is not None and not learned:
        raise ValueError(f"{qz!r} learns nothing that start={start!r} could be for; say 'lsq', 'lsq+' or 'pact'.")
    if qz.calibration == "ema" and not running:
        raise ValueError(f"{qz!r}: 'ema' is a running range; leave out running=False, or 'ema'.")
    if running and not may_be_static(qz):
        raise ValueError(f"{qz!r} has no range to keep; say 'symmetric' or another scheme, without 'double'.")


def check_schedule(delay: Any, freeze: Any, momentum: Any) -> None:
    """Refuses a schedule that is none.

    Raises:
      TypeError: `delay` or `freeze` is no whole number, or `momentum` no number.
      ValueError: one of them is out of range.
    """
    for name, steps, otherwise in (("delay", delay, ""), ("freeze", freeze, ", or None for never")):
        if not _is_whole(steps) and not (otherwise and steps is None):
            raise TypeError(f"{name}={steps!r} counts training steps: expected a whole number{otherwise}.")
    if delay < 0 or (freeze is not None and freeze < 0):
        raise ValueError(f"delay={delay} and freeze={freeze} count training steps from 0 on.")
    if isinstance(momentum, bool) or not isinstance(momentum, int | float | np.number):
        raise TypeError(f"momentum={momentum!r} is no number; expected one in (0, 1].")
    if not 0 < momentum <= 1:
        raise ValueError(f"momentum must be in (0, 1], got {momentum}.")


def _is_whole(x: Any) -> bool:
    """Returns whether something is a whole number."""
    return isinstance(x, int | np.integer) and not isinstance(x, bool)


def _check_call(qz: Quantizer, state: QuantizerState, freeze: int | None, params: Any) -> None:
    """Refuses a state of another quantizer, or of another kind of schedule."""
    expected = {"lsq": {"scale"}, "lsq+": {"scale", "offset"}, "pact": {"alpha"}}.get(qz.estimator, set())
    keeps = "updates" in state.running
    if set(state.learned) != expected or (qz.calibration == "ema" and not expected and not keeps):
        raise ValueError(
            f"{qz!r} cannot use a state with learned {sorted(state.learned)}, running {sorted(state.running)}; make "
            "one by init_state with the same quantizer."
        )
    if freeze is not None and not keeps and not expected:
        raise ValueError(f"{qz!r} is dynamic, with nothing to freeze; leave out freeze=, or say 'ema' or 'lsq'.")
    if expected and (freeze is not None) != (_IS_FROZEN in state.running):
        how = "has no place for what it froze" if freeze is not None else "is one that freezes"
        raise ValueError(
            f"{qz!r}: freeze={freeze}, but the state {how}; give init_state the same freeze= as its calls."
        )
    if params is not None and keeps:
        raise ValueError(f"params= give {qz!r} other numbers than its running ranges were read with; leave them out.")

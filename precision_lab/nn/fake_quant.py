"""FakeQuant: a quantizer as a module that people build into a model, for NNX and for Linen.

Both hold the state of `precision_lab.quant.init_state` as variables and pass it through `quantize_with_state`: learned
numbers are parameters, which the optimizer moves; running ones are statistics, which a training step moves.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import linen, nnx

from precision_lab.quant import (
    Quantizer,
    QuantizerState,
    fake_quantize,
    init_state,
    needs_state,
    quantize_with_state,
    quantizer,
)
from precision_lab.quant.state import check_schedule

Axis = int | tuple[int, ...] | None


class QuantParam(nnx.Param):
    """A learned number of a quantizer; `nnx.state(model, nn.QuantParam)` picks them, for a learning rate of its own.

    It stays float32, whatever a policy stores other parameters as.
    """

    keeps_dtype = True


class QuantStat(nnx.Variable):
    """A running number of a quantizer, which training moves and no gradient reaches."""


class FakeQuant(nnx.Module):
    """Returns its input with every element on the grid of a quantizer; a module of NNX.

    `model.train()` and `model.eval()` set `use_running_average`, as for `nnx.BatchNorm`: training moves ranges, while
    evaluation moves nothing. Without `example` the variables are made in the first call, from its input: make the
    optimizer after it.

    Attributes:
      scale, offset, alpha: the learned numbers that the estimator has, each a `QuantParam`; see `QuantizerState`.
      steps, low, high, ...: the running ones, each a `QuantStat`, if there are any.

    Args:
      quantizer: a quantizer or what parses to one: "int4@channel,lsq".
      axis: the contracted axis or axes of the product that the input enters, as for `fake_quantize`.
      example: array that learned numbers start from, or a `jax.ShapeDtypeStruct` where no data are needed.
      running: whether ranges are kept; by default only for calibration "ema".
      start: the calibration that learned numbers start from, as for `init_state`.
      delay: training steps, at first, in which the input comes back as it is.
      freeze: training steps after which ranges and learned numbers stay as they are; None for never. The variables of
        what is learned then have no gradient and no say: `frozen_scale` and so on are what counts.
      momentum: how far an "ema" range moves towards each input, in (0, 1].
      use_running_average: True in evaluation.

    Raises:
      ValueError, TypeError: a schedule that is none; as `init_state` and, when called, `quantize_with_state`.
    """

    def __init__(
        self,
        quantizer: Any,
        *,
        axis: Axis = None,
        example: Any = None,
        running: bool | None = None,
        start: str | None = None,
        delay: int = 0,
        freeze: int | None = None,
        momentum: float = 0.1,
        use_running_average: bool | None = False,
    ) -> None:
        self.quantizer = _parsed(quantizer)
        self.axis, self.running, self.start = axis, running, start
        check_schedule(delay, freeze, momentum)
        self.delay, self.freeze, self.momentum = delay, freeze, momentum
        self.use_running_average = use_running_average
        if example is not None:
            self._begin(example)

    def __call__(
        self, x: jax.Array, use_running_average: bool | None = None, *, key: jax.Array | None = None
    ) -> jax.Array:
        """Returns `x` quantized, of its shape and dtype.

        Args:
          x: float16, bfloat16 or float32 array.
          use_running_average: True in evaluation; None for what the module was told.
          key: randomness, for rounding "stochastic".
        """
        if _is_stateless(self):
            return fake_quantize(x, self.quantizer, axis=self.axis, key=key)
        if "steps" not in vars(self):
            self._begin(x)
        average = self.use_running_average if use_running_average is None else use_running_average
        if average is None:
            raise ValueError("FakeQuant needs use_running_average: True in evaluation, False in training.")
        state = self.state
        value, after = quantize_with_state(x, self.quantizer, state, train=not average, key=key, **_options(self))
        if not average:
            for name, array in after.running.items():
                getattr(self, name)[...] = array
        return value

    @property
    def state(self) -> QuantizerState:
        """Returns what the variables hold, for `known_scales`; there are none before the first call or an `example`."""
        return QuantizerState(self._held(QuantParam), self._held(QuantStat))

    def _begin(self, x: Any) -> None:
        """Makes the variables."""
        if _is_stateless(self):
            return
        state = _first_state(self, self.quantizer, x)
        for kind, arrays in ((QuantParam, state.learned), (QuantStat, state.running)):
            for name, array in arrays.items():
                setattr(self, name, kind(array))

    def _held(self, kind: type) -> dict[str, Any]:
        """Returns the arrays of one kind of variable by name."""
        return {name: variable[...] for name, variable in vars(self).items() if isinstance(variable, kind)}


class LinenFakeQuant(linen.Module):
    """Returns its input with every element on the grid of a quantizer; a module of Linen.

    Learned numbers are in the collection "params", running ones in "quant_stats", which a training step must name as
    mutable. `init` needs a real batch: learned numbers start from what the module is called with there. Under a policy
    they stay float32, whatever it stores other parameters as.

    Attributes:
      quantizer, axis, running, start, delay, freeze, momentum: as for `FakeQuant`.
    """

    quantizer: Any
    axis: Axis = None
    running: bool | None = None
    start: str | None = None
    delay: int = 0
    freeze: int | None = None
    momentum: float = 0.1

    @linen.compact
    def __call__(self, x: jax.Array, train: bool, *, key: jax.Array | None = None) -> jax.Array:
        """Returns `x` quantized, of its shape and dtype.

        Args:
          x: float16, bfloat16 or float32 array.
          train: whether this is a step of training.
          key: randomness, for rounding "stochastic".
        """
        qz = _parsed(self.quantizer)
        check_schedule(self.delay, self.freeze, self.momentum)
        if _is_stateless(self):
            return fake_quantize(x, qz, axis=self.axis, key=key)

        def begin() -> QuantizerState:
            return _first_state(self, qz, x)

        names = jax.eval_shape(begin)
        learned = {name: self.param(name, lambda _, name=name: begin().learned[name]) for name in names.learned}
        running = {
            name: self.variable("quant_stats", name, lambda name=name: begin().running[name]) for name in names.running
        }
        state = QuantizerState(learned, {name: variable.value for name, variable in running.items()})
        value, after = quantize_with_state(x, qz, state, train=train, key=key, **_options(self))
        if train and not self.is_initializing():
            for name, array in after.running.items():
                running[name].value = array
        return value


def _parsed(spec: Any) -> Quantizer:
    """Returns the quantizer of a module, whose argument has the name of the function that reads it."""
    return quantizer(spec)


def _is_stateless(module: Any) -> bool:
    """Returns whether a module has nothing to keep: its quantizer finds its scale in each array, from the start on."""
    given = module.running or module.start is not None or module.delay or module.freeze is not None
    return not (given or needs_state(module.quantizer))


def _first_state(module: Any, qz: Quantizer, x: Any) -> QuantizerState:
    """Returns the state that a module starts with, from its first input."""
    options = {name: getattr(module, name) for name in ("axis", "running", "start", "freeze")}
    return init_state(qz, x, **options)


def _options(module: Any) -> dict[str, Any]:
    """Returns the keywords of `quantize_with_state` that a module is made with."""
    return {name: getattr(module, name) for name in ("axis", "delay", "freeze", "momentum")}

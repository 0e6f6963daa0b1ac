"""Loss scales: by which factor the loss is multiplied before backpropagation, and how that factor changes.

These are configurations: numbers, fixed for a run. What changes during training (the current scale, the number of
finite steps) lives in the optimizer state, see `loss_scaling`. A number may be a float32 or int32 scalar array, and
traced, so that one program serves them all; a scale that holds arrays is not checked.
"""

import dataclasses
import math
from typing import Any, TypeAlias

from jax import Array

_SMALLEST = 2.0**-126
_LARGEST = 2.0**126
"""Between these a scale and its reciprocal are both normal float32 numbers."""


@dataclasses.dataclass(frozen=True)
class NoLossScale:
    """The scale is 1 and every step is applied, finite or not; state and telemetry are as with the others."""


@dataclasses.dataclass(frozen=True)
class StaticLossScale:
    """The scale never changes; a step with a non-finite gradient is skipped.

    Powers of two change no bit of a gradient that stays in range.
    """

    scale: float | Array

    def __post_init__(self) -> None:
        _require_scale("StaticLossScale.scale", self.scale)


@dataclasses.dataclass(frozen=True)
class DynamicLossScale:
    """The scale grows after `interval` finite steps in a row, and falls after a step that is not, which is skipped.

    Attributes:
      init: scale at the first step.
      growth: factor on the scale after `interval` finite steps in a row, counted from the last change.
      backoff: factor on the scale after a non-finite step.
      interval: finite steps until growth; the scale grows on exactly this step.
      min: the scale never falls below this; a step that is not finite even there is reported by `no_usable_scale`.
      max: the scale never grows beyond this.
      hysteresis: non-finite steps in a row until the scale falls. The one that makes it so many, and every further
        one of the same run, lowers the scale; any finite step begins the count anew. All of them are skipped, and
        all of them set back the count towards growth. With 1 every non-finite step lowers the scale.

    Source: Micikevicius et al., "Mixed Precision Training", 2018, arXiv:1710.03740, section 3.2; the defaults are
      those of torch.amp.GradScaler, with the bounds of NVIDIA apex's LossScaler; hysteresis as in NVIDIA apex's
      kernel `update_scale_hysteresis`.
    """

    init: float | Array = 65536.0
    growth: float | Array = 2.0
    backoff: float | Array = 0.5
    interval: int | Array = 2000
    min: float | Array = 1.0
    max: float | Array = 2.0**24
    hysteresis: int | Array = 1

    def __post_init__(self) -> None:
        if any(isinstance(getattr(self, field.name), Array) for field in dataclasses.fields(self)):
            return
        for name in ("init", "min", "max"):
            _require_scale(f"DynamicLossScale.{name}", getattr(self, name))
        if not self.min <= self.init <= self.max:
            raise ValueError(
                f"DynamicLossScale expects min <= init <= max, got min {self.min:g}, init {self.init:g}, "
                f"max {self.max:g}."
            )
        if not (self.growth > 1 and math.isfinite(self.growth)):
            raise ValueError(f"DynamicLossScale.growth must be finite and above 1, got {self.growth!r}.")
        if not 0 < self.backoff < 1:
            raise ValueError(f"DynamicLossScale.backoff must lie between 0 and 1, got {self.backoff!r}.")
        for name in ("interval", "hysteresis"):
            count = getattr(self, name)
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"DynamicLossScale.{name} must be a positive integer, got {count!r}.")


LossScale: TypeAlias = NoLossScale | StaticLossScale | DynamicLossScale


def as_loss_scale(scale: Any) -> LossScale:
    """Returns our loss scale for one of ours or of jmp's.

    Args:
      scale: a loss scale of this module, or a jmp.NoOpLossScale, StaticLossScale or DynamicLossScale. A dynamic one
        of jmp starts from its current scale; its growth is capped at the largest power of two of a float16 scale,
        or at 2**126, where jmp goes on until the next value would be infinite.

    Raises:
      TypeError: `scale` is none of these.
      ValueError: a jmp scale in the middle of its growth interval, whose counter has no place here.
    """
    if isinstance(scale, NoLossScale | StaticLossScale | DynamicLossScale):
        return scale
    import jmp

    if isinstance(scale, jmp.NoOpLossScale):
        return NoLossScale()
    if isinstance(scale, jmp.StaticLossScale):
        return StaticLossScale(float(scale.loss_scale))
    if isinstance(scale, jmp.DynamicLossScale):
        return _from_jmp_dynamic(scale)
    raise TypeError(
        f"expected DynamicLossScale(), StaticLossScale(s), NoLossScale() or a jmp loss scale, got {scale!r}."
    )


def _from_jmp_dynamic(scale: Any) -> DynamicLossScale:
    """Converts a jmp.DynamicLossScale that stands at the start of its growth interval."""
    if int(scale.counter) != 0:
        raise ValueError(
            f"the jmp.DynamicLossScale has counted {int(scale.counter)} finite steps already, which cannot be carried "
            "over. Give one with counter 0."
        )
    init, floor = float(scale.loss_scale), float(scale.min_loss_scale)
    narrow = str(getattr(scale.loss_scale, "dtype", "float32")) == "float16"
    cap = 2.0**15 if narrow else _LARGEST
    factor = float(scale.factor)
    return DynamicLossScale(init, factor, 1 / factor, int(scale.period), min(floor, init), max(cap, init))


def _require_scale(name: str, value: Any) -> None:
    """Raises unless `value` is a number whose reciprocal is as safe in float32 as itself."""
    if isinstance(value, Array):
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {value!r}.")
    if not _SMALLEST <= value <= _LARGEST:
        raise ValueError(f"{name} must be positive, from 2**-126 to 2**126, got {value!r}.")

"""Policies made of a policy: for inference, with static scales, without quantizers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from precision_lab.policy.policy import Policy
from precision_lab.policy.treatment import QUANTIZERS
from precision_lab.quant import Granularity, Quantizer

OF_TRAINING = ("gradient", "dgrad", "wgrad", "backward")
OF_ACTIVATIONS = ("activation", "attention")


def for_inference(policy: Policy) -> Policy:
    """Returns the policy without what it says of backward passes."""
    return _without(policy, OF_TRAINING)


def without_quantizers(policy: Policy) -> Policy:
    """Returns the policy with its floating formats alone."""
    return _without(policy, (*OF_TRAINING, *QUANTIZERS, "outliers"))


def without_states(policy: Policy) -> Policy:
    """Returns the policy with quantizers that find in each array what they would have learned or followed.

    They store as many codes and scales as before, but no offsets ("lsq+").
    """

    def dynamic(_: str, value: Any) -> Any:
        if not isinstance(value, Quantizer) or not value.has_state:
            return value
        calibration = None if value.calibration == "ema" else value.calibration
        return dataclasses.replace(value, calibration=calibration, estimator="ste", strength=None)

    return _everywhere(policy, dynamic)


def with_static_scales(policy: Policy) -> Policy:
    """Returns the policy with one scale for each activation, which is all that can be known before it is there.

    Raises:
      ValueError: activations have scales by group or block of the contracted axis, or outliers of their own.
    """

    def static(key: str, value: Any) -> Any:
        if key == "outliers" and value is not None:
            raise ValueError(f"outliers={value:g} are found in every call, and scales without them: none is static.")
        if key not in OF_ACTIVATIONS or value is None or not value.is_scaled:
            return value
        if value.granularity.kind in ("group", "block"):
            raise ValueError(
                f"{key}={value}: a static range is one for the whole tensor; say {value.format.name}@tensor, or leave "
                "calibration out: pl.convert(model, policy, example) finds these scales anew in every call."
            )
        return dataclasses.replace(value, granularity=Granularity("tensor"))

    return _everywhere(policy, static)


def _without(policy: Policy, keys: tuple[str, ...]) -> Policy:
    """Returns a policy with the default for some settings; rules that say nothing else are left out."""
    return _everywhere(policy, lambda key, value: None if key in keys else value, drop=keys)


def _everywhere(policy: Policy, change: Callable[[str, Any], Any], drop: tuple[str, ...] = ()) -> Policy:
    """Returns a policy with `change(key, value)` for each setting, also those of rules, from which `drop` are left."""
    keys = (*QUANTIZERS, *OF_TRAINING, "outliers")
    kept = [(rule, [(k, change(k, v)) for k, v in rule.settings if k not in drop]) for rule in policy.rules]
    rules = tuple(dataclasses.replace(rule, settings=tuple(settings)) for rule, settings in kept if settings)
    return dataclasses.replace(policy, rules=rules, **{key: change(key, getattr(policy, key)) for key in keys})

"""Qwix's rules as a policy, for models that were quantized with Qwix."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from precision_lab.policy.policy import Policy

_PRODUCTS = ("dot_general", "einsum")
_CONVOLUTION = "conv_general_dilated"
_ANYTHING = ".*"
_WORDS = re.compile(r"((?:(?<=/)|^)\.\*/|\.\*)")
_PLAIN = re.compile(r"(?:[\w\-/]|\\\.)*")
_NOT_QUANTIZED = {"weight": None, "activation": None, "attention": None, "backward": None}


def from_qwix(rules: Any) -> Policy:
    """Returns the policy that quantizes what Qwix's rules quantize, with the same grids and scales.

    Qwix takes the first rule that matches a module, we take the last, so the order is the other way around; a rule
    without a weight type leaves modules alone, as there. Weights have one scale for each output channel, activations
    one for each row, and both groups along the contracted axis where there is a tile size. Products of two activations
    are einsums in Qwix, as in Flax's attention: they are quantized if a rule is for all operations or for "einsum", and
    its path ends in `.*`. A path that ends in `/.*` takes the parameters of the module before it, too.
    Rules of training (`QtRule`) multiply unquantized operands backward: `backward=original`. Embeddings stay as they
    are, which Qwix cannot quantize.

    Args:
      rules: a `qwix.QuantizationRule` or `QtRule`, several in their order, or a provider that was made of them. Read
        by the names of their attributes; Qwix need not be installed.

    Raises:
      ValueError: what has no equal here, with what to say instead: module paths beyond names, `.*` and alternatives of
        whole paths; static ranges; quantized gradients; types and calibrations as of `quant.qwix.qwix_quantizer`.

    Source: google/qwix 0.1.8, qwix/_src/qconfig.py and providers/qt.py.
    """
    rules = getattr(rules, "_rules", rules)
    ordered = list(rules) if isinstance(rules, Iterable) else [rules]
    policy, specific = Policy(), []
    for rule in ordered:
        if rule.module_path == _ANYTHING and not rule.op_names:
            policy = Policy(**{key: value for key, value in _settings(rule).items() if value is not None})
            break  # what comes after this one is never reached
        specific.append(rule)
    for rule in reversed(specific):
        for pattern in _patterns(rule):
            policy = policy.with_rule(pattern, **_settings(rule))
    return policy


def _settings(rule: Any) -> dict[str, Any]:
    """Returns the settings of the sites of a rule."""
    from precision_lab.quant.qwix import qwix_quantizer

    _refuse_training(rule)
    if rule.weight_qtype is None:
        return dict(_NOT_QUANTIZED)
    weight, activation = _granularities(rule)
    weights = qwix_quantizer(rule.weight_qtype, rule.weight_calibration_method, weight)
    activations = None
    if rule.act_qtype is not None:
        activations = qwix_quantizer(rule.act_qtype, rule.act_calibration_method or "absmax", activation)
    attention = activations if not rule.op_names or "einsum" in rule.op_names else None
    backward = "original" if hasattr(rule, "bwd_qtype") else None
    return {"weight": weights, "activation": activations, "attention": attention, "backward": backward}


def _refuse_training(rule: Any) -> None:
    """Refuses what a rule says of ranges and gradients that has no equal here."""
    if rule.act_static_scale:
        raise ValueError(
            "act_static_scale=True: leave it out, and find static scales by pl.calibrate(model, policy, xs)."
        )
    for name in ("bwd_qtype", "bwd_weight_grad_tile_size", "bwd_stochastic_rounding", "additional_qt_config"):
        if getattr(rule, name, None) is not None:
            raise ValueError(
                f"{name}={getattr(rule, name)!r} has no equal here: Qwix takes the operands as the forward product "
                "quantized them, ours are quantized anew. Leave it out, and say gradient= in the policy."
            )


def _granularities(rule: Any) -> tuple[str, str]:
    """Returns what shares a scale in weights and in activations."""
    by_tensor = getattr(rule, "disable_channelwise_axes", False)
    if rule.tile_size is None:
        return ("tensor", "tensor") if by_tensor else ("channel", "token")
    if not isinstance(rule.tile_size, int) or by_tensor:
        raise ValueError(
            f"tile_size={rule.tile_size!r} must be a number of elements, without disable_channelwise_axes: a group has "
            "scales of its own for each channel."
        )
    group = f"group{rule.tile_size}"
    return group, group


def _patterns(rule: Any) -> Sequence[str]:
    """Returns globs over sites for the modules and operations of a rule."""
    paths = rule.module_path.removeprefix("(").removesuffix(")").split("|")
    return [_glob(path, rule) + operation for path in paths for operation in _operations(rule)]


def _operations(rule: Any) -> Sequence[str]:
    """Returns how the names of sites end."""
    names = set(rule.op_names)
    if names - {*_PRODUCTS, _CONVOLUTION}:
        raise ValueError(f"op_names={tuple(rule.op_names)}: only {', '.join((*_PRODUCTS, _CONVOLUTION))} are read.")
    if names == {"einsum"}:
        raise ValueError("op_names=('einsum',): einsums are dot_general here; name their modules instead.")
    if not names or names >= {"dot_general", _CONVOLUTION}:
        return [""]
    return [f":{_CONVOLUTION}*"] if names == {_CONVOLUTION} else [":dot_general*"]


def _glob(path: str, rule: Any) -> str:
    """Returns the glob of the sites in modules whose whole path a regular expression matches."""
    made = ""
    for word in _WORDS.split(path):
        if word == _ANYTHING:
            made += "**"
        elif word.startswith(_ANYTHING):
            made += "**?/"  # where `**/` would match nothing at all, too
        elif _PLAIN.fullmatch(word):
            made += word.replace(r"\.", ".")
        else:
            raise ValueError(
                f"module_path={rule.module_path!r}: names, '.*' and '|' between whole paths are read, not {word!r}; "
                "write this rule by policy.with_rule, whose patterns are globs."
            )
    return made if path.endswith(_ANYTHING) else made + "/*"

"""The numbers of a policy's quantizers apart from its structure, so that policies that differ in them share a program.

A quantizer is its numbers (bits, exponent and mantissa widths, clip ratio, strength of the estimator) and a structure
(granularity, scheme, calibration, rounding, kind of estimator). Where its products are simulated, its numbers can be
arrays; where the hardware multiplies codes, they can be while the codes have one array type. So can the numbers of a
compute format, where its products are simulated. All else is structure.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from precision_lab import formats
from precision_lab.formats import Format, FormatParams
from precision_lab.policy import Policy, Treatment
from precision_lab.policy.policy import Rule
from precision_lab.quant import Quantizer, QuantizerParams, needs_state, quantizer_params
from precision_lab.quant.options import STRENGTHS
from precision_lab.rewrite.cast import NATIVE
from precision_lab.rewrite.held import AsCodes, numbers_key
from precision_lab.rewrite.quantized import code_dtype, have_codes
from precision_lab.rewrite.traced_compute import WIDEST

SETTINGS = ("weight", "activation", "attention", "embedding")
"""The quantizers that `numbers=` can be given for, each also at the sites of a rule, as `pattern:setting`."""
COMPUTE = "compute"
"""Likewise, the format of products."""
_STANDS_FOR_ALL = formats.format("float8_e4m3fn")


class Apart(NamedTuple):
    """A policy taken apart.

    Attributes:
      policy: with every number that can be an array at a fixed value, so that policies alike in structure are equal.
      numbers: what `apply_policy(..., numbers=)` takes to make it the whole policy again, by setting.
      reasons: why the numbers of a quantizer or of a simulated format are structure, by setting, where they are.
    """

    policy: Policy
    numbers: dict[str, QuantizerParams | AsCodes | FormatParams]
    reasons: dict[str, str]


def apart(policy: Policy) -> Apart:
    """Returns the structure and the numbers of a policy.

    `apply_policy(target, apart.policy, numbers=apart.numbers)` computes what `apply_policy(target, policy)` does.
    """
    numbers: dict[str, QuantizerParams | AsCodes | FormatParams] = {}
    reasons: dict[str, str] = {}
    plain: dict[str, Quantizer | Format] = {}
    for key, setting, quantizer in _quantizers(policy):
        reason = _why_structure(policy, setting, quantizer)
        if reason:
            reasons[key] = reason
            continue
        plain[key] = _structure(quantizer)
        params = quantizer_params(quantizer)
        if quantizer.format.kind == "int":  # Rounding to integers is cheaper than to a format that is traced.
            params = params._replace(format=None)
        numbers[key] = AsCodes(params) if _multiplied_as_codes(policy, setting, quantizer) else params
    for key, fmt in _simulated(policy):
        if reason := _why_static(policy, fmt):
            reasons[key] = reason
        else:
            plain[key], numbers[key] = _STANDS_FOR_ALL, fmt.params()
    base = {key: plain[key] for key in (*SETTINGS, COMPUTE) if key in plain}
    rules = tuple(_without_numbers(rule, plain) for rule in policy.rules)
    return Apart(dataclasses.replace(policy, rules=rules, **base), numbers, reasons)


def require_keys(policy: Policy, numbers: Mapping[str, object]) -> None:
    """Raises ValueError for numbers of no setting of a policy or its rules."""
    every = ((rule, setting) for rule in policy.rules for setting in (*SETTINGS, COMPUTE))
    of_rules = {numbers_key(setting, rule.pattern) for rule, setting in every if rule.sets(setting)}
    if unknown := set(numbers) - {*SETTINGS, COMPUTE} - of_rules:
        known = ", ".join((*SETTINGS, COMPUTE, *sorted(of_rules)))
        raise ValueError(f"numbers= are for the settings {known}, got {sorted(unknown)}.")


def _quantizers(policy: Policy) -> Iterator[tuple[str, str, Quantizer]]:
    """Yields (key, setting, quantizer) of everything in a policy that quantizes operands."""
    for setting in SETTINGS:
        if getattr(policy, setting) is not None:
            yield setting, setting, getattr(policy, setting)
    for rule in policy.rules:
        for setting, value in rule.settings:
            if setting in SETTINGS and value is not None:
                yield numbers_key(setting, rule.pattern), setting, value


def _simulated(policy: Policy) -> Iterator[tuple[str, Format]]:
    """Yields (key, format) of every compute format in a policy that is simulated."""
    for treatment, pattern in zip(treatments(policy), ("", *(rule.pattern for rule in policy.rules)), strict=True):
        said = not pattern or any(rule.pattern == pattern and rule.sets(COMPUTE) for rule in policy.rules)
        native = treatment.execution == "auto" and treatment.compute.name in NATIVE
        if said and not native and treatment.compute.mantissa_bits <= WIDEST.mantissa_bits:
            yield numbers_key(COMPUTE, pattern), treatment.compute


def _why_static(policy: Policy, fmt: Format) -> str:
    """Returns why the numbers of a compute format are structure, or an empty string."""
    patterns = [rule.pattern for rule in policy.rules]
    if len(set(patterns)) < len(patterns):
        return "several rules have one pattern"
    if policy.ops != "products" or policy.op is not None or any(rule.sets("op", "execution") for rule in policy.rules):
        return "operations follow it too (ops= or op=), or a rule says execution="
    for treatment in treatments(policy):
        if treatment.quantizes or treatment.dgrad is not None or treatment.wgrad is not None:
            return "products have other formats beside it (quantizers, dgrad= or wgrad=)"
        if treatment.execution == "native":
            return "execution=native"
    try:
        fmt.params()
    except ValueError:
        return f"rounding to {fmt.name} is not exact as data"
    return ""


def _without_numbers(rule: Rule, plain: Mapping[str, Quantizer | Format]) -> Rule:
    """Returns a rule with its quantizers and its compute format as `plain` has them."""
    settings = tuple((key, plain.get(numbers_key(key, rule.pattern), value)) for key, value in rule.settings)
    return dataclasses.replace(rule, settings=settings)


def _why_structure(policy: Policy, setting: str, quantizer: Quantizer) -> str:
    """Returns why the numbers of a quantizer are structure, or an empty string."""
    patterns = [rule.pattern for rule in policy.rules]
    if len(set(patterns)) < len(patterns):
        return "several rules have one pattern"
    fmt = quantizer.format
    if fmt.kind not in ("int", "float") or not quantizer.is_scaled or quantizer.calibration == "kl":
        return f"{quantizer} is no scaled scalar format, or finds its range by 'kl'"
    if needs_state(quantizer):
        return f"{quantizer} has a state"
    if (fmt.kind == "int" and fmt.step != 1) or (fmt.kind == "float" and not (fmt.signed and fmt.has_zero)):
        return f"{fmt.name} shares its structure with no other format"
    for treatment in treatments(policy):
        if treatment.gradient is not None or treatment.backward in ("original", "requantized"):
            return "products quantize their operands again (gradient= or backward=)"
        if treatment.execution == "native":
            return "execution=native"
    if _multiplied_as_codes(policy, setting, quantizer) and code_dtype(quantizer) != np.int8:
        return f"codes of {quantizer} are multiplied in a type of their own"
    return ""


def treatments(policy: Policy) -> Iterator[Treatment]:
    """Yields what happens where no rule matches, and where each rule matches alone."""
    yield policy.at()
    for rule in policy.rules:
        yield dataclasses.replace(policy, rules=(dataclasses.replace(rule, pattern="**"),)).at("any")


def _multiplied_as_codes(policy: Policy, setting: str, quantizer: Quantizer) -> bool:
    """Returns whether there can be a site at which the codes of a quantizer are multiplied in place of its values."""
    others = {"weight": "activation", "activation": "weight", "attention": "attention"}
    if setting not in others:
        return False
    every = list(treatments(policy))
    native = any(t.execution == "auto" and t.compute.name in NATIVE and t.accum.is_native for t in every)
    met = {getattr(t, others[setting]) for t in every} if setting != "attention" else {quantizer}
    return native and any(have_codes(quantizer, other) for other in met)


def _structure(quantizer: Quantizer) -> Quantizer:
    """Returns a quantizer with its numbers at fixed values."""
    name = "float8_e4m3fn"
    if quantizer.format.kind == "int":
        name = "int8" if quantizer.format.signed else "uint7" if code_dtype(quantizer) is not None else "uint8"
    strength = STRENGTHS.get(quantizer.estimator)
    return dataclasses.replace(quantizer, format=formats.format(name), clip=1.0, strength=strength)

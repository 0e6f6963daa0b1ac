"""Policy strings: every jmp string, presets, more keys, and rules.

float32                                                    one format for params, compute and output
bfloat16_mixed                                             a preset
w8a8,attention=int8@token                                  a preset and what differs from it
p=f32,c=bf16,o=f32                                         jmp's short keys
params=float32,compute=bfloat16,output=float32
weight=int4@group32,affine,mse,activation=int8@token       options of a quantizer follow it
c=bf16;**/head/**:compute=float32                          with a rule after each semicolon
"""

import dataclasses
import difflib
from typing import Any

from precision_lab import formats
from precision_lab.policy.policy import Policy
from precision_lab.policy.presets import PRESETS, preset
from precision_lab.policy.treatment import FLOAT32, JMP_FORMATS, QUANTIZERS, SETTINGS, default_accum, read_format
from precision_lab.quant.options import STRENGTHS

QUANTIZER_OPTIONS = ("clip", "scale", *STRENGTHS)  # what a quantizer writes with an equals sign of its own
SHORT = {"p": "params", "c": "compute", "o": "output"}
RULE_KEYS = tuple(SETTINGS)
KEYS = ("params", "compute", "output", *(key for key in SETTINGS if key != "compute"), "ops")


def parse_policy(spec: Any) -> Policy:
    """Returns the policy that `spec` describes; see `Policy.parse`."""
    if isinstance(spec, Policy):
        return spec
    if all(hasattr(spec, f"{role}_dtype") for role in ("param", "compute", "output")):  # jmp.Policy
        return _of_roles(*(formats.format(getattr(spec, f"{role}_dtype")) for role in ("param", "compute", "output")))
    if not isinstance(spec, str):
        fmt = formats.format(spec)
        return _of_roles(fmt, fmt, fmt)
    base, *rules = (part.strip() for part in spec.split(";"))
    policy = _parse_base(base, spec)
    for rule in rules:
        if rule:
            policy = _with_parsed_rule(policy, rule, spec)
    return policy


def _parse_base(base: str, spec: str) -> Policy:
    """Parses what stands before the first semicolon."""
    first, _, rest = base.partition(",")
    if "=" in first:
        return _of_settings(_parse_settings(base, KEYS, spec))
    if first.lower() in PRESETS:
        policy = preset(first)
        return _replaced(policy, _parse_settings(rest, KEYS, spec)) if rest.strip() else policy
    if rest.strip():
        raise ValueError(f"policy '{spec}': only a preset may stand before a comma; '{first}' is none. {_presets()}")
    fmt = _format(first, spec)
    return _of_roles(fmt, fmt, fmt)


def _of_settings(given: dict[str, Any]) -> Policy:
    """Builds a policy from its settings, filling in what is not given as jmp does."""
    params = given.pop("params", FLOAT32)
    compute = given.pop("compute", params)
    # As in jmp, outputs follow compute; but nobody who asks for 8-bit products wants 8-bit outputs without a scale.
    output = given.pop("output", compute if compute.name in JMP_FORMATS else params)
    return _of_roles(params, compute, output, **given)


def _of_roles(params: Any, compute: Any, output: Any, **settings: Any) -> Policy:
    """Builds a policy with the accumulator that `compute` implies unless one is given."""
    accum = settings.pop("accum", None) or default_accum(compute)
    return Policy(params=params, compute=compute, output=output, accum=accum, **settings)


def _replaced(policy: Policy, given: dict[str, Any]) -> Policy:
    """Returns a preset with some settings replaced; the accumulator follows `compute` unless given."""
    if "compute" in given and policy.accum == default_accum(policy.compute):
        given.setdefault("accum", default_accum(given["compute"]))
    return dataclasses.replace(policy, **given)


def _with_parsed_rule(policy: Policy, rule: str, spec: str) -> Policy:
    """Adds a rule written as `pattern:key=value,...`; the pattern itself may hold colons."""
    before, equals, _ = rule.partition("=")
    pattern, colon, _ = before.rpartition(":")
    if not equals or not colon:
        raise ValueError(f"policy '{spec}': rule '{rule}' is not of the form 'pattern:compute=format'.")
    return policy.with_rule(pattern.strip(), **_parse_settings(rule[len(pattern) + 1 :], RULE_KEYS, spec))


def _parse_settings(text: str, keys: tuple[str, ...], spec: str) -> dict[str, Any]:
    """Parses `key=value,key=value`; spaces, upper case and a trailing comma are fine, a repeated key is not."""
    settings: dict[str, Any] = {}
    for part in _pieces(text.rstrip(", ")):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not value:
            raise ValueError(f"policy '{spec}': expected 'key=value', got '{part.strip()}'.")
        role = SHORT.get(key.lower(), key.lower())
        if role not in keys:
            head, colon, rest = key.partition(":")
            rule = f"a rule follows a policy, such as 'float32;{head}:{rest}=...'." if colon else _nearest(key, keys)
            raise ValueError(f"policy '{spec}': unknown key '{key}'; {rule}")
        if role in settings:
            raise ValueError(f"policy '{spec}': '{role}' is given twice.")
        settings[role] = _read(role, value, spec)
    return settings


def _pieces(text: str) -> list[str]:
    """Splits at the commas before a key; a word without `=` is an option of the quantizer before it."""
    pieces: list[str] = []
    for part in text.split(","):
        in_quantizer = pieces and pieces[-1].partition("=")[0].strip().lower() in QUANTIZERS
        option = part.partition("=")[0].strip().lower() in QUANTIZER_OPTIONS
        if in_quantizer and part.strip() and ("=" not in part or option):
            pieces[-1] += "," + part.strip()
        else:
            pieces.append(part)
    return pieces


def _read(key: str, value: str, spec: str) -> Any:
    """Reads the value of one setting."""
    if key == "ops":
        return value.lower()
    try:
        return SETTINGS[key].read(value) if key in SETTINGS else read_format(value)
    except ValueError as error:
        raise ValueError(f"policy '{spec}': {error}") from None


def _format(name: str, spec: str) -> Any:
    """Reads a policy that is one format's name, or says what else it may have meant."""
    try:
        return read_format(name)
    except ValueError as error:
        close = difflib.get_close_matches(name.lower(), PRESETS, n=1, cutoff=0.8)
        if close:
            raise ValueError(f"policy '{spec}': no format or preset '{name}'; did you mean '{close[0]}'?") from None
        raise ValueError(f"policy '{spec}': {error} {_presets()}") from None


def _presets() -> str:
    return f"Presets: {', '.join(PRESETS)}."


def _nearest(word: str, words: Any) -> str:
    """Says what was probably meant, or what there is."""
    close = difflib.get_close_matches(word.lower(), words, n=1)
    return f"did you mean '{close[0]}'?" if close else f"the keys are {', '.join(words)}."

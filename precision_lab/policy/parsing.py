"""Policy strings: every jmp string, presets, more keys, and rules.

float32                                                    one format for params, compute and output
bfloat16_mixed                                             a preset
p=f32,c=bf16,o=f32                                         jmp's short keys
params=float32,compute=bfloat16,output=float32
c=bf16;**/head/**:compute=float32                          with a rule after each semicolon
"""

import difflib
from typing import Any

from precision_lab import formats
from precision_lab.formats import Format
from precision_lab.policy.policy import FLOAT32, Policy, default_accum
from precision_lab.policy.presets import PRESETS, preset

KEYS = {"p": "params", "params": "params", "c": "compute", "compute": "compute", "o": "output", "output": "output"}
KEYS |= {"accum": "accum"}
JMP_FORMATS = frozenset(("float16", "bfloat16", "float32", "float64"))
RULE_KEYS = {"c": "compute", "compute": "compute", "accum": "accum"}


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
    if "=" in base:
        given = _parse_settings(base, KEYS, spec)
        params = given.get("params", FLOAT32)
        compute = given.get("compute", params)
        # As in jmp, outputs follow compute; but nobody who asks for 8-bit products wants 8-bit outputs without a scale.
        follows = compute if compute.name in JMP_FORMATS else params
        return _of_roles(params, compute, given.get("output", follows), given.get("accum"))
    if base.lower() in PRESETS:
        return preset(base)
    fmt = _format(base, spec, also=PRESETS)
    return _of_roles(fmt, fmt, fmt)


def _of_roles(params: Format, compute: Format, output: Format, accum: Format | None = None) -> Policy:
    """Builds a policy with the accumulator that `compute` implies unless one is given."""
    return Policy(params=params, compute=compute, output=output, accum=accum or default_accum(compute))


def _with_parsed_rule(policy: Policy, rule: str, spec: str) -> Policy:
    """Adds a rule written as `pattern:key=format,...`; the pattern itself may hold colons."""
    before, equals, _ = rule.partition("=")
    pattern, colon, _ = before.rpartition(":")
    if not equals or not colon:
        raise ValueError(f"policy '{spec}': rule '{rule}' is not of the form 'pattern:compute=format'.")
    return policy.with_rule(pattern.strip(), **_parse_settings(rule[len(pattern) + 1 :], RULE_KEYS, spec))


def _parse_settings(text: str, keys: dict[str, str], spec: str) -> dict[str, Format]:
    """Parses `key=format,key=format`; spaces, upper case and a trailing comma are fine, a repeated key is not."""
    settings: dict[str, Format] = {}
    for part in text.rstrip(", ").split(","):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not value:
            raise ValueError(f"policy '{spec}': expected 'key=format', got '{part.strip()}'.")
        if key.lower() not in keys:
            raise ValueError(f"policy '{spec}': unknown key '{key}'; {_nearest(key, keys.values())}")
        role = keys[key.lower()]
        if role in settings:
            raise ValueError(f"policy '{spec}': '{role}' is given twice.")
        settings[role] = _format(value, spec)
    return settings


def _format(name: str, spec: str, also: Any = ()) -> Format:
    """Reads one format name, `half` and `full` as in jmp."""
    name = {"half": "float16", "full": "float32"}.get(name.lower(), name)
    try:
        return formats.format(name)
    except ValueError as error:
        close = difflib.get_close_matches(name.lower(), also, n=1, cutoff=0.8)
        if close:
            raise ValueError(f"policy '{spec}': no format or preset '{name}'; did you mean '{close[0]}'?") from None
        hint = f" Presets: {', '.join(also)}." if also else ""
        raise ValueError(f"policy '{spec}': {error}{hint}") from None


def _nearest(word: str, words: Any) -> str:
    """Says what was probably meant, or what there is."""
    words = list(dict.fromkeys(words))
    close = difflib.get_close_matches(word.lower(), words, n=1)
    return f"did you mean '{close[0]}'?" if close else f"the keys are {', '.join(words)}."

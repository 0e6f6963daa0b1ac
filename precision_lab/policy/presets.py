"""Policies with names, and where each comes from."""

import dataclasses
import difflib
from collections.abc import Mapping
from types import MappingProxyType

from precision_lab import formats
from precision_lab.policy.policy import Policy

_f32, _f16, _bf16 = (formats.format(name) for name in ("float32", "float16", "bfloat16"))


@dataclasses.dataclass(frozen=True)
class Preset:
    """A policy, what it is for, and its source."""

    policy: Policy
    summary: str
    source: str


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "float32": Preset(Policy(), "single precision throughout; changes nothing in a float32 model", "IEEE 754-2019"),
        "bfloat16_mixed": Preset(
            Policy(params=_f32, compute=_bf16, output=_f32),
            "float32 parameters, bfloat16 products with float32 accumulation; needs no loss scaling",
            "Kalamkar et al. 2019, arXiv:1905.12322",
        ),
        "float16_mixed": Preset(
            Policy(params=_f32, compute=_f16, output=_f32),
            "float32 parameters as the master copy, float16 products; use it with loss scaling",
            "Micikevicius et al. 2018, arXiv:1710.03740",
        ),
        "bfloat16_pure": Preset(
            Policy(params=_bf16, compute=_bf16, output=_bf16),
            "parameters, products and outputs in bfloat16; no master copy",
            "Zamirai et al. 2020, arXiv:2010.06192",
        ),
        "float16_pure": Preset(
            Policy(params=_f16, compute=_f16, output=_f16),
            "parameters, products and outputs in float16; no master copy",
            "the ablation of Micikevicius et al. 2018, arXiv:1710.03740, section 3.1",
        ),
    }
)


def preset(name: str) -> Policy:
    """Returns the preset called `name`.

    Raises:
      ValueError: there is none; names the nearest.
    """
    if name.lower() not in PRESETS:
        close = difflib.get_close_matches(name.lower(), PRESETS, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"there are {', '.join(PRESETS)}."
        raise ValueError(f"unknown policy preset '{name}'; {hint}")
    return PRESETS[name.lower()].policy

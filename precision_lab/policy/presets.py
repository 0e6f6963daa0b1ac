"""Policies with names, and where each comes from."""

import dataclasses
import difflib
from collections.abc import Mapping
from types import MappingProxyType

from precision_lab import formats
from precision_lab.policy.policy import Policy
from precision_lab.policy.treatment import SETTINGS

_f32, _f16, _bf16 = (formats.format(name) for name in ("float32", "float16", "bfloat16"))


@dataclasses.dataclass(frozen=True)
class Preset:
    """A policy, what it is for, and its source."""

    policy: Policy
    summary: str
    source: str


def _quantized(**settings: str) -> Policy:
    """Returns a policy of float32 parameters whose products are quantized, and in bfloat16 where they are not."""
    return Policy(compute=_bf16, **{key: SETTINGS[key].read(value) for key, value in settings.items()})


def _float32(**settings: str) -> Policy:
    """Returns a policy whose products are quantized as said, and in float32 where they are not."""
    return Policy(**{key: SETTINGS[key].read(value) for key, value in settings.items()})


PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "float32": Preset(Policy(), "single precision throughout; changes nothing in a float32 model", "IEEE 754-2019"),
        "bfloat16_mixed": Preset(
            Policy(params=_f32, compute=_bf16, output=_f32),
            "float32 parameters, bfloat16 products with float32 accumulation; needs no loss scaling",
            "Kalamkar et al. 2019, arXiv:1905.12322",
        ),
        "bfloat16_autocast": Preset(
            Policy(params=_f32, compute=_bf16, output=_f32, ops="autocast"),
            "as bfloat16_mixed, and activations between products stay in bfloat16 where the op table lets them",
            "torch.amp; Kalamkar et al. 2019, arXiv:1905.12322",
        ),
        "float16_autocast": Preset(
            Policy(params=_f32, compute=_f16, output=_f32, ops="autocast"),
            "as float16_mixed, and activations between products stay in float16 where the op table lets them",
            "torch.amp; Micikevicius et al. 2018, arXiv:1710.03740",
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
        "tf32": Preset(
            Policy(compute=formats.format("tf32")),
            "float32 parameters, products of TF32 operands, simulated on any device",
            "NVIDIA A100 white paper, 2020, section 'TF32'",
        ),
        "float16_pure": Preset(
            Policy(params=_f16, compute=_f16, output=_f16),
            "parameters, products and outputs in float16; no master copy",
            "the ablation of Micikevicius et al. 2018, arXiv:1710.03740, section 3.1",
        ),
        "float8_hybrid": Preset(
            _quantized(weight="float8_e4m3fn@tensor", activation="float8_e4m3fn@tensor", gradient="float8_e5m2@tensor"),
            "products of E4M3 operands forward and E5M2 gradients backward, one scale per tensor from its present amax",
            "Micikevicius et al. 2022, arXiv:2209.05433; the HYBRID recipe of TransformerEngine",
        ),
        "int8_training": Preset(
            _quantized(weight="int8@channel", activation="int8@token", gradient="int8@token,stochastic"),
            "all three products in int8, operands quantized along what they contract, gradients stochastically",
            "Banner et al. 2018, arXiv:1805.11046, without their bfloat16 weight gradient, which is `switchback`",
        ),
        "switchback": Preset(
            _quantized(weight="int8@tensor", activation="int8@token", gradient="int8@token", wgrad="bfloat16"),
            "int8 forward and input gradient, the weight gradient in bfloat16",
            "Wortsman et al. 2023, arXiv:2304.13013, algorithm 1",
        ),
        "w8a8": Preset(
            _quantized(weight="int8@channel", activation="int8@token"),
            "int8 weights and activations in the forward product, straight-through gradients in bfloat16",
            "Krishnamoorthi 2018, arXiv:1806.08342; scales by token as in Yao et al. 2022, arXiv:2206.01861",
        ),
        "w4a8": Preset(
            _quantized(weight="int4@channel", activation="int8@token"),
            "int4 weights with a scale for each output channel, int8 activations",
            "Krishnamoorthi 2018, arXiv:1806.08342; Yao et al. 2022, arXiv:2206.01861",
        ),
        "w4a16": Preset(
            _quantized(weight="int4@group32"),
            "int4 weights in groups of 32, other operands in bfloat16",
            "the weight-only setting of Frantar et al. 2022, arXiv:2210.17323",
        ),
        "nf4": Preset(
            _quantized(weight="nf4@group64"),
            "NF4 weights in blocks of 64, other operands in bfloat16",
            "Dettmers et al. 2023, arXiv:2305.14314, section 3",
        ),
        "mxfp8": Preset(
            _quantized(weight="mxfp8", activation="mxfp8", gradient="mxfp8"),
            "all three products in MXFP8, blocks of 32 along what they contract",
            "OCP Microscaling Formats v1.0, 2023; Mishra et al. 2025, arXiv:2506.08027",
        ),
        "mxfp4": Preset(
            _quantized(weight="mxfp4", activation="mxfp4"),
            "MXFP4 weights and activations in the forward product, straight-through gradients in bfloat16",
            "Rouhani et al. 2023, arXiv:2310.10537",
        ),
        "nvfp4": Preset(
            _quantized(weight="nvfp4", activation="nvfp4"),
            "NVFP4 weights and activations in the forward product, straight-through gradients in bfloat16",
            "NVIDIA, 'Pretraining Large Language Models with NVFP4', 2025, arXiv:2509.25149",
        ),
        "binary_connect": Preset(
            _float32(weight="binary,unscaled"),
            "weights are their signs, without a scale; clip the real ones to [-1, 1] by `weight_clipping`",
            "Courbariaux et al. 2015, arXiv:1511.00363, equation 1; drawn by 'weight=binary,unscaled,stochastic'",
        ),
        "binary_net": Preset(
            _float32(weight="binary,unscaled", activation="binary,unscaled,hard_tanh"),
            "weights and activations are their signs; gradients of activations stop beyond 1; clip weights as above",
            "Courbariaux et al. 2016, arXiv:1602.02830, equations 1 and 4",
        ),
        "bwn": Preset(
            _float32(weight="binary@channel,xnor"),
            "signs of weights times the mean magnitude of each output channel",
            "Rastegari et al. 2016, arXiv:1603.05279, section 3.1, algorithm 1",
        ),
        "xnor": Preset(
            _float32(weight="binary@channel,xnor", activation="binary@token,hard_tanh"),
            "as bwn, and signs of activations times their mean magnitude: of a row, or in convolutions of an image",
            "Rastegari et al. 2016, arXiv:1603.05279, section 3.2; for one mean a window see `LowBitConvolution`",
        ),
        "twn": Preset(
            _float32(weight="ternary,twn"),
            "ternary weights: those above 0.7 of the mean magnitude, as the mean of these; other operands in float32",
            "Li and Liu 2016, arXiv:1605.04711, equations 3 to 6; say ternary@channel,twn for one scale a filter",
        ),
        "bitnet": Preset(
            _quantized(weight="binary,centred", activation="int8@token"),
            "signs of weights less their mean, scaled by their mean magnitude; int8 activations",
            "Wang et al. 2023, arXiv:2310.11453, equations 1 to 3; activations by token, as at inference there",
        ),
        "bitnet_b158": Preset(
            _quantized(weight="ternary@tensor", activation="int8@token"),
            "ternary weights scaled by their mean magnitude, int8 activations",
            "Ma et al. 2024, arXiv:2402.17764, section 2",
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

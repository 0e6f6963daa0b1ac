"""Quantization of one array at a time: what a quantizer is, scales, fake and real quantization, gradients, observers.

Quantizers are data and need no JAX; what works on arrays is loaded when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from precision_lab.quant.granularity import Granularity, granularity
from precision_lab.quant.options import CALIBRATIONS, ESTIMATORS, SCHEMES
from precision_lab.quant.parsing import quantizer
from precision_lab.quant.quantizer import Quantizer

if TYPE_CHECKING:
    from precision_lab.quant.dorefa import dorefa_gradient
    from precision_lab.quant.fake import fake_quantize
    from precision_lab.quant.fitting import binary_terms, fit_codebook
    from precision_lab.quant.numbers import QuantizerParams, quantizer_params, stack_quantizers
    from precision_lab.quant.observers import Observer, ObserverState, observer
    from precision_lab.quant.qtensor import QTensor, quantize
    from precision_lab.quant.state import (
        QuantizerState,
        init_state,
        known_scales,
        may_be_static,
        needs_state,
        quantize_with_state,
    )

# The modules that import JAX, and what they export here.
_LAZY = {
    "dorefa": ("dorefa_gradient",),
    "fake": ("fake_quantize",),
    "fitting": ("binary_terms", "fit_codebook"),
    "numbers": ("QuantizerParams", "quantizer_params", "stack_quantizers"),
    "observers": ("Observer", "ObserverState", "observer"),
    "qtensor": ("QTensor", "quantize"),
    "state": ("QuantizerState", "init_state", "known_scales", "may_be_static", "needs_state", "quantize_with_state"),
}
_HOME = {name: module for module, names in _LAZY.items() for name in names}

__all__ = [
    "CALIBRATIONS",
    "ESTIMATORS",
    "SCHEMES",
    "Granularity",
    "Observer",
    "ObserverState",
    "QTensor",
    "Quantizer",
    "QuantizerParams",
    "QuantizerState",
    "binary_terms",
    "dorefa_gradient",
    "fake_quantize",
    "fit_codebook",
    "granularity",
    "init_state",
    "known_scales",
    "may_be_static",
    "needs_state",
    "observer",
    "quantize",
    "quantize_with_state",
    "quantizer",
    "quantizer_params",
    "stack_quantizers",
]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

"""precision_lab: the laboratory bench for numerical precision in JAX/Flax.

Say which number format every tensor of a training step has, and see what happens. The names below are the everyday
ones; each is loaded when first used, so `import precision_lab` costs nothing and imports no JAX.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "formats": ("FORMATS", "Format", "format", "round_to", "stack_formats"),
    "quant": ("QTensor", "Quantizer", "fake_quantize", "quantize", "quantizer"),
    "policy": ("PRESETS", "Policy"),
    "ptq.allocation": ("allocate",),
    "ptq.sensitivity": ("sensitivity",),
    "rewrite": ("full_precision", "mark"),
    "nn": ("QAT", "DelayedScaling", "apply_policy", "calibrate", "convert", "explain", "prepare_qat", "sites"),
    "optim": (
        "DynamicLossScale",
        "StaticLossScale",
        "commit",
        "current_loss_scale",
        "first_nonfinite",
        "kahan",
        "loss_scaling",
        "master_weights",
        "no_usable_scale",
        "scale_loss",
        "step_was_applied",
        "stochastic_rounding",
        "value_and_scaled_grad",
    ),
    "telemetry": ("compare", "doctor", "observe", "observed", "tensor_stats", "tree_stats"),
    "models": ("register_model",),
    "data": ("register_data",),
    "runner": ("load", "run"),
}
_MODULE_OF = {name: module for module, names in _HOME.items() for name in names}

__all__ = sorted(_MODULE_OF)

if TYPE_CHECKING:
    from precision_lab.data import register_data as register_data
    from precision_lab.formats import FORMATS as FORMATS
    from precision_lab.formats import Format as Format
    from precision_lab.formats import format as format
    from precision_lab.formats import round_to as round_to
    from precision_lab.formats import stack_formats as stack_formats
    from precision_lab.models import register_model as register_model
    from precision_lab.nn import QAT as QAT
    from precision_lab.nn import DelayedScaling as DelayedScaling
    from precision_lab.nn import apply_policy as apply_policy
    from precision_lab.nn import calibrate as calibrate
    from precision_lab.nn import convert as convert
    from precision_lab.nn import explain as explain
    from precision_lab.nn import prepare_qat as prepare_qat
    from precision_lab.nn import sites as sites
    from precision_lab.optim import DynamicLossScale as DynamicLossScale
    from precision_lab.optim import StaticLossScale as StaticLossScale
    from precision_lab.optim import commit as commit
    from precision_lab.optim import current_loss_scale as current_loss_scale
    from precision_lab.optim import first_nonfinite as first_nonfinite
    from precision_lab.optim import kahan as kahan
    from precision_lab.optim import loss_scaling as loss_scaling
    from precision_lab.optim import master_weights as master_weights
    from precision_lab.optim import no_usable_scale as no_usable_scale
    from precision_lab.optim import scale_loss as scale_loss
    from precision_lab.optim import step_was_applied as step_was_applied
    from precision_lab.optim import stochastic_rounding as stochastic_rounding
    from precision_lab.optim import value_and_scaled_grad as value_and_scaled_grad
    from precision_lab.policy import PRESETS as PRESETS
    from precision_lab.policy import Policy as Policy
    from precision_lab.ptq.allocation import allocate as allocate
    from precision_lab.ptq.sensitivity import sensitivity as sensitivity
    from precision_lab.quant import QTensor as QTensor
    from precision_lab.quant import Quantizer as Quantizer
    from precision_lab.quant import fake_quantize as fake_quantize
    from precision_lab.quant import quantize as quantize
    from precision_lab.quant import quantizer as quantizer
    from precision_lab.rewrite import full_precision as full_precision
    from precision_lab.rewrite import mark as mark
    from precision_lab.runner import load as load
    from precision_lab.runner import run as run
    from precision_lab.telemetry import compare as compare
    from precision_lab.telemetry import doctor as doctor
    from precision_lab.telemetry import observe as observe
    from precision_lab.telemetry import observed as observed
    from precision_lab.telemetry import tensor_stats as tensor_stats
    from precision_lab.telemetry import tree_stats as tree_stats


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'precision_lab' has no attribute '{name}'")
    return getattr(importlib.import_module(f"precision_lab.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

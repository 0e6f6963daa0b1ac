"""Flax-facing: models under a policy, quantizers as modules, batch norms folded into the layers before them."""

from precision_lab.nn.apply import apply_policy, explain, sites
from precision_lab.nn.batch_norm import batch_norm_pairs, fold_batch_norm, fold_batch_norms
from precision_lab.nn.calibration import Calibrated, calibrate
from precision_lab.nn.conversion import convert
from precision_lab.nn.delayed import DelayedScaling
from precision_lab.nn.ends import keep_ends
from precision_lab.nn.fake_quant import FakeQuant, LinenFakeQuant, QuantParam, QuantStat
from precision_lab.nn.folded import BatchNormNumbers, FoldedBatchNorm, folded_fake_quantize
from precision_lab.nn.folded_linen import LinenFoldedBatchNorm
from precision_lab.nn.lora import add_lora, merge_lora
from precision_lab.nn.prepare import prepare_qat
from precision_lab.nn.qat import QAT
from precision_lab.nn.storage import storage

__all__ = [
    "QAT",
    "BatchNormNumbers",
    "Calibrated",
    "DelayedScaling",
    "FakeQuant",
    "FoldedBatchNorm",
    "LinenFakeQuant",
    "LinenFoldedBatchNorm",
    "QuantParam",
    "QuantStat",
    "add_lora",
    "apply_policy",
    "batch_norm_pairs",
    "calibrate",
    "convert",
    "explain",
    "fold_batch_norm",
    "fold_batch_norms",
    "folded_fake_quantize",
    "keep_ends",
    "merge_lora",
    "prepare_qat",
    "sites",
    "storage",
]

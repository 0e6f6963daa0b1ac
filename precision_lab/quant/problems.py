"""What makes the options of a quantizer contradict its format or each other."""

from __future__ import annotations

from typing import Any

import numpy as np

from precision_lab import formats
from precision_lab.quant.options import (
    DOUBLE,
    OWN_THRESHOLDS,
    STRENGTHS,
    default_calibration,
    is_integer,
    is_integer_grid,
)

_INTEGER_SCHEMES = ("full", "full_clipped", "affine", "signed_max")
_INTEGER_CALIBRATIONS = ("kl", "aciq", "aciq_normal")
_INTEGER_ESTIMATORS = ("tanh", "lsq", "lsq+", "pact", "dorefa")


def check(qz: Any) -> None:
    """Refuses a quantizer whose options cannot be honoured."""
    for problem in (_format, _scheme, _calibration, _estimator, _scale_format, _reciprocal):
        said = problem(qz)
        if said:
            raise ValueError(f"quantizer of {qz.format.name!r} is not possible: {said}.")


def _format(qz: Any) -> str | None:
    fmt = qz.format
    if fmt.kind == "float" and not fmt.has_zero:
        return "the format has no zero, which a quantized array needs; it is for scales"
    if fmt.kind == "float" and fmt.name == "float64":
        return "scales and products are float32; leave the array as it is"
    if fmt.kind == "codebook" and max(fmt.levels) <= 0:
        return "a codebook needs a positive level"
    return None


def _scheme(qz: Any) -> str | None:
    fmt, scheme = qz.format, qz.scheme
    if fmt.kind == "block":
        if scheme != "unscaled" or qz.granularity.kind != "tensor":
            return "block formats have scales of their own; leave out granularity and scheme, or say 'mxfp4@16'"
        return None
    if scheme in _INTEGER_SCHEMES and not is_integer_grid(fmt):
        return f"scheme {scheme!r} is for integers"
    if scheme in ("full", "full_clipped", "signed_max") and not fmt.signed:
        return f"scheme {scheme!r} is for signed integers; say 'symmetric' for values >= 0, or 'affine'"
    if scheme == "clamped" and not (fmt.kind == "float" and fmt.has_nan):
        return f"scheme 'clamped' is for floats with infinities or NaN; {fmt.name} saturates as it is"
    if not qz.is_scaled and qz.granularity.kind != "tensor":
        return f"there are no scales for granularity {qz.granularity} under scheme {scheme!r}; say 'symmetric'"
    return None


def _calibration(qz: Any) -> str | None:
    fmt, calibration = qz.format, qz.calibration
    if (calibration == "percentile") != (qz.percentile is not None):
        return "calibration 'percentile' and a percentile go together, as in 'percentile99.9'"
    if qz.percentile is not None and not 0 < qz.percentile <= 100:
        return f"the percentile must be in (0, 100], got {qz.percentile}"
    if not 0 < qz.clip <= 1:
        return f"clip must be in (0, 1], got {qz.clip}"
    if not qz.is_scaled and (qz.clip != 1 or calibration != default_calibration(fmt)):
        return "without scales of ours there is nothing to calibrate; leave out calibration and clip"
    if calibration in _INTEGER_CALIBRATIONS and not is_integer(fmt):
        return f"calibration {calibration!r} counts integer levels; say 'mse'"
    if calibration in OWN_THRESHOLDS and (fmt.name != OWN_THRESHOLDS[calibration] or qz.scheme != "symmetric"):
        return f"calibration {calibration!r} is for {OWN_THRESHOLDS[calibration]!r} under scheme 'symmetric'"
    if calibration in OWN_THRESHOLDS and (qz.clip != 1 or qz.rounding != "nearest_even"):
        return f"calibration {calibration!r} has thresholds of its own; leave out clip and rounding"
    if calibration in ("absmean", "lsq") and qz.scheme in ("affine", "signed_max"):
        return f"calibration {calibration!r} gives a scale, which scheme {qz.scheme!r} has no use for; say 'symmetric'"
    return None


def _estimator(qz: Any) -> str | None:
    fmt, estimator = qz.format, qz.estimator
    if qz.strength is not None and (estimator not in STRENGTHS or not qz.strength >= 0):
        return f"estimator {estimator!r} with strength {qz.strength}; only {', '.join(STRENGTHS)} have one, at least 0"
    if estimator == "tanh" and qz.strength is not None and not 0 < qz.strength < 1:
        return f"the strength of 'tanh' is its alpha, in (0, 1), got {qz.strength}"
    if estimator in _INTEGER_ESTIMATORS and not is_integer_grid(fmt):
        return f"estimator {estimator!r} is for integers"
    if estimator in ("hard_tanh", "xnor") and fmt.name != "binary":
        return f"estimator {estimator!r} is for 'binary'"
    if estimator == "xnor" and (qz.calibration != "absmean" or not qz.is_scaled or qz.granularity.sizes):
        return "'xnor' differentiates a mean magnitude; say 'binary@channel,xnor', or 'hard_tanh'"
    if estimator not in ("ste", "zero", "hard_tanh") and not qz.is_scaled:
        return f"estimator {estimator!r} needs a scale; say 'ste' or 'zero'"
    if estimator == "lsq+" and qz.scheme not in ("symmetric", "full"):
        return "'lsq+' learns an offset instead of a zero point; its scheme is 'symmetric' or 'full'"
    if estimator == "dorefa" and (fmt.signed or qz.granularity.kind != "tensor" or qz.scheme != "symmetric"):
        return "'dorefa' maps a whole array onto unsigned integers; say 'uint4,dorefa'"
    if fmt.kind == "codebook" and qz.rounding != "nearest_even":
        evenly_spaced = len(set(np.diff(fmt.grid()))) == 1
        if not evenly_spaced:
            return f"rounding {qz.rounding!r}: a codebook takes the nearest level"
        if qz.rounding != "stochastic":
            return f"rounding {qz.rounding!r}: a codebook takes the nearest level, or one at random by 'stochastic'"
    return None


def _reciprocal(qz: Any) -> str | None:
    if qz.reciprocal and (not qz.is_scaled or qz.estimator == "dorefa"):
        return "there is no scale of ours whose reciprocal could be taken; leave out 'reciprocal'"
    return None


def _scale_format(qz: Any) -> str | None:
    if qz.scale_format == "float32":
        return None
    if not qz.is_scaled:
        return f"there is no scale to be stored as {qz.scale_format}"
    if qz.scheme == "signed_max" and qz.scale_format == DOUBLE:
        return "double quantization is for scales of one sign"
    if qz.scale_format == DOUBLE:
        return None
    fmt = formats.format(qz.scale_format)
    if fmt.kind != "float" or fmt.bits > 16 or not (fmt.has_zero and fmt.has_nan):
        return f"scales are float32, a float of at most 16 bits with zero and NaN, or 'double', not {qz.scale_format}"
    return None

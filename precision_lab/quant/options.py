"""The options of a quantizer: their names, what each means, and which formats can honour them."""

from __future__ import annotations

from typing import Any

# How the range of a group becomes a scale. Real = scale * (code - zero_point); qmax is 2**(bits - 1) - 1.
SCHEMES: dict[str, str] = {
    "symmetric": "amax / largest value; integers are narrow, so that the grid is symmetric",
    "full": "integers from -2**(bits - 1) on, smallest scale that clips nothing: max(low / qmin, high / qmax)",
    "full_clipped": "the same grid, amax / (2**(bits - 1) - 1/2), which clips +amax by half a step (torchao, Qwix)",
    "affine": "integers with a zero point: (high - low) / (2**bits - 1); the range always includes zero",
    "signed_max": "the element of largest magnitude becomes the most negative code exactly (llama.cpp's Q4_0)",
    "pow2": "the smallest power of two that is at least amax / largest value",
    "unscaled": "no scale: values are rounded to the format as they are (a cast); block formats have their own scales",
    "clamped": "no scale: a cast in which what is too large, infinity too, becomes the largest value",
}

# Which range of values the grid shall cover. "minmax" is another name for "absmax".
CALIBRATIONS: dict[str, str] = {
    "absmax": "all of it: the largest magnitude, or smallest and largest value under 'affine'",
    "percentile": "the percentile of magnitudes, as in 'percentile99.9'; of both tails under 'affine'",
    "mse": "the part of it with the least mean squared error of the quantized values",
    "kl": "the part with the least Kullback-Leibler divergence between histograms, on 2048 bins; for integers",
    "aciq": "the clip with the least expected error if values are Laplace distributed; for integers",
    "aciq_normal": "the same for normally distributed values",
    "absmean": "mean magnitude is the scale itself (BitNet b1.58, XNOR-Net)",
    "twn": "magnitudes above 0.7 of their mean are kept, and the mean of these is the scale (TWN); for ternary",
    "centred": "mean magnitude is the scale, signs are those of values less their mean (BitNet); for binary",
    "lsq": "2 * mean magnitude / sqrt(largest value) is the scale, where LSQ starts",
    "ema": "a running average of ranges, kept by an observer; without one the range of the array itself",
}

# What the gradient of a quantized value is.
ESTIMATORS: dict[str, str] = {
    "ste": "straight through: that of the value itself",
    "clipped": "straight through within the range of the grid, zero outside",
    "zero": "zero",
    "tanh": "that of a tanh between neighbouring integers, zero outside the range (DSQ); strength is its alpha",
    "ewgs": "clipped, times 1 + strength * sign(cotangent) * (value - quantized value)",
    "lsq": "clipped; a scale that is given is learned",
    "lsq+": "as lsq; an offset that is given is learned too",
    "pact": "clipped; a scale that is given is learned from the clipped values alone",
    "hard_tanh": "that of scale * clip(value, -1, 1), the scale held fixed (BinaryNet); for binary",
    "xnor": "that of hard_tanh, plus 1/n through the mean magnitude of n values (XNOR-Net); for binary",
    "dorefa": "weights are 2 * q(tanh(w) / (2 max|tanh(w)|) + 1/2) - 1, with the gradient of tanh; for uintN",
}
STRENGTHS = {"tanh": 0.2, "ewgs": 1e-3}

# Calibrations whose codes do not begin halfway between levels; see `thresholds`.
OWN_THRESHOLDS = {"twn": "ternary", "centred": "binary"}

# Estimators that learn numbers, which only a state can hold.
LEARNED = ("lsq", "lsq+", "pact")

# How scales are stored besides as float32 or another float.
DOUBLE = "double"

# Multiplies by the reciprocal of a scale in place of dividing.
RECIPROCAL = "reciprocal"


def is_integer(fmt: Any) -> bool:
    """Returns whether values of `fmt` are equally spaced."""
    return fmt.kind == "int"


def is_integer_grid(fmt: Any) -> bool:
    """Returns whether values of `fmt` are the integers themselves."""
    return fmt.kind == "int" and fmt.step == 1


def default_scheme(fmt: Any) -> str:
    """Returns the scheme a format has unless told: wide floats and fixed point are cast, blocks scale themselves."""
    if fmt.kind == "block" or (fmt.kind == "int" and fmt.step != 1):
        return "unscaled"
    wide = fmt.kind == "float" and fmt.bits > 8
    return "unscaled" if wide else "symmetric"


def default_calibration(fmt: Any) -> str:
    """Returns the calibration a format has unless told: mean magnitude for one and 1.58 bits."""
    return "absmean" if fmt.kind == "codebook" and fmt.name in ("binary", "ternary") else "absmax"


def default_granularity(fmt: Any) -> str:
    """Returns the granularity a format has unless told: QLoRA's blocks of 64 for its codebooks."""
    return "group64" if fmt.kind == "codebook" and fmt.name in ("nf4", "bnb_fp4") else "tensor"

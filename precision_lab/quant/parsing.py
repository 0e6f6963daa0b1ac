"""Quantizer strings: "int4@group32,affine,mse" is a format, what shares a scale, and options in any order."""

from __future__ import annotations

import difflib
import re
from typing import Any

from precision_lab import formats
from precision_lab.formats import ROUNDINGS, BlockFormat, Codebook, Format
from precision_lab.quant.granularity import granularity
from precision_lab.quant.options import CALIBRATIONS, DOUBLE, ESTIMATORS, RECIPROCAL, SCHEMES, STRENGTHS
from precision_lab.quant.quantizer import Quantizer

_GRANULARITY = re.compile(r"@(?=(?:per_)?(?:tensor|channel|token|group|block))")
_NUMBER = r"(\d+(?:\.\d*)?(?:e[+-]?\d+)?|\.\d+)"
_PERCENTILE = re.compile(rf"(?:percentile|p){_NUMBER}")
_KEYED = re.compile(r"(scale|clip|scheme|calibration|rounding|estimator|ewgs|tanh)=(.+)")
_NAMED = {
    **dict.fromkeys(SCHEMES, "scheme"),
    **dict.fromkeys([*CALIBRATIONS, "minmax"], "calibration"),
    **dict.fromkeys(ROUNDINGS, "rounding"),
    **dict.fromkeys(ESTIMATORS, "estimator"),
}
# "lsq" names both; alone it is the estimator. "narrow" says what is the default.
_ALIASES = {"straight_through": "ste", "narrow": "symmetric", "sr": "stochastic", "power_of_two": "pow2"}


def quantizer(spec: Any) -> Quantizer:
    """Returns the quantizer that `spec` describes.

    Args:
      spec: a Quantizer; a format or dtype, for its default quantizer; or a string: a format, "@" and a granularity if
        it is not the default one, and options after commas, in any order: names of `SCHEMES`, `CALIBRATIONS`
        ("percentile99.9"), `ROUNDINGS` and `ESTIMATORS` ("ewgs=0.01"), "clip=0.9", "scale=float16", "double",
        "reciprocal".
        "int4@group32,affine,mse", "nf4,double", "float8_e4m3fn@channel", "mxfp4:rceil,stochastic". Where a name is
        both a calibration and an estimator ("lsq"), it is the estimator; "calibration=lsq" is the other.

    Raises:
      ValueError: an unknown format, granularity or option (the nearest is named), or options that contradict
        each other.
      TypeError: `spec` is none of these.
    """
    if isinstance(spec, Quantizer):
        return spec
    if isinstance(spec, (Format, Codebook, BlockFormat)) or not isinstance(spec, str):
        return Quantizer(spec)
    head, *rest = _GRANULARITY.split(spec.strip().lower(), maxsplit=1)
    if rest:
        shared, *options = _split(rest[0])
        return Quantizer(head.strip(), shared, **_options(options, spec))
    fmt, options = _longest_format(_split(head), spec)
    return Quantizer(fmt, **_options(options, spec))


def _split(text: str) -> list[str]:
    """Returns the parts between commas, but for commas within parentheses."""
    return [part.strip() for part in re.split(r",(?![^(]*\))", text)]


def _longest_format(parts: list[str], spec: str) -> tuple[Any, list[str]]:
    """Returns the format that the first parts name, and the other parts; a format's own options hold commas too."""
    for count in range(len(parts), 1, -1):
        try:
            return formats.format(",".join(parts[:count])), parts[count:]
        except ValueError:
            continue
    try:
        return formats.format(parts[0]), parts[1:]
    except ValueError:
        _check_shared(parts[0], spec)
        raise


def _check_shared(head: str, spec: str) -> None:
    """Refuses what stands after an "@" and is neither a granularity nor the block size of a block format."""
    name, at, shared = head.partition("@")
    if not at:
        return
    if (fmt := formats.format(name.strip())).kind == "block":
        raise ValueError(f"quantizer {spec!r}: after '{fmt.name}@' goes a block size, as in 'mxfp4@16'.")
    try:
        granularity(shared)
    except ValueError as error:
        raise ValueError(f"quantizer {spec!r}: {error}") from None


def _options(parts: list[str], spec: str) -> dict[str, Any]:
    """Returns the fields of a quantizer that options give."""
    fields: dict[str, Any] = {}
    for part in parts:
        for field, value in _option(_ALIASES.get(part, part), spec):
            if field in fields:
                raise ValueError(f"quantizer {spec!r}: {field} is given twice, {fields[field]!r} and {value!r}.")
            fields[field] = value
    return fields


def _option(part: str, spec: str) -> list[tuple[str, Any]]:
    """Returns the fields that one option gives."""
    if part == DOUBLE:
        return [("scale_format", DOUBLE)]
    if part == RECIPROCAL:
        return [(RECIPROCAL, True)]
    if part in _NAMED:
        return [(_NAMED[part], part)]
    if match := _PERCENTILE.fullmatch(part):
        return [("calibration", "percentile"), ("percentile", float(match[1]))]
    if match := _KEYED.fullmatch(part):
        key, value = match.groups()
        if key in ("clip", *STRENGTHS):
            if not re.fullmatch(_NUMBER, value):
                raise ValueError(f"quantizer {spec!r}: {key}= needs a number, got {value!r}.")
            return [("clip", float(value))] if key == "clip" else [("estimator", key), ("strength", float(value))]
        if match := _PERCENTILE.fullmatch(value):
            return _option(value, spec)
        return [("scale_format" if key == "scale" else key, value)]
    known = [*_NAMED, DOUBLE, RECIPROCAL, "percentile99.9", "clip=0.9", "scale=float16"]
    near = difflib.get_close_matches(part, known, n=3, cutoff=0.5) or known
    raise ValueError(f"quantizer {spec!r}: unknown option {part!r}. Nearest: {', '.join(dict.fromkeys(near))}.")

"""The catalogue: which formats there are, where each is defined, and how a user may name one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import ml_dtypes
import numpy as np

from precision_lab.formats.scalar import INTEGERS, SPECIALS, Format, Specials

_IEEE = "IEEE 754-2019, table 3.5"
_TF32 = "NVIDIA A100 Tensor Core GPU Architecture, 2020 (8 exponent and 10 mantissa bits, kept in 32-bit registers)"
_BF16 = 'Kalamkar et al., "A Study of BFLOAT16 for Deep Learning Training", 2019, arXiv:1905.12322'
_OFP8 = 'Micikevicius et al., "FP8 Formats for Deep Learning", 2022, arXiv:2209.05433; OCP OFP8 specification 1.0'
_APFLOAT = "LLVM APFloat and ml_dtypes (IEEE 754 conventions in 8 bits)"
_FNUZ = 'Noune et al., "8-bit Numerical Formats for Deep Neural Networks", 2022, arXiv:2206.02915'
_B11 = 'LLVM APFloat, after Sun et al., "Hybrid 8-bit Floating Point Training and Inference", NeurIPS 2019'
_P3109 = "IEEE P3109 working group, interim report on binary floating-point formats for machine learning"
_MX = "OCP Microscaling Formats (MX) specification 1.0, 2023, section 5.3; arXiv:2310.10537"
_E8M0 = "OCP Microscaling Formats (MX) specification 1.0, 2023, section 5.4.1 (the scale format)"
_FIXED = 'Gupta et al., "Deep Learning with Limited Numerical Precision", 2015, arXiv:1502.02551, section 3'
_UINT = 'Jacob et al., "Quantization and Training of Neural Networks", 2018, arXiv:1712.05877, section 2.1'
_INT = 'Wu et al., "Integer Quantization for Deep Learning Inference", 2020, arXiv:2004.09602, section 3.1'
_GENERIC = "generic: sign, exponent and mantissa widths as the name says"


def _float(name: str, e: int, m: int, specials: Specials, source: str, *, bias: int | None = None) -> Format:
    """Returns a float format stored in the dtype of the same name, if there is one."""
    bias = _default_bias(e, specials) if bias is None else bias
    return Format(name, "float", e, m, bias, specials, _dtype(name), source, 32 if name == "tf32" else None)


def _default_bias(exponent_bits: int, specials: str) -> int:
    """Returns the bias a format has unless it says otherwise."""
    half = 1 << (exponent_bits - 1)
    return half if specials in ("fnuz", "p3109") else half - 1


def _int(bits: int, specials: Specials = "narrow") -> Format:
    """Returns the integer format of `bits` bits."""
    name = f"uint{bits}" if specials == "unsigned" else f"int{bits}"
    said = ":full" if specials == "full" else ""
    mantissa_bits = bits - (specials != "unsigned")
    source = _UINT if specials == "unsigned" else _INT
    return Format(name + said, "int", 0, mantissa_bits, 1 - mantissa_bits, specials, _dtype(name), source)


def _fixed(bits: int, fraction_bits: int, specials: Specials) -> Format:
    """Returns the fixed-point format of `bits` bits, of which `fraction_bits` are after the point."""
    mantissa_bits = bits - (specials != "unsigned")
    name = f"{'u' if specials == 'unsigned' else ''}fixed{bits}.{fraction_bits}"
    said = ":narrow" if specials == "narrow" else ""
    return Format(name + said, "int", 0, mantissa_bits, fraction_bits + 1 - mantissa_bits, specials, None, _FIXED)


def _dtype(name: str) -> np.dtype | None:
    """Returns the NumPy or ml_dtypes dtype called `name`, or None."""
    scalar_type = getattr(ml_dtypes, name, None) or getattr(np, name, None)
    return None if scalar_type is None else np.dtype(scalar_type)


_ENTRIES = (
    _float("float64", 11, 52, "ieee", _IEEE),
    _float("float32", 8, 23, "ieee", _IEEE),
    _float("tf32", 8, 10, "ieee", _TF32),
    _float("float16", 5, 10, "ieee", _IEEE),
    _float("bfloat16", 8, 7, "ieee", _BF16),
    _float("float8_e5m2", 5, 2, "ieee", _OFP8),
    _float("float8_e4m3fn", 4, 3, "fn", _OFP8),
    _float("float8_e4m3", 4, 3, "ieee", _APFLOAT),
    _float("float8_e3m4", 3, 4, "ieee", _APFLOAT),
    _float("float8_e5m2fnuz", 5, 2, "fnuz", _FNUZ),
    _float("float8_e4m3fnuz", 4, 3, "fnuz", _FNUZ),
    _float("float8_e4m3b11fnuz", 4, 3, "fnuz", _B11, bias=11),
    _float("p3109_k8p3", 5, 2, "p3109", _P3109),
    _float("p3109_k8p4", 4, 3, "p3109", _P3109),
    _float("p3109_k8p5", 3, 4, "p3109", _P3109),
    _float("float8_e8m0fnu", 8, 0, "fnu", _E8M0),
    _float("float6_e3m2fn", 3, 2, "finite", _MX),
    _float("float6_e2m3fn", 2, 3, "finite", _MX),
    _float("float4_e2m1fn", 2, 1, "finite", _MX),
    *(_int(bits) for bits in (16, 8, 4, 2)),
    *(_int(bits, "full") for bits in (16, 8, 4, 2)),
    *(_int(bits, "unsigned") for bits in (16, 8, 4, 2)),
)

FORMATS: Mapping[str, Format] = MappingProxyType({fmt.name: fmt for fmt in _ENTRIES})

# Formats that are more than a grid of one element (codebooks, blocks), added by the modules that define them.
_registered: dict[str, Any] = {}
_registered_aliases: dict[str, str] = {}
_finders: list[Callable[[str], Any | None]] = []
REGISTERED: Mapping[str, Any] = MappingProxyType(_registered)


def register(fmt: Any, *aliases: str) -> None:
    """Makes `format` know `fmt`, any hashable object with a `name` and a `kind`, by its name and `aliases`.

    Raises:
      ValueError: something else has one of these names.
    """
    for name in (fmt.name, *aliases):
        taken = FORMATS.get(name) or _registered.get(_registered_aliases.get(name, name))
        if name in ALIASES or (taken is not None and taken != fmt):
            raise ValueError(f"format name {name!r} is taken by {taken or FORMATS[ALIASES[name]]!r}; choose another.")
    _registered[fmt.name] = fmt
    _registered_aliases.update({alias: fmt.name for alias in aliases})


def register_finder(find: Callable[[str], Any | None]) -> None:
    """Makes `format` ask `find` for lower-case names it does not know, such as "bfp8:block=16"; None passes on."""
    _finders.append(find)


ALIASES: Mapping[str, str] = MappingProxyType(
    {
        **{"f64": "float64", "fp64": "float64", "double": "float64"},
        **{"f32": "float32", "fp32": "float32", "single": "float32", "full": "float32"},
        **{"f16": "float16", "fp16": "float16", "half": "float16", "bf16": "bfloat16", "tensorfloat32": "tf32"},
        **{name.removeprefix("float8_"): name for name in FORMATS if name.startswith("float8_")},
        **{"f8_e4m3fn": "float8_e4m3fn", "f8_e5m2": "float8_e5m2", "fp8": "float8_e4m3fn"},
        **{"e3m2fn": "float6_e3m2fn", "e2m3fn": "float6_e2m3fn", "e2m1fn": "float4_e2m1fn", "fp4": "float4_e2m1fn"},
        **{f"i{bits}": f"int{bits}" for bits in (16, 8, 4, 2)},
        **{f"u{bits}": f"uint{bits}" for bits in (16, 8, 4, 2)},
    }
)

_BY_STRUCTURE = {(f.kind, f.exponent_bits, f.mantissa_bits, f.bias, f.specials): f for f in reversed(_ENTRIES)}
_GENERIC_FLOAT = re.compile(r"e(\d{1,2})m(\d{1,2})(?::(.+))?")
_GENERIC_INT = re.compile(r"(u?)int(\d{1,2})(:full|:narrow)?")
_GENERIC_FIXED = re.compile(r"(u?)fixed(\d{1,2})\.(\d{1,2})(:full|:narrow)?")
_P3109_NAME = re.compile(r"p3109_k(\d{1,2})p(\d{1,2})")


def format(spec: Any) -> Format:
    """Returns the format that `spec` names.

    Args:
      spec: a Format; a name of `FORMATS` or alias ("bf16", "half", "e4m3fn"); "eXmY" with IEEE conventions, or with
        options as in "e5m3:bias=12,finite" (`bias=` and one of the `SPECIALS`); "p3109_k8p3" and others of K bits with
        precision P; "intN", "intN:full" and "uintN" for N from 2 to 16 (narrow, full range, unsigned); "fixedN.F" and
        "ufixedN.F" with F of N bits after the point, full range unless ":narrow"; a name that `register` added; a
        NumPy, ml_dtypes or JAX dtype. Spellings that describe a catalogue entry give that entry.

    Raises:
      ValueError: nothing has that name (the nearest names are given), or the options contradict each other.
      TypeError: `spec` is neither a name, nor a dtype, nor a Format.
    """
    if isinstance(spec, Format) or type(spec) in {type(fmt) for fmt in _registered.values()}:
        return spec
    if isinstance(spec, str):
        return _from_name(spec)
    return _from_dtype(spec)


def _from_name(spec: str) -> Format:
    """Returns the format called `spec`, ignoring case and surrounding blanks."""
    name = spec.strip().lower()
    name = ALIASES.get(name, name)
    if name in FORMATS:
        return FORMATS[name]
    if match := _GENERIC_FLOAT.fullmatch(name):
        return _generic_float(spec, int(match[1]), int(match[2]), match[3])
    if found := _generic_int(name):
        return found
    registered = _registered.get(_registered_aliases.get(name, name))
    if registered is not None:
        return registered
    for find in _finders:
        if (found := find(name)) is not None:
            return found
    raise ValueError(f"unknown format {spec!r}. {_suggestion(name)}")


def _generic_int(name: str) -> Format | None:
    """Returns the integer, fixed-point or P3109 format of this name, None if it is no such name."""
    if (match := _P3109_NAME.fullmatch(name)) and 1 <= int(match[2]) < int(match[1]) <= 16:
        return _float(name, int(match[1]) - int(match[2]), int(match[2]) - 1, "p3109", _P3109)
    match = _GENERIC_INT.fullmatch(name) or _GENERIC_FIXED.fullmatch(name)
    if not match or not 2 <= int(match[2]) <= 16 or (match[1] and match[match.re.groups]):
        return None
    is_int = match.re is _GENERIC_INT
    said = (match[match.re.groups] or (":narrow" if is_int else ":full")).removeprefix(":")
    specials: Any = "unsigned" if match[1] else said
    if is_int:
        return FORMATS.get(name.removesuffix(":narrow")) or _int(int(match[2]), specials)
    return _fixed(int(match[2]), int(match[3]), specials)


def _suggestion(name: str) -> str:
    """Returns the sentence that helps with an unknown format."""
    names = {**{each: each for each in (*FORMATS, *_registered)}, **ALIASES, **_registered_aliases}
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    near = list(dict.fromkeys(names[each] for each in near))
    if near:
        return f"Nearest: {', '.join(map(repr, near))}."
    return f"Known: {', '.join(FORMATS)}; also eXmY such as 'e5m3', intN and uintN for N from 2 to 16, fixedN.F."


def _generic_float(spec: str, e: int, m: int, options: str | None) -> Format:
    """Returns the catalogue entry with this structure, else a new format."""
    specials, bias = _parse_options(spec, options)
    bias = _default_bias(max(e, 1), specials) if bias is None else bias
    known = _BY_STRUCTURE.get(("float", e, m, bias, specials))
    if known is not None:
        return known
    said = [f"bias={bias}"] if bias != _default_bias(max(e, 1), specials) else []
    said += [specials] if specials != "ieee" else []
    name = f"e{e}m{m}" + (":" + ",".join(said) if said else "")
    return Format(name, "float", e, m, bias, specials, source=_GENERIC)


def _parse_options(spec: str, options: str | None) -> tuple[Specials, int | None]:
    """Returns (specials, bias) of the part after the colon of "eXmY:..."."""
    specials: Specials | None = None
    bias: int | None = None
    for option in (options or "").split(",") if options else []:
        key, _, value = option.strip().partition("=")
        if key == "bias" and bias is None and re.fullmatch(r"-?\d{1,4}", value):
            bias = int(value)
        elif key in SPECIALS and key not in INTEGERS and not value and specials is None:
            specials = key  # pyright: ignore[reportAssignmentType]
        else:
            names = ", ".join(name for name in SPECIALS if name not in INTEGERS)
            raise ValueError(
                f"format {spec!r}: cannot use option {option!r}. Options are bias=INTEGER and one of {names}."
            )
    return specials or "ieee", bias


def _from_dtype(spec: Any) -> Format:
    """Returns the format stored by a dtype or by something NumPy takes for one."""
    wanted = "a format name, a dtype or a Format"
    if spec is None or any(spec is python_type for python_type in (float, int, bool, complex)):
        raise TypeError(f"expected {wanted}, got {spec!r}. Python's own number types are ambiguous; say 'float32'.")
    try:
        dtype = np.dtype(spec)
    except TypeError as error:
        raise TypeError(f"expected {wanted}, got {spec!r} of type {type(spec).__name__}.") from error
    for fmt in FORMATS.values():
        if fmt.dtype == dtype:
            return fmt
    raise ValueError(f"no format is stored as dtype {dtype.name!r}. Known: {', '.join(FORMATS)}.")

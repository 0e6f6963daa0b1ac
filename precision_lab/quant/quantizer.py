"""Quantizer: how one array becomes codes and scales, as data; `str` of it parses back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from precision_lab import formats
from precision_lab.formats import ROUNDINGS, BlockFormat, Codebook, Format
from precision_lab.quant.granularity import granularity
from precision_lab.quant.options import (
    CALIBRATIONS,
    DOUBLE,
    ESTIMATORS,
    LEARNED,
    RECIPROCAL,
    SCHEMES,
    STRENGTHS,
    default_calibration,
    default_granularity,
    default_scheme,
)
from precision_lab.quant.problems import check

_SYNONYMS = {"minmax": "absmax"}


@dataclass(frozen=True, slots=True, repr=False)
class Quantizer:
    """How one array is quantized: hashable, compared by meaning, safe as a static argument of `jax.jit`.

    None stands for the default of the format, and is replaced by it, so that two spellings of one quantizer are equal.

    Attributes:
      format: what elements are rounded to: a scalar format, a codebook or a block format; or its name. Integers are
        narrow here ("int4"); whether the most negative code is used is up to the scheme.
      granularity: what shares one scale; a `Granularity` or its name. By default "tensor", for NF4 "group64".
      scheme: one of `SCHEMES`. By default "symmetric"; "full" for "int4:full" and its like, "unscaled" for block
        formats, fixed point and floats of more than 8 bits.
      calibration: one of `CALIBRATIONS`. By default "absmax"; "absmean" for "binary" and "ternary".
      percentile: for calibration "percentile", the share of magnitudes that is kept, in percent.
      clip: factor of the range found, in (0, 1].
      rounding: one of `formats.ROUNDINGS`.
      estimator: one of `ESTIMATORS`.
      strength: the number in "ewgs" and "tanh"; None is its usual value.
      scale_format: float format that scales are rounded to and stored in, "float32" by default; "double" quantizes them
        again as QLoRA does: to 8 bits in blocks of 256, after their mean is subtracted.
      reciprocal: whether values are multiplied by the rounded reciprocal of their scale, as torchao, bitsandbytes and
        XLA's own division do, for codes equal to theirs; the quotient differs from that at ties and a last place beside
        them, and takes longer. Gradients ask the quotient. A scale above 2**126 and its values are quartered before.

    Raises:
      ValueError: an unknown name, or options that contradict the format or each other.
    """

    format: Any
    granularity: Any = None
    scheme: Any = None
    calibration: Any = None
    percentile: float | None = None
    clip: float = 1.0
    rounding: str = "nearest_even"
    estimator: str = "ste"
    strength: float | None = None
    scale_format: str = "float32"
    reciprocal: bool = False

    def __post_init__(self) -> None:
        """Puts names and defaults into their one form, and refuses what contradicts itself."""
        fmt = self.format if isinstance(self.format, (Format, Codebook, BlockFormat)) else formats.format(self.format)
        given = default_granularity(fmt) if self.granularity is None else self.granularity
        self._set(granularity=granularity(given))
        self._set(**_of_format(fmt, self.scheme))
        calibration = self.calibration or default_calibration(fmt)
        self._set(calibration=_SYNONYMS.get(calibration, calibration))
        _known("scheme", self.scheme, SCHEMES)
        _known("calibration", self.calibration, CALIBRATIONS)
        _known("rounding", self.rounding, ROUNDINGS)
        _known("estimator", self.estimator, ESTIMATORS)
        if self.scale_format != DOUBLE:
            self._set(scale_format=formats.format(self.scale_format).name)
        if self.strength is None and self.estimator in STRENGTHS:
            self._set(strength=STRENGTHS[self.estimator])
        check(self)

    def _set(self, **fields: Any) -> None:
        """Sets fields while the object is being made."""
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    def __str__(self) -> str:
        said = self.format.name
        said += "" if str(self.granularity) == default_granularity(self.format) else f"@{self.granularity}"
        return ",".join([said, *self._options()])

    def __repr__(self) -> str:
        return f"quantizer({str(self)!r})"

    def _options(self) -> list[str]:
        """Returns the options that are not the default ones, as they are spelled in a string."""
        said = [self.scheme] * (self.scheme != default_scheme(self.format))
        if self.calibration != default_calibration(self.format):
            also_estimator = "calibration=" if self.calibration in ESTIMATORS else ""
            said.append(also_estimator + self.calibration + ("" if self.percentile is None else f"{self.percentile!r}"))
        said += [f"clip={self.clip!r}"] * (self.clip != 1)
        said += [self.rounding] * (self.rounding != "nearest_even")
        if self.estimator != "ste":
            usual = self.strength == STRENGTHS.get(self.estimator)
            said.append(self.estimator + ("" if usual else f"={self.strength!r}"))
        if self.scale_format != "float32":
            said.append(DOUBLE if self.scale_format == DOUBLE else f"scale={self.scale_format}")
        said += [RECIPROCAL] * self.reciprocal
        return said

    @property
    def code_format(self) -> Any:
        """Returns the format of the codes: with the most negative integer if the scheme uses it."""
        fmt, uses_all = self.format, self.scheme in ("full", "full_clipped", "affine", "signed_max")
        return formats.format(f"{fmt.name}:full") if uses_all and fmt.specials == "narrow" else fmt

    @property
    def is_scaled(self) -> bool:
        """Returns whether values are divided by a scale of ours before they are rounded."""
        return self.scheme not in ("unscaled", "clamped")

    @property
    def has_state(self) -> bool:
        """Returns whether it asks for what only a state can hold: a learned number, or a running range."""
        return self.estimator in LEARNED or self.calibration == "ema"

    @property
    def has_zero_point(self) -> bool:
        """Returns whether codes are shifted by a zero point."""
        return self.scheme == "affine"


def _known(what: str, given: str, table: dict[str, str]) -> None:
    """Refuses a name that is not in its table."""
    if given not in table:
        raise ValueError(f"{what} must be one of {', '.join(table)}, got {given!r}.")


def _of_format(fmt: Any, scheme: str | None) -> dict[str, Any]:
    """Returns format and scheme in the form in which an integer is narrow and the scheme says what it uses."""
    if isinstance(fmt, Format) and fmt.specials == "full" and fmt.step == 1:
        fmt = formats.format(fmt.name.removesuffix(":full"))
        scheme = "full" if scheme in (None, "symmetric") else scheme
        if scheme in ("pow2", "unscaled"):
            raise ValueError(f"scheme {scheme!r} is for the narrow integers; say {fmt.name!r}.")
    return {"format": fmt, "scheme": scheme or default_scheme(fmt)}

"""What a policy can say about one operation: the settings, each with how it is read and printed.

`SETTINGS` is the one table behind `Policy`, its rules and its strings: a key there is a field of `Treatment`, a key of
a rule and a word of the grammar.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from precision_lab import formats
from precision_lab.formats import Format
from precision_lab.policy.accumulator import Accumulator

FLOAT32 = formats.format("float32")
FLOAT64 = formats.format("float64")
_NATIVE = Accumulator(FLOAT32)
JMP_FORMATS = frozenset(("float16", "bfloat16", "float32", "float64"))
BACKWARDS = ("quantized", "original", "requantized")
EXECUTIONS = ("auto", "native", "simulated")
CATEGORIES = ("low", "float32", "promote", "follow", "never")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Treatment:
    """What happens at one operation.

    Attributes:
      compute: format of the operands of products, forward and backward.
      accum: what products accumulate in.
      weight: quantizer of an operand that is a parameter; None leaves it in `compute`.
      activation: quantizer of the other operand of a product with a parameter.
      attention: quantizer of both operands of a product without a parameter (scores and values of attention).
      embedding: quantizer of a parameter whose rows are looked up; by the literature a setting of its own, since
        tables are mostly left alone where weights are quantized.
      gradient: quantizer of the cotangent in both backward products; with it all three products are quantized.
      dgrad, wgrad: format of the operands of the product that is the gradient of the input, or of the weight,
        instead of what the settings above make of them; None leaves it to those.
      backward: what the backward products multiply: "quantized", the operands as the forward product had them;
        "original", the operands before quantization; "requantized", the originals quantized anew along the axes that
        the backward product contracts. None means "requantized" with `gradient` and "quantized" without.
      execution: "native" for the arithmetic of the hardware's own types, "simulated" for values on the format's grid
        in float32, "auto" for native where XLA has the type and the result is the same.
      outliers: magnitude of an activation from which on its feature, with the weights that it meets, is multiplied in
        `compute` instead of quantized; None quantizes all.
      op: category of an operation that is not a product, one of `CATEGORIES`; None leaves it to the policy's `ops`.
      round: format that the results of the operation, and their cotangents, are rounded to.
    """

    compute: Format = FLOAT32
    accum: Accumulator = _NATIVE
    weight: Any = None
    activation: Any = None
    attention: Any = None
    embedding: Any = None
    gradient: Any = None
    dgrad: Format | None = None
    wgrad: Format | None = None
    backward: str | None = None
    execution: str = "auto"
    outliers: float | None = None
    op: str | None = None
    round: Format | None = None

    @property
    def quantizes(self) -> bool:
        """Whether any operand of a product has a quantizer."""
        return any(getattr(self, key) is not None for key in OF_PRODUCTS)


OF_PRODUCTS = ("weight", "activation", "attention", "gradient")
QUANTIZERS = (*OF_PRODUCTS, "embedding")


@dataclasses.dataclass(frozen=True)
class Setting:
    """How the value of one setting is read from what people write, and printed so that it reads back."""

    read: Callable[[Any], Any]
    show: Callable[[Any], str] = str


def read_format(spec: Any) -> Format:
    """Reads one scalar format or its name, `half` and `full` as in jmp."""
    if isinstance(spec, str):
        spec = {"half": "float16", "full": "float32"}.get(spec.lower(), spec)
    return formats.format(spec)


def _read_accumulator(spec: Any) -> Accumulator:
    return Accumulator.parse({"half": "float16", "full": "float32"}.get(spec, spec) if isinstance(spec, str) else spec)


def _read_quantizer(spec: Any) -> Any:
    from precision_lab.quant import quantizer

    return quantizer(spec)


def _or_none(read: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Reads `none` as None, which switches a setting off where a rule says so."""
    return lambda spec: None if spec is None or str(spec).lower() == "none" else read(spec)


def _one_of(key: str, words: tuple[str, ...]) -> Callable[[Any], str]:
    def read(spec: Any) -> str:
        word = str(spec).lower()
        if word not in words:
            raise ValueError(f"{key}={spec} must be one of {', '.join(words)}.")
        return word

    return read


def _read_magnitude(spec: Any) -> float:
    try:
        value = float(spec)
    except (TypeError, ValueError):
        value = 0.0
    if not 0 < value < float("inf"):
        raise ValueError(f"outliers={spec} must be a positive number, such as 6.0.")
    return value


def _name(fmt: Format | None) -> str:
    return "none" if fmt is None else fmt.name


def _word(value: Any) -> str:
    return "none" if value is None else str(value)


_FORMAT = Setting(read_format, _name)
_FORMAT_OR_NONE = Setting(_or_none(read_format), _name)
_QUANTIZER = Setting(_or_none(_read_quantizer), _word)
SETTINGS: dict[str, Setting] = {
    "compute": _FORMAT,
    "accum": Setting(_read_accumulator),
    **dict.fromkeys(QUANTIZERS, _QUANTIZER),
    "dgrad": _FORMAT_OR_NONE,
    "wgrad": _FORMAT_OR_NONE,
    "backward": Setting(_or_none(_one_of("backward", BACKWARDS)), _word),
    "execution": Setting(_one_of("execution", EXECUTIONS)),
    "outliers": Setting(_or_none(_read_magnitude), lambda value: "none" if value is None else f"{value:g}"),
    "op": Setting(_or_none(_one_of("op", CATEGORIES)), _word),
    "round": _FORMAT_OR_NONE,
}


def default_accum(compute: Format) -> Accumulator:
    """Returns float64 for float64 products and float32 for all others."""
    return Accumulator(FLOAT64 if compute == FLOAT64 else FLOAT32)


def require_sign_and_zero(key: str, fmt: Format) -> None:
    """Raises for formats of scales, in which no tensor survives a cast."""
    if fmt.kind == "float" and not (fmt.signed and fmt.has_zero):
        raise ValueError(f"{key}={fmt.name} has no sign or no zero: it is a format for scales, not for tensors.")

"""Probe configs: what to measure, as data. JAX is not imported here."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, field_validator

from precision_lab import formats
from precision_lab.models.fields import FrozenConfig, Int, NotNegative, PositiveFloat, PositiveInt
from precision_lab.models.registry import Builder, Registry
from precision_lab.policy.accumulator import Accumulator
from precision_lab.quant import Quantizer, quantizer


class ProbeConfig(FrozenConfig):
    """Base of all probe configs; `measures` are the names of the metrics, logged as `probe/<name>`."""

    measures: ClassVar[tuple[str, ...]] = ()
    kind: str


class DotProductConfig(ProbeConfig):
    """Errors of dot products that sum up in a narrow accumulator.

    Attributes:
      length: elements of each dot product.
      count: how many dot products.
      distribution: of the elements before they are rounded: "zero_mean" is N(0, 1), "positive" its magnitude, so that
        no two products cancel.
      inputs: float format that the elements are rounded to, so that only sums are inexact.
      accum: accumulator, in the words of a policy's `accum`: `bfloat16`, `float16@promote64`,
        `e8m13@step32@toward_zero`, `bfloat16@stochastic`.
    """

    measures: ClassVar[tuple[str, ...]] = ("error", "max_error", "bias")
    kind: Literal["dot_product"] = "dot_product"
    length: PositiveInt = 4096
    count: PositiveInt = 256
    distribution: Literal["zero_mean", "positive"] = "zero_mean"
    inputs: str = "float8_e4m3fn"
    accum: str = "float32"

    @field_validator("accum", mode="before")
    @classmethod
    def _canonical_accum(cls, value: Any) -> str:
        if not isinstance(value, str | Accumulator):
            raise ValueError(f"expected an accumulator such as bfloat16@promote64, got {value!r}")
        accum = Accumulator.parse(value)
        if accum.format.name == "float64":
            raise ValueError("float64 is what errors are measured against; choose a narrower accumulator")
        return str(accum)

    @field_validator("inputs", mode="before")
    @classmethod
    def _canonical_inputs(cls, value: Any) -> str:
        fmt = formats.format(value) if isinstance(value, str | formats.Format) else None
        if not isinstance(fmt, formats.Format) or fmt.kind != "float" or fmt.mantissa_bits > _EXACT_MANTISSA_BITS:
            raise ValueError(
                f"expected a float format of up to {_EXACT_MANTISSA_BITS} mantissa bits, whose products float32 holds "
                f"exactly, such as float8_e4m3fn, float16 or bfloat16; got {value}"
            )
        return fmt.name


_EXACT_MANTISSA_BITS = 11


class LeastSquaresConfig(ProbeConfig):
    """Least squares against a known teacher, by SGD on weights that are updated in 16 bits.

    Attributes:
      update: how weights take their steps: as float32, with a float32 master, rounded to nearest or at random, or
        compensated; see `RunConfig`.
      format: how weights are stored, but for "float32".
      dimension: number of weights.
      steps, batch, lr: of SGD.
      noise: standard deviation of what is added to the targets.
    """

    measures: ClassVar[tuple[str, ...]] = ("error", "unchanged_fraction")
    kind: Literal["least_squares"] = "least_squares"
    update: Literal["float32", "master", "nearest", "stochastic", "kahan"] = "nearest"
    format: Literal["bfloat16", "float16"] = "bfloat16"
    dimension: PositiveInt = 10
    steps: PositiveInt = 4000
    batch: PositiveInt = 8
    lr: PositiveFloat = 0.01
    noise: NotNegative = 0.5


class RoundingErrorConfig(ProbeConfig):
    """What a quantizer loses of random numbers.

    Attributes:
      quantizer: in the words of a policy's `weight`, such as `nf4@group64`.
      distribution: "normal" is N(0, 1), "uniform" is U(-1, 1).
      length: elements along the axis that groups lie along.
      count: how many rows of so many.
    """

    measures: ClassVar[tuple[str, ...]] = ("relative_mse",)
    kind: Literal["rounding_error"] = "rounding_error"
    quantizer: str = "nf4@group64"
    distribution: Literal["normal", "uniform"] = "normal"
    length: PositiveInt = 4096
    count: PositiveInt = 256

    @field_validator("quantizer", mode="before")
    @classmethod
    def _canonical_quantizer(cls, value: Any) -> str:
        if not isinstance(value, str | Quantizer):
            raise ValueError(f"expected a quantizer such as nf4@group64, got {value!r}")
        found = quantizer(value)
        if found.rounding == "stochastic":
            raise ValueError(f"{found} draws its rounding, for which a probe has no key; leave stochastic out")
        return str(found)


PROBES: Registry[ProbeConfig] = Registry("probe", ProbeConfig)
PROBES.register("dot_product", DotProductConfig, "precision_lab.training.probes.dot_product:measure")
PROBES.register("rounding_error", RoundingErrorConfig, "precision_lab.training.probes.rounding_error:measure")
PROBES.register("least_squares", LeastSquaresConfig, "precision_lab.training.probes.least_squares:measure")

AnyProbe = Annotated[SerializeAsAny[ProbeConfig], BeforeValidator(PROBES.validate)]
"""Field type: a probe config of any registered kind."""


class ProbeRun(FrozenConfig):
    """One run that measures instead of training.

    Attributes:
      probe: what to measure.
      seed: decides what is drawn at random.
    """

    probe: AnyProbe
    seed: Annotated[Int, Field(ge=0, lt=2**32)] = 0

    @property
    def total_steps(self) -> int:
        """How many steps progress is counted in: a probe is one."""
        return 1


def register_probe(kind: str, config_cls: type[ProbeConfig], measure: Builder | str) -> None:
    """Lets configs name a probe of your own.

    Args:
      kind: the tag that configs will use.
      config_cls: subclass of `ProbeConfig` with `kind: Literal[kind] = kind`, and in `measures` the metrics.
      measure: `measure(config, seed) -> dict[str, float]`, a value for each of `measures`, a function of its arguments
        alone. A "module:function" string is imported at first use.

    Raises:
      TypeError, ValueError: see `Registry.register`.
    """
    PROBES.register(kind, config_cls, measure)

"""What is done to the parameters that a run begins with, as data. JAX is not imported here."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, field_validator

from precision_lab import formats
from precision_lab.models.fields import Bool, FrozenConfig, Int, NotNegativeInt, PositiveFloat
from precision_lab.models.registry import Registry


class TransformConfig(FrozenConfig):
    """Base of the transforms. Patterns are globs over paths of parameters, such as "blocks/*/up/kernel"."""

    kind: str


class _AroundReLU(TransformConfig):
    """Kernels that have nothing but a ReLU between them, the first with the bias beside it, if any."""

    first: str
    second: str


class ReLURescaleConfig(_AroundReLU):
    """Units before a ReLU times powers of two, undone after it: the float32 function stays the same to the last bit.

    Attributes:
      exponent: of all units.
      spread: each unit's exponent differs from that by a whole number drawn from -spread to spread.
    """

    kind: Literal["relu_rescale"] = "relu_rescale"
    exponent: Annotated[Int, Field(ge=-60, le=60)] = 0
    spread: Annotated[NotNegativeInt, Field(le=60)] = 0


class EqualizeConfig(_AroundReLU):
    """Cross-layer equalization (Nagel et al. 2019, arXiv:1906.04721, section 4.1)."""

    kind: Literal["equalize"] = "equalize"


class NormOutliersConfig(TransformConfig):
    """Some channels of a normalisation `factor` times as large, undone by the kernels that alone read it.

    Attributes:
      norm: modules with a `scale`, and a `bias` or none.
      readers: the kernel that reads each of them.
      channels: how many channels of each, drawn at random; 0 changes nothing.
      factor: how much larger.
    """

    kind: Literal["norm_outliers"] = "norm_outliers"
    norm: str
    readers: str
    channels: NotNegativeInt
    factor: PositiveFloat


class StoreConfig(TransformConfig):
    """Parameters as they read back from storage in a format, and an audit of that: metrics `start/...`.

    Attributes:
      format: a floating format, such as float16.
      paths: which parameters.
      clamp: store what is too large as the largest finite number.
    """

    kind: Literal["store"] = "store"
    format: str
    paths: str = "**"
    clamp: Bool = False

    @field_validator("format")
    @classmethod
    def _is_floating(cls, value: str) -> str:
        fmt = formats.format(value)
        if fmt.kind != "float":
            raise ValueError(f"{fmt.name} is of kind {fmt.kind}, which needs a scale; a store is a plain cast")
        return fmt.name


TRANSFORMS: Registry[TransformConfig] = Registry("transform", TransformConfig)
for _cls in (ReLURescaleConfig, EqualizeConfig, NormOutliersConfig, StoreConfig):
    TRANSFORMS.register(_cls.model_fields["kind"].default, _cls, "")

AnyTransform = Annotated[
    ReLURescaleConfig | EqualizeConfig | NormOutliersConfig | StoreConfig, BeforeValidator(TRANSFORMS.validate)
]

AUDITED = ("overflow", "underflow", "subnormal")
"""Metrics of a run that begins with stored parameters, as `start/<name>`: numbers of parameters."""

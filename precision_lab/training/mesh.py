"""How many devices train one run, and how it is divided among them, as data. JAX is not imported here."""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from precision_lab.models.fields import FrozenConfig, Int, located_error

AXES = ("data", "fsdp", "tensor")
Size = Annotated[Int, Field(ge=-1)]


def _rules(value: Any) -> Any:
    """Returns a mapping as a tuple of pairs, which can be hashed; anything else as it is."""
    pairs = value.items() if isinstance(value, dict) else value
    try:
        return tuple((pattern, tuple(axes)) for pattern, axes in pairs)
    except (TypeError, ValueError):
        return value


Rules = Annotated[tuple[tuple[str, tuple[Literal["fsdp", "tensor"] | None, ...]], ...], BeforeValidator(_rules)]


class MeshConfig(FrozenConfig):
    """The devices of a run as a grid; one of the sizes may be -1, which takes all devices that are left.

    Attributes:
      data: how many devices share a batch, each with all parameters.
      fsdp: how many share a batch and the parameters too, with their optimizer state: each parameter is divided along
        its longest axis that can be.
      tensor: how many share each product, whose kernel is divided along its inputs or its outputs.
      sharding: by pattern of a parameter's path, what divides its axes (fsdp, tensor or nothing); before the rules of
        the package.
    """

    data: Size = 1
    fsdp: Size = 1
    tensor: Size = 1
    sharding: Annotated[Rules, Field(json_schema_extra={"legacy": []})] = ()

    @model_validator(mode="after")
    def _can_be(self) -> "MeshConfig":
        for axis in AXES:
            if getattr(self, axis) == 0:
                raise located_error((axis,), "a mesh has at least one device along each axis, or -1 for all", 0)
        if [getattr(self, axis) for axis in AXES].count(-1) > 1:
            raise located_error(("data",), "only one axis of a mesh can take all devices that are left", self.data)
        return self

    @property
    def is_one_device(self) -> bool:
        """Whether nothing is divided."""
        return all(getattr(self, axis) == 1 for axis in AXES)

"""What config fields are made of: scalars that mean what they say, and errors that point at a field.

Plain pydantic reads `lr: off` as 0.0 and `hidden: ["3"]` as 3; these types refuse both.
"""

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import InitErrorDetails, PydanticCustomError

Int = Annotated[int, Field(strict=True)]
PositiveInt = Annotated[int, Field(strict=True, ge=1)]
NotNegativeInt = Annotated[int, Field(strict=True, ge=0)]
Bool = Annotated[bool, Field(strict=True)]
Float = Annotated[float, Field(strict=True, allow_inf_nan=False)]
PositiveFloat = Annotated[Float, Field(gt=0)]
NotNegative = Annotated[Float, Field(ge=0)]
Fraction = Annotated[Float, Field(ge=0, lt=1)]


def tuple_of_list(value: Any) -> Any:
    """Returns a list, which YAML has, as a tuple, which can be hashed; anything else as it is."""
    return tuple(value) if isinstance(value, list) else value


Widths = Annotated[tuple[PositiveInt, ...], BeforeValidator(tuple_of_list)]
"""Positive integers; a list in YAML, a tuple here."""


class FrozenConfig(BaseModel):
    """What all configs are: immutable, hashable, and closed to keys that they do not know."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


def located_error(loc: tuple[str | int, ...], message: str, value: Any) -> ValidationError:
    """Returns an error at `loc`, relative to the config whose validator raises it.

    A ValueError raised by a validator of a whole config would be reported at the config; this one is reported at the
    field, so that a file's line can be shown.
    """
    # Braces would be read as placeholders of pydantic's message template.
    text: Any = message.replace("{", "(").replace("}", ")")
    details = InitErrorDetails(type=PydanticCustomError("value_error", text), loc=loc, input=value)
    return ValidationError.from_exception_data("config", [details])

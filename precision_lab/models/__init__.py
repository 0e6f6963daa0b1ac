"""Plain Flax NNX models that know nothing of precision, and the configs that describe them.

Importing this package needs no JAX; `build` imports it.
"""

from typing import TYPE_CHECKING, Any

from precision_lab.models.config import (
    MODELS,
    CharResMLPConfig,
    ConvNetConfig,
    DataSpec,
    MLPConfig,
    ModelConfig,
    TransformerConfig,
    register_model,
)

if TYPE_CHECKING:
    from precision_lab.models.building import build

__all__ = [
    "MODELS",
    "CharResMLPConfig",
    "ConvNetConfig",
    "DataSpec",
    "MLPConfig",
    "ModelConfig",
    "TransformerConfig",
    "build",
    "register_model",
]


def __getattr__(name: str) -> Any:
    if name == "build":
        from precision_lab.models.building import build

        return build
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

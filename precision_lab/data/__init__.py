"""Data sets: configs, loaders that find or download their files, and seeded batches.

Importing this package needs neither JAX nor grain; `batches` imports them.
"""

from typing import TYPE_CHECKING, Any

from precision_lab.data.config import (
    DATASETS,
    Cifar10Config,
    DataConfig,
    DigitsConfig,
    FashionMnistConfig,
    MnistConfig,
    NextCharConfig,
    TinyShakespeareConfig,
    register_data,
)
from precision_lab.data.dataset import ArraySplit, ContextSplit, Dataset, Split, TextSplit
from precision_lab.data.files import DataError
from precision_lab.models.config import DataSpec

if TYPE_CHECKING:
    from precision_lab.data.pipeline import batches

__all__ = [
    "DATASETS",
    "ArraySplit",
    "Cifar10Config",
    "ContextSplit",
    "DataConfig",
    "DataError",
    "DataSpec",
    "Dataset",
    "DigitsConfig",
    "FashionMnistConfig",
    "MnistConfig",
    "NextCharConfig",
    "Split",
    "TextSplit",
    "TinyShakespeareConfig",
    "batches",
    "load",
    "register_data",
]


def load(config: DataConfig) -> Dataset:
    """Returns the data set that `config` describes, in memory.

    Raises:
      DataError: a file is missing and cannot be downloaded, or has the wrong checksum.
    """
    return DATASETS.builder(config)(config)


def __getattr__(name: str) -> Any:
    if name == "batches":
        from precision_lab.data.pipeline import batches

        return batches
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

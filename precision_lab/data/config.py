"""Data configs: which data set, and how much of it makes a batch. JAX is not imported here."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny

from precision_lab.models.config import DataSpec
from precision_lab.models.fields import Bool, FrozenConfig, Int, PositiveInt
from precision_lab.models.registry import Builder, Registry


class DataConfig(FrozenConfig):
    """Base of all data configs; `batch` is the number of examples in a training batch."""

    kind: str
    batch: PositiveInt = 64

    def spec(self) -> DataSpec | None:
        """Returns what the data asks of a model, or None if only loading it can tell."""
        return None


class DigitsConfig(DataConfig):
    """scikit-learn's digits, bundled with it: 1797 images of 8x8, 1437 to train on and 360 to test."""

    kind: Literal["digits"] = "digits"

    def spec(self) -> DataSpec:
        """Returns 8x8 images of ten classes."""
        return DataSpec("classification", (8, 8, 1), 10)


class FashionMnistConfig(DataConfig):
    """Fashion-MNIST: 60000 + 10000 images of 28x28 in ten classes (Xiao et al., 2017, arXiv:1708.07747)."""

    kind: Literal["fashion_mnist"] = "fashion_mnist"

    def spec(self) -> DataSpec:
        """Returns 28x28 images of ten classes."""
        return DataSpec("classification", (28, 28, 1), 10)


class MnistConfig(DataConfig):
    """MNIST: 60000 + 10000 handwritten digits of 28x28 (LeCun, Cortes and Burges)."""

    kind: Literal["mnist"] = "mnist"

    def spec(self) -> DataSpec:
        """Returns 28x28 images of ten classes."""
        return DataSpec("classification", (28, 28, 1), 10)


class Cifar10Config(DataConfig):
    """CIFAR-10: 50000 + 10000 colour images of 32x32 in ten classes (Krizhevsky, 2009).

    `subset` takes a balanced subset instead, 10000 + 2000 images decoded from JPEG: its pixels differ a little from
    the originals, so an accuracy on it is not comparable with published ones.
    """

    kind: Literal["cifar10"] = "cifar10"
    subset: Bool = False

    def spec(self) -> DataSpec:
        """Returns 32x32 colour images of ten classes."""
        return DataSpec("classification", (32, 32, 3), 10)


class TinyShakespeareConfig(DataConfig):
    """The tinyshakespeare text by characters: 65 symbols, the first 90 % to train on, the last 10 % to test."""

    kind: Literal["tinyshakespeare"] = "tinyshakespeare"
    seq_len: PositiveInt = 128
    batch: PositiveInt = 32

    def spec(self) -> DataSpec:
        """Returns sequences of `seq_len` symbols out of 65."""
        return DataSpec("language_model", (self.seq_len,), 65)


class NextCharConfig(DataConfig):
    """A text by characters as contexts, each with the one character that follows: 65 symbols, 90 % to train on.

    Evaluation uses 8192 contexts of each split, spread evenly and always the same.

    Attributes:
      context: characters to predict the next one from.
      source: "tinyshakespeare", or "markov", an order-3 Markov text that needs no file.
      substitution: replaces every symbol by another, by the permutation of this number; None leaves the text as it is.
    """

    kind: Literal["next_char"] = "next_char"
    batch: PositiveInt = 256
    context: PositiveInt = 16
    source: Literal["tinyshakespeare", "markov"] = "tinyshakespeare"
    substitution: Annotated[Int, Field(ge=0)] | None = None

    def spec(self) -> DataSpec:
        """Returns contexts of symbols out of 65."""
        return DataSpec("next_token", (self.context,), 65)


DATASETS: Registry[DataConfig] = Registry("data", DataConfig)
DATASETS.register("digits", DigitsConfig, "precision_lab.data.images:load_digits")
DATASETS.register("fashion_mnist", FashionMnistConfig, "precision_lab.data.images:load_fashion_mnist")
DATASETS.register("mnist", MnistConfig, "precision_lab.data.images:load_mnist")
DATASETS.register("cifar10", Cifar10Config, "precision_lab.data.images:load_cifar10")
DATASETS.register("tinyshakespeare", TinyShakespeareConfig, "precision_lab.data.text:load_tinyshakespeare")
DATASETS.register("next_char", NextCharConfig, "precision_lab.data.text:load_next_char")

AnyData = Annotated[SerializeAsAny[DataConfig], BeforeValidator(DATASETS.validate)]
"""Field type: a data config of any registered kind."""


def register_data(kind: str, config_cls: type[DataConfig], loader: Builder | str) -> None:
    """Lets configs name a data set of your own.

    Args:
      kind: the tag that configs will use.
      config_cls: subclass of `DataConfig` with `kind: Literal[kind] = kind`.
      loader: `loader(config) -> Dataset`. A "module:function" string is imported at first use.

    Raises:
      TypeError, ValueError: see `Registry.register`.
    """
    DATASETS.register(kind, config_cls, loader)

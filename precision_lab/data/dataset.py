"""Data sets in memory: splits that hand out batches by index."""

import dataclasses
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from precision_lab.models.config import DataSpec

Batch = Mapping[str, np.ndarray]


class Split(Protocol):
    """A sequence of examples."""

    def __len__(self) -> int:
        """Returns the number of examples."""
        ...

    def take(self, indices: np.ndarray) -> Batch:
        """Returns the examples at `indices` (batch,), stacked: "inputs" and "targets", first axis `batch`."""
        ...


@dataclasses.dataclass(frozen=True)
class ArraySplit:
    """One row of each array per example.

    Attributes:
      inputs: float32 (n, ...).
      targets: int32 (n,), the classes.
    """

    inputs: np.ndarray
    targets: np.ndarray

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.targets):
            raise ValueError(f"{len(self.inputs)} inputs but {len(self.targets)} targets; there must be one for each.")
        for array in (self.inputs, self.targets):
            array.setflags(write=False)

    def __len__(self) -> int:
        """Returns the number of examples."""
        return len(self.inputs)

    def take(self, indices: np.ndarray) -> Batch:
        """Returns the rows at `indices`."""
        return {"inputs": self.inputs[indices], "targets": self.targets[indices]}


@dataclasses.dataclass(frozen=True)
class TextSplit:
    """Windows of a text; the targets are the inputs moved on by one token.

    Attributes:
      tokens: uint8 (n,), the text.
      seq_len: length of a window.
      stride: distance between the starts of neighbouring windows.
    """

    tokens: np.ndarray
    seq_len: int
    stride: int = 1

    def __post_init__(self) -> None:
        if len(self.tokens) <= self.seq_len:
            raise ValueError(f"a text of {len(self.tokens)} tokens has no window of {self.seq_len} and its next token.")
        self.tokens.setflags(write=False)

    def __len__(self) -> int:
        """Returns the number of windows that have a next token."""
        return (len(self.tokens) - self.seq_len - 1) // self.stride + 1

    def take(self, indices: np.ndarray) -> Batch:
        """Returns int32 (batch, seq_len) inputs and targets."""
        starts = np.asarray(indices)[:, None] * self.stride
        window = self.tokens[starts + np.arange(self.seq_len + 1)].astype(np.int32)
        return {"inputs": window[:, :-1], "targets": window[:, 1:]}


@dataclasses.dataclass(frozen=True)
class ContextSplit:
    """Contexts of a text; the target is the one token that follows.

    Attributes:
      tokens: uint8 (n,), the text.
      context: length of a context.
      count: how many contexts there are, spread evenly over the text; None is one at every position.
    """

    tokens: np.ndarray
    context: int
    count: int | None = None

    def __post_init__(self) -> None:
        if len(self.tokens) <= self.context:
            raise ValueError(f"a text of {len(self.tokens)} tokens has no context of {self.context} and a next token.")
        if self.count is not None and not 1 <= self.count <= self._positions():
            raise ValueError(f"a text of {len(self.tokens)} tokens has {self._positions()} contexts, not {self.count}.")
        self.tokens.setflags(write=False)

    def __len__(self) -> int:
        """Returns the number of contexts."""
        return self._positions() if self.count is None else self.count

    def take(self, indices: np.ndarray) -> Batch:
        """Returns int32 (batch, context) inputs and int32 (batch,) targets."""
        starts = np.asarray(indices, np.int64) * self._positions() // len(self)
        window = self.tokens[starts[:, None] + np.arange(self.context + 1)].astype(np.int32)
        return {"inputs": window[:, :-1], "targets": window[:, -1]}

    def _positions(self) -> int:
        """Returns how many contexts have a next token."""
        return len(self.tokens) - self.context


@dataclasses.dataclass(frozen=True)
class Dataset:
    """What `load` returns.

    Attributes:
      spec: what the data asks of a model.
      train: examples to train on, drawn in shuffled order.
      eval_train: the same data as it is evaluated; differs from `train` for text, whose windows then do not overlap.
      eval: held-out examples, in order.
    """

    spec: DataSpec
    train: Split
    eval_train: Split
    eval: Split

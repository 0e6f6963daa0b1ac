"""Training batches as a grain data set, each a pure function of (seed, step).

The examples of each epoch come in a new order, and a batch may straddle two epochs, so every example is drawn
exactly once an epoch and no step is special. Nothing is carried from step to step: a run resumed at step 1000 asks
for batch 1000.
"""

import functools
import sys

import grain
import numpy as np

from precision_lab.data.config import DataConfig
from precision_lab.data.dataset import Batch, Dataset, Split


def batches(dataset: Dataset, config: DataConfig, seed: int) -> grain.MapDataset:
    """Returns the endless data set whose element `[step]` is the batch of that step, counted from 0.

    Args:
      dataset: what to draw from.
      config: gives the size of a batch.
      seed: decides the order, together with the step alone.

    Returns:
      A grain MapDataset of dicts of arrays: "inputs" (batch, ...) and "targets" (batch, ...).

    Raises:
      ValueError: a batch is larger than the training split.
    """
    if config.batch > len(dataset.train):
        raise ValueError(
            f"data.batch is {config.batch}, but {config.kind} has only {len(dataset.train)} training examples."
        )
    return grain.MapDataset.source(_Batches(dataset.train, config.batch, seed))


def epoch_order(seed: int, epoch: int, size: int) -> np.ndarray:
    """Returns the order (size,) of an epoch, a permutation.

    It sorts the raw output of the Philox generator, which is fixed by its definition; NumPy may change what its
    `permutation` returns from one version to the next.

    Source: Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011.
    """
    return np.argsort(np.random.Philox(key=[seed, epoch]).random_raw(size), kind="stable")


class _Batches:
    """Random access to batches, for grain."""

    def __init__(self, split: Split, batch: int, seed: int) -> None:
        self._split = split
        self._batch = batch
        self._seed = seed
        # Two epochs, since a batch may straddle them.
        self._order = functools.lru_cache(maxsize=2)(functools.partial(epoch_order, seed, size=len(split)))

    def __len__(self) -> int:
        return sys.maxsize

    def __getitem__(self, index: int) -> Batch:
        return self._split.take(self._indices(int(index)))

    def __repr__(self) -> str:
        return f"batches of {self._batch} from {len(self._split)} examples, seed {self._seed}"

    def _indices(self, step: int) -> np.ndarray:
        """Returns which examples make up the batch of `step`."""
        size = len(self._split)
        epoch, start = divmod(step * self._batch, size)
        first = self._order(epoch)[start : start + self._batch]
        missing = self._batch - len(first)
        return first if missing == 0 else np.concatenate([first, self._order(epoch + 1)[:missing]])

"""Batches: a pure function of (seed, step), every example once an epoch."""

import grain
import numpy as np
import pytest

from precision_lab import data
from precision_lab.data import ArraySplit, Dataset, DataSpec, DigitsConfig
from precision_lab.data.pipeline import epoch_order


@pytest.fixture
def numbered():
    """A data set whose inputs are their own numbers."""
    split = ArraySplit(np.arange(23, dtype=np.float32), np.arange(23, dtype=np.int32))
    return Dataset(DataSpec("classification", (), 23), split, split, split)


def drawn(stream, steps):
    return np.concatenate([stream[step]["targets"] for step in steps])


def test_every_example_comes_once_an_epoch(numbered):
    stream = data.batches(numbered, DigitsConfig(batch=8), 3)

    numbers = drawn(stream, range(23))

    epochs = numbers.reshape(8, 23)
    assert (np.sort(epochs, axis=1) == np.arange(23)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 8


def test_a_batch_depends_on_seed_and_step_alone(numbered):
    config = DigitsConfig(batch=8)
    forwards = data.batches(numbered, config, 3)
    backwards = data.batches(numbered, config, 3)

    there = [forwards[step]["targets"] for step in range(40)]
    back = [backwards[step]["targets"] for step in reversed(range(40))][::-1]

    np.testing.assert_array_equal(there, back)
    assert not np.array_equal(there, [data.batches(numbered, config, 4)[step]["targets"] for step in range(40)])


def test_inputs_and_targets_stay_together(numbered):
    batch = data.batches(numbered, DigitsConfig(batch=8), 0)[5]

    np.testing.assert_array_equal(batch["inputs"], batch["targets"])


def test_the_generator_is_the_published_one():
    """Known answer of philox4x64-10 for counter 0 and key 0, from Random123's `kat_vectors`.

    NumPy adds one to the counter before it draws, so counter 0 comes after the largest one.
    """
    last = [2**64 - 1] * 4

    words = np.random.Philox(counter=last, key=[0, 0]).random_raw(4)

    assert [f"{word:016x}" for word in words] == [
        "16554d9eca36314c",
        "db20fe9d672d0fdc",
        "d7e772cee186176b",
        "7e68b68aec7ba23b",
    ]


@pytest.mark.parametrize(("seed", "epoch"), [(0, 0), (7, 0), (0, 7), (2**32 - 1, 2**40)])
def test_an_order_sorts_the_words_of_its_seed_and_epoch(seed, epoch):
    words = np.random.Philox(key=[seed, epoch]).random_raw(50)

    assert (np.diff(words[epoch_order(seed, epoch, 50)].astype(object)) > 0).all()


def test_it_is_a_grain_data_set(numbered):
    stream = data.batches(numbered, DigitsConfig(batch=4), 0)

    halves = stream.map(lambda batch: batch["targets"][:2])

    assert isinstance(stream, grain.MapDataset)
    np.testing.assert_array_equal(halves[7], stream[7]["targets"][:2])


def test_a_batch_larger_than_the_data_is_refused(numbered):
    with pytest.raises(ValueError, match=r"data\.batch is 24, but digits has only 23 training examples"):
        data.batches(numbered, DigitsConfig(batch=24), 0)

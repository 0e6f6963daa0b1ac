"""The data sets themselves: sizes, scaling, splits; those with files are tried where the files are."""

import os

import numpy as np
import pytest

from precision_lab import data
from precision_lab.data import ArraySplit, ContextSplit, TextSplit
from precision_lab.data.text import markov_text

needs_files = pytest.mark.skipif(
    not os.environ.get("PRECISION_LAB_DATA"), reason="PRECISION_LAB_DATA names no folder with the data files"
)
SIZES = {
    "digits": (data.DigitsConfig(), 1437, 360),
    "fashion_mnist": (data.FashionMnistConfig(), 60000, 10000),
    "mnist": (data.MnistConfig(), 60000, 10000),
    "cifar10_subset": (data.Cifar10Config(subset=True), 10000, 2000),
}


@pytest.mark.parametrize("name", [n if n == "digits" else pytest.param(n, marks=needs_files) for n in SIZES])
def test_images_are_standardised_and_split_as_documented(name):
    config, train, test = SIZES[name]

    dataset = data.load(config)

    assert (len(dataset.train), len(dataset.eval), len(dataset.eval_train)) == (train, test, train)
    assert dataset.spec == config.spec()
    batch = dataset.train.take(np.arange(train))
    assert batch["inputs"].shape == (train, *dataset.spec.input_shape)
    assert batch["inputs"].dtype == np.float32
    assert batch["targets"].dtype == np.int32
    assert sorted(np.unique(batch["targets"])) == list(range(10))
    np.testing.assert_allclose(batch["inputs"].mean((0, 1, 2), np.float64), 0, atol=1e-6)
    np.testing.assert_allclose(batch["inputs"].std((0, 1, 2), np.float64), 1, atol=1e-6)


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    from precision_lab.data.images import _digits

    theirs = load_digits()
    images, labels = _digits()

    np.testing.assert_array_equal(images, theirs.images)
    np.testing.assert_array_equal(labels, theirs.target)


def test_the_split_of_digits_is_stratified_and_has_no_overlap():
    dataset = data.load(data.DigitsConfig())
    train, test = (split.take(np.arange(len(split))) for split in (dataset.train, dataset.eval))

    share = np.bincount(test["targets"]) / (np.bincount(test["targets"]) + np.bincount(train["targets"]))
    rows = {split["inputs"][i].tobytes() for split in (train, test) for i in range(len(split["inputs"]))}

    np.testing.assert_allclose(share, 0.2, atol=1 / 150)
    assert len(rows) == 1797
    assert np.any(np.diff(train["targets"]) < 0)


def test_arrays_cannot_be_written_to():
    dataset = data.load(data.DigitsConfig())

    with pytest.raises(ValueError, match="read-only"):
        dataset.train.inputs[0] = 0


@needs_files
def test_tinyshakespeare_is_split_nine_to_one():
    dataset = data.load(data.TinyShakespeareConfig(seq_len=128))

    assert len(dataset.train) == 1115394 * 9 // 10 - 128
    assert len(dataset.eval) == (1115394 - 1115394 * 9 // 10 - 1) // 128
    batch = dataset.eval.take(np.arange(3))
    assert batch["inputs"].shape == batch["targets"].shape == (3, 128)
    assert batch["inputs"].dtype == np.int32
    assert batch["inputs"].max() < dataset.spec.num_classes == 65


def test_targets_of_text_are_the_inputs_moved_by_one():
    split = TextSplit(np.arange(10, dtype=np.uint8), seq_len=4)

    batch = split.take(np.array([0, 5]))

    assert len(split) == 6
    assert batch["inputs"].tolist() == [[0, 1, 2, 3], [5, 6, 7, 8]]
    assert batch["targets"].tolist() == [[1, 2, 3, 4], [6, 7, 8, 9]]


@pytest.mark.parametrize(("tokens", "windows"), [(5, 1), (8, 1), (9, 2), (12, 2), (13, 3)])
def test_evaluation_windows_do_not_overlap(tokens, windows):
    split = TextSplit(np.arange(tokens, dtype=np.uint8), seq_len=4, stride=4)

    targets = split.take(np.arange(len(split)))["targets"].ravel()

    assert len(split) == windows
    assert targets.tolist() == list(range(1, 4 * windows + 1))


def test_bad_splits_are_refused():
    with pytest.raises(ValueError, match="3 inputs but 2 targets"):
        ArraySplit(np.zeros((3, 1)), np.zeros(2))
    with pytest.raises(ValueError, match="no window of 4"):
        TextSplit(np.zeros(4, np.uint8), seq_len=4)


def test_contexts_are_followed_by_their_next_token_and_spread_evenly():
    tokens = np.arange(103, dtype=np.uint8)

    every, some = ContextSplit(tokens, 3), ContextSplit(tokens, 3, 10)

    assert (len(every), len(some)) == (100, 10)
    batch = some.take(np.arange(10))
    np.testing.assert_array_equal(batch["targets"], np.arange(10) * 10 + 3)
    np.testing.assert_array_equal(batch["inputs"], np.arange(10)[:, None] * 10 + np.arange(3))
    assert every.take(np.array([99]))["targets"].tolist() == [102]
    assert (batch["inputs"].dtype, batch["targets"].dtype) == (np.int32, np.int32)
    with pytest.raises(ValueError, match="has 100 contexts, not 101"):
        ContextSplit(tokens, 3, 101)
    with pytest.raises(ValueError, match="no context of 3 and a next token"):
        ContextSplit(tokens[:3], 3)


def test_the_markov_text_follows_its_odds_and_is_better_predicted_from_three_symbols_than_from_two():
    text = data.load(data.NextCharConfig(source="markov")).train.tokens

    def entropy(order):
        """Nats of the next symbol given `order` before it, of the pairs that were seen in the first half."""
        context = sum(text[i : len(text) - order + i].astype(np.int64) * 65**i for i in range(order))
        joint = np.unique(context * 65 + text[order:], return_counts=True)[1]
        alone = np.unique(context, return_counts=True)[1]
        shares, given = joint / joint.sum(), alone / alone.sum()
        return -(shares * np.log(shares)).sum() + (given * np.log(given)).sum()

    assert text.min() == 0
    assert text.max() == 64
    assert entropy(0) > 3.5
    assert entropy(1) < entropy(0) - 0.2
    assert entropy(2) < entropy(1) - 0.2


def test_the_markov_text_is_the_same_everywhere():
    """The first of 64 chains, drawn in plain integers; with 2 symbols it stood still, and any order would do."""
    raw, symbols = np.random.Philox(key=[11, 1]), 11
    odds = [[[int(n) % 4 for n in raw.random_raw(symbols)] for _ in range(8)] for _ in range(3)]
    draws = [int(n) for n in raw.random_raw(4112 * 64)]
    chain = [0, 0, 0]
    for step in range(200):
        weights = [4 ** sum(odds[back][chain[step + back] % 8][s] for back in range(3)) for s in range(symbols)]
        drawn = draws[step * 64] % sum(weights)
        chain.append(next(s for s in range(symbols) if drawn < sum(weights[: s + 1])))

    assert markov_text(symbols)[:184].tolist() == chain[19:]
    assert len(set(chain)) == symbols


def test_contexts_of_the_markov_text_are_split_nine_to_one_and_evaluated_alike():
    dataset = data.load(data.NextCharConfig(source="markov", context=16))

    assert len(dataset.train) == 64 * 4096 * 9 // 10 - 16
    assert (len(dataset.eval_train), len(dataset.eval)) == (8192, 8192)
    np.testing.assert_array_equal(np.concatenate([dataset.train.tokens, dataset.eval.tokens]), markov_text(65))


def test_a_substitution_renames_every_symbol_and_nothing_else():
    plain, renamed = (
        data.load(data.NextCharConfig(source="markov", substitution=number)).train.tokens for number in (None, 3)
    )

    pairs = np.unique(np.stack([plain, renamed]), axis=1)

    assert pairs.shape == (2, 65)
    assert len(set(pairs[1])) == 65
    assert (pairs[0] != pairs[1]).mean() > 0.9


@needs_files
def test_shakespeare_by_contexts_is_the_text_itself():
    text = data.load(data.TinyShakespeareConfig()).train.tokens

    dataset = data.load(data.NextCharConfig())

    np.testing.assert_array_equal(dataset.train.tokens, text)
    assert (len(dataset.eval), len(dataset.eval_train)) == (8192, 8192)

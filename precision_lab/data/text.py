"""Text data sets, by characters."""

import numpy as np

from precision_lab.data.config import NextCharConfig, TinyShakespeareConfig
from precision_lab.data.dataset import ContextSplit, Dataset, TextSplit
from precision_lab.data.files import DataFile, find

_SHAKESPEARE = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_FILE = DataFile(
    "text/tinyshakespeare.txt",
    (_SHAKESPEARE,),
    (("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt", _SHAKESPEARE),),
)

_EVALUATED = 8192
_GROUPS = 8
_MARKOV, _SUBSTITUTION = 1, 2  # streams of random numbers


def load_tinyshakespeare(config: TinyShakespeareConfig) -> Dataset:
    """Returns the text by characters: the first 90 % to train on, the rest to test.

    A token is the rank of a character among the 65 that occur. Training draws windows from every position;
    evaluation takes windows that do not overlap, in order.
    """
    train, held_out = _cut(_shakespeare())
    length = config.seq_len
    return Dataset(
        spec=config.spec(),
        train=TextSplit(train, length),
        eval_train=TextSplit(train, length, stride=length),
        eval=TextSplit(held_out, length, stride=length),
    )


def load_next_char(config: NextCharConfig) -> Dataset:
    """Returns a text as contexts with their next character: the first 90 % to train on, the rest to test.

    Training draws contexts from every position; evaluation takes `_EVALUATED` of each split, spread evenly.
    """
    tokens = _shakespeare() if config.source == "tinyshakespeare" else markov_text(config.spec().num_classes)
    if config.substitution is not None:
        order = np.random.Philox(key=[config.substitution, _SUBSTITUTION]).random_raw(config.spec().num_classes)
        tokens = np.argsort(order, kind="stable").astype(np.uint8)[tokens]
    train, held_out = _cut(tokens)
    return Dataset(
        spec=config.spec(),
        train=ContextSplit(train, config.context),
        eval_train=ContextSplit(train, config.context, _EVALUATED),
        eval=ContextSplit(held_out, config.context, _EVALUATED),
    )


def markov_text(symbols: int) -> np.ndarray:
    """Returns uint8 (262144,), a text in which each symbol depends on the three before it; always the same.

    The odds of a symbol are 4 to the power of the sum of three small integers, one drawn for each pair of it and the
    group of one of the three: a small network can learn them, and integers alone make the text equal on every machine.
    A symbol's group is its remainder by 8. The text is 64 chains one after the other, each warmed up before it counts.
    """
    chains, length, warmup = 64, 4096, 16
    raw = np.random.Philox(key=[symbols, _MARKOV])
    tables = (raw.random_raw(3 * _GROUPS * symbols) % 4).astype(np.int64).reshape(3, _GROUPS, symbols)
    draws = raw.random_raw((length + warmup) * chains).reshape(length + warmup, chains)
    text = np.zeros((3 + length + warmup, chains), np.int64)
    for step, draw in enumerate(draws):
        power = sum(tables[back, text[step + back] % _GROUPS] for back in range(3))
        total = np.cumsum(np.int64(4) ** power, axis=1)
        chosen = (draw % total[:, -1].astype(np.uint64)).astype(np.int64)
        text[step + 3] = np.argmax(total > chosen[:, None], axis=1)
    return text[3 + warmup :].T.reshape(-1).astype(np.uint8)


def _shakespeare() -> np.ndarray:
    """Returns tinyshakespeare as the rank of each character among the 65 that occur, uint8."""
    text = np.frombuffer(find(SHAKESPEARE_FILE).read_bytes(), np.uint8)
    return np.unique(text, return_inverse=True)[1].astype(np.uint8)


def _cut(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first 90 % of a text and the rest."""
    cut = len(tokens) * 9 // 10
    return tokens[:cut], tokens[cut:]

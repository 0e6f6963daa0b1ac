"""Text data sets, by characters."""

import numpy as np

from precision_lab.data.config import TinyShakespeareConfig
from precision_lab.data.dataset import Dataset, TextSplit
from precision_lab.data.files import DataFile, find

_SHAKESPEARE = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE_FILE = DataFile(
    "text/tinyshakespeare.txt",
    (_SHAKESPEARE,),
    (("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt", _SHAKESPEARE),),
)


def load_tinyshakespeare(config: TinyShakespeareConfig) -> Dataset:
    """Returns the text by characters: the first 90 % to train on, the rest to test.

    A token is the rank of a character among the 65 that occur. Training draws windows from every position;
    evaluation takes windows that do not overlap, in order.
    """
    text = np.frombuffer(find(SHAKESPEARE_FILE).read_bytes(), np.uint8)
    tokens = np.unique(text, return_inverse=True)[1].astype(np.uint8)
    cut = len(tokens) * 9 // 10
    train, held_out = tokens[:cut], tokens[cut:]
    length = config.seq_len
    return Dataset(
        spec=config.spec(),
        train=TextSplit(train, length),
        eval_train=TextSplit(train, length, stride=length),
        eval=TextSplit(held_out, length, stride=length),
    )

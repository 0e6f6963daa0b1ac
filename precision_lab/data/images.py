"""Image data sets.

Images are (height, width, channels) in float32, standardised: each channel minus its mean and divided by its standard
deviation, both over all pixels of the training split. Classes are int32.
"""

import gzip
import importlib.util
import io
import pickle
import tarfile
from pathlib import Path

import numpy as np

from precision_lab.data.config import Cifar10Config, DigitsConfig, FashionMnistConfig, MnistConfig
from precision_lab.data.dataset import ArraySplit, Dataset
from precision_lab.data.files import DataError, DataFile, data_dir, find
from precision_lab.models.config import DataSpec

_FASHION = {
    "train-images-idx3-ubyte.gz": "3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84",
    "train-labels-idx1-ubyte.gz": "a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845",
    "t10k-images-idx3-ubyte.gz": "346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073",
    "t10k-labels-idx1-ubyte.gz": "67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5",
}
_FASHION_HOSTS = (
    "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
)
FASHION_FILES = tuple(
    DataFile(f"fashion-mnist/{name}", (sha,), tuple((host + name, sha) for host in _FASHION_HOSTS))
    for name, sha in _FASHION.items()
)
_KERAS_MNIST = "731c5ac602752760c8e48fbffcf8c3b850d9dc2a2aedcf2cc48468fc17b673d1"
MNIST_FILE = DataFile(
    "mnist.npz",
    # The second holds the same four arrays, compressed differently.
    (_KERAS_MNIST, "06af5dfe73b70e3bc1c36439982b18a8d76803db9b544f6fdf838a37fbb01b64"),
    (("https://storage.googleapis.com/tensorflow/tf-keras-datasets/mnist.npz", _KERAS_MNIST),),
)
_CIFAR = "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce"
CIFAR_FILE = DataFile(
    "cifar-10-python.tar.gz", (_CIFAR,), (("https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz", _CIFAR),)
)
CIFAR_SUBSET_FILE = DataFile(
    "cifar10_subset.npz", ("5c2f3e236d3f15af9ffb0adab8b9e15dcfbd3ad735335ddb7af086798bdd3cb3",)
)
_DIGITS_TEST_SHARE = 5


def load_digits(config: DigitsConfig) -> Dataset:
    """Returns scikit-learn's digits, split once and for all into 1437 to train on and 360 to test.

    The split is stratified: after a fixed shuffle every fifth example of the list sorted by class is held out, so
    each class gives a fifth of its examples, give or take one. It does not depend on the run's seed.
    """
    images, labels = _digits()
    order = np.argsort(np.random.Philox(key=0).random_raw(len(labels)), kind="stable")
    images, labels = images[order], labels[order]
    held_out = np.zeros(len(labels), bool)
    held_out[np.argsort(labels, kind="stable")[::_DIGITS_TEST_SHARE]] = True
    train, test = ~held_out, held_out
    return _image_dataset(config.spec(), (images[train], labels[train]), (images[test], labels[test]))


def load_fashion_mnist(config: FashionMnistConfig) -> Dataset:
    """Returns Fashion-MNIST with its own split, 60000 and 10000."""
    arrays = [read_idx(find(file)) for file in FASHION_FILES]
    return _image_dataset(config.spec(), (arrays[0], arrays[1]), (arrays[2], arrays[3]))


def load_mnist(config: MnistConfig) -> Dataset:
    """Returns MNIST with its own split, 60000 and 10000."""
    return _image_dataset(config.spec(), *read_npz(find(MNIST_FILE)))


def load_cifar10(config: Cifar10Config) -> Dataset:
    """Returns CIFAR-10 with its own split, 50000 and 10000, or the subset of 10000 and 2000."""
    pairs = read_npz(find(CIFAR_SUBSET_FILE)) if config.subset else read_cifar10(_find_cifar10())
    return _image_dataset(config.spec(), *pairs)


def _find_cifar10() -> Path:
    """Returns where the original file is; says so if only the subset is there."""
    try:
        return find(CIFAR_FILE)
    except DataError as error:
        folder = data_dir()
        if folder is None or not (folder / CIFAR_SUBSET_FILE.name).is_file():
            raise
        there = f"'{CIFAR_SUBSET_FILE.name}' is there: set data.subset to true to train on it."
        raise DataError(f"{there} Otherwise: {error}") from None


Pair = tuple[np.ndarray, np.ndarray]


def read_idx(path: Path) -> np.ndarray:
    """Returns the uint8 array in a gzipped idx file: magic number, big-endian sizes, bytes."""
    data = gzip.decompress(path.read_bytes())
    axes = data[3]
    shape = np.frombuffer(data, ">u4", count=axes, offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape)


def read_npz(path: Path) -> tuple[Pair, Pair]:
    """Returns (images, labels) for training and for testing from an npz file with Keras' names."""
    with np.load(path, allow_pickle=False) as arrays:
        return (arrays["x_train"], arrays["y_train"]), (arrays["x_test"], arrays["y_test"])


def read_cifar10(path: Path) -> tuple[Pair, Pair]:
    """Returns (images, labels) for training and for testing from the original tar of pickles.

    Only to be called on a file whose checksum is known, because a pickle can run code.
    """
    batches = [f"data_batch_{i}" for i in range(1, 6)]
    with tarfile.open(path, "r:gz") as tar:
        parts = [_cifar10_part(tar, name) for name in (*batches, "test_batch")]
    train = np.concatenate([x for x, _ in parts[:-1]]), np.concatenate([y for _, y in parts[:-1]])
    return train, parts[-1]


def _cifar10_part(tar: tarfile.TarFile, name: str) -> Pair:
    """Returns one pickle's images (n, 32, 32, 3) and labels (n,)."""
    stream = tar.extractfile(f"cifar-10-batches-py/{name}")
    assert stream is not None, name
    part = pickle.load(stream, encoding="bytes")
    return part[b"data"].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), np.asarray(part[b"labels"])


def _digits() -> Pair:
    """Returns the images (1797, 8, 8) in uint8, 0 to 16, and the labels.

    Read from the file inside the installed scikit-learn: importing scikit-learn for it takes seconds.
    """
    spec = importlib.util.find_spec("sklearn")
    folder = Path(spec.origin).parent if spec is not None and spec.origin else Path()
    path = folder / "datasets" / "data" / "digits.csv.gz"
    if path.is_file():
        table = np.loadtxt(io.BytesIO(gzip.decompress(path.read_bytes())), delimiter=",", dtype=np.uint8)
        return table[:, :-1].reshape(-1, 8, 8), table[:, -1]
    from sklearn.datasets import load_digits as bundled

    rows, labels = bundled(return_X_y=True)
    return np.asarray(rows, np.uint8).reshape(-1, 8, 8), np.asarray(labels)


def _image_dataset(spec: DataSpec, train: Pair, test: Pair) -> Dataset:
    """Returns the data set of two pairs of uint8 images and labels."""
    table = _standardising_table(train[0].reshape(-1, spec.input_shape[-1]))
    training, held_out = (
        ArraySplit(_look_up(table, images.reshape(-1, *spec.input_shape)), labels.astype(np.int32))
        for images, labels in (train, test)
    )
    return Dataset(spec, training, training, held_out)


def _standardising_table(pixels: np.ndarray) -> np.ndarray:
    """Returns float32 (channels, 256): what each pixel value becomes, from uint8 `pixels` (n, channels)."""
    values = np.arange(256, dtype=np.float64)
    rows = []
    for channel in pixels.T:
        share = np.bincount(channel, minlength=256) / channel.size
        mean = share @ values
        rows.append((values - mean) / np.sqrt(share @ (values - mean) ** 2))
    return np.stack(rows).astype(np.float32)


def _look_up(table: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Returns float32 images from uint8 ones (n, height, width, channels), channel by channel."""
    return np.stack([row[images[..., c]] for c, row in enumerate(table)], axis=-1)

"""Where data files are looked for, and what is said when they are missing or wrong."""

import gzip
import io
import pickle
import tarfile

import numpy as np
import pooch
import pytest

from precision_lab import data
from precision_lab.data import DataError, files, images, text
from precision_lab.data.files import DataFile, cache_dir, checksum, find

CONTENT = b"the real thing"


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """Returns (data folder, cache folder), both named in the environment."""
    pair = tmp_path / "data", tmp_path / "cache"
    for folder in pair:
        folder.mkdir()
    monkeypatch.setenv("PRECISION_LAB_DATA", str(pair[0]))
    monkeypatch.setenv("PRECISION_LAB_CACHE", str(pair[1]))
    return pair


@pytest.fixture
def no_network(monkeypatch):
    def refuse(url, **kwargs):
        raise ConnectionError(f"no route to {url}\nwith details")

    monkeypatch.setattr(pooch, "retrieve", refuse)


def known(content=CONTENT, name="some/file.bin", urls=()):
    import hashlib

    sha = hashlib.sha256(content).hexdigest()
    return DataFile(name, (sha,), tuple((url, sha) for url in urls))


def write(folder, file, content=CONTENT):
    path = folder / file.name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def test_the_users_folder_comes_before_the_cache(folders):
    file = known()
    in_cache = write(folders[1], file)
    assert find(file) == in_cache

    in_data = write(folders[0], file)
    assert find(file) == in_data


def test_a_missing_file_is_downloaded_into_the_cache_and_found_there_later(folders, tmp_path, monkeypatch):
    origin = tmp_path / "origin.bin"
    origin.write_bytes(CONTENT)
    asked = []

    def serve(url, known_hash, fname, path):
        asked.append((url, known_hash))
        if "broken" in url:
            raise ConnectionError("gone")
        return str(write(path, DataFile(fname, ())))

    monkeypatch.setattr(pooch, "retrieve", serve)
    file = known(urls=("https://broken.example/a", "https://example/b"))

    first, second = find(file), find(file)

    assert first == second == folders[1] / "some/file.bin"
    assert [url for url, _ in asked] == ["https://broken.example/a", "https://example/b"]
    assert asked[0][1] == f"sha256:{file.sha256[0]}"


@pytest.mark.parametrize("where", [0, 1], ids=["data", "cache"])
def test_a_file_with_the_wrong_checksum_is_refused_and_left_alone(folders, no_network, where):
    file = known(urls=("https://example/b",))
    path = write(folders[where], file, b"something else")

    with pytest.raises(DataError) as caught:
        find(file)

    assert str(path) in str(caught.value)
    assert file.sha256[0] in str(caught.value)
    assert checksum(path) in str(caught.value)
    assert path.read_bytes() == b"something else"


def test_any_of_several_checksums_will_do(folders):
    file = DataFile("a", ("0" * 64, known().sha256[0]))

    path = write(folders[0], file)

    assert find(file) == path


def test_what_cannot_be_had_is_explained(folders, no_network):
    file = known(urls=("https://example/b",))

    with pytest.raises(DataError) as caught:
        find(file)

    message = str(caught.value)
    assert "\n" not in message
    for part in ("'some/file.bin' not found", "https://example/b: ConnectionError no route", file.sha256[0]):
        assert part in message
    assert f"Put it at '{folders[1] / 'some/file.bin'}'" in message


def test_a_file_without_an_address_says_so(folders):
    with pytest.raises(DataError, match="no public address"):
        find(known())


def test_without_the_variable_the_message_says_that_it_is_not_set(folders, no_network, monkeypatch):
    monkeypatch.delenv("PRECISION_LAB_DATA")

    with pytest.raises(DataError, match=r"PRECISION_LAB_DATA \(not set\)"):
        find(known())


def test_a_data_variable_that_is_no_folder_is_refused(folders, monkeypatch):
    monkeypatch.setenv("PRECISION_LAB_DATA", "/no/such/folder")

    with pytest.raises(DataError, match="PRECISION_LAB_DATA is '/no/such/folder', which is not a folder"):
        find(known())


def test_the_cache_is_the_users_unless_told_otherwise(monkeypatch):
    monkeypatch.delenv("PRECISION_LAB_CACHE", raising=False)

    assert cache_dir().name == "precision_lab"


@pytest.mark.parametrize(
    "config",
    [data.FashionMnistConfig(), data.MnistConfig(), data.Cifar10Config(), data.TinyShakespeareConfig()],
    ids=lambda config: config.kind,
)
def test_every_downloadable_data_set_says_what_it_misses(folders, no_network, config):
    with pytest.raises(DataError, match=r"not found .* Download failed: https?://.* Put it at"):
        data.load(config)


def test_every_file_has_full_checksums():
    every = (*images.FASHION_FILES, images.MNIST_FILE, images.CIFAR_FILE, images.CIFAR_SUBSET_FILE)

    for file in (*every, text.SHAKESPEARE_FILE):
        assert all(len(sha) == 64 and set(sha) <= set("0123456789abcdef") for sha in file.sha256)
        assert all(sha in file.sha256 for _, sha in file.urls)


def test_idx_files_are_read(tmp_path):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    header = bytes([0, 0, 8, 3]) + np.array([2, 3, 4], ">u4").tobytes()
    (tmp_path / "x.gz").write_bytes(gzip.compress(header + array.tobytes()))

    np.testing.assert_array_equal(images.read_idx(tmp_path / "x.gz"), array)


def test_the_cifar_tar_is_read_channels_last(tmp_path):
    """The original stores a picture as all reds, all greens, all blues."""
    with tarfile.open(tmp_path / "c.tar.gz", "w:gz") as tar:
        for i, name in enumerate([*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"]):
            row = np.repeat(np.array([10 * i, 10 * i + 1, 10 * i + 2], np.uint8), 1024)
            payload = pickle.dumps({b"data": row[None], b"labels": [i]})
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(payload)
            tar.addfile(member, io.BytesIO(payload))

    (x_train, y_train), (x_test, y_test) = images.read_cifar10(tmp_path / "c.tar.gz")

    assert x_train.shape == (5, 32, 32, 3)
    assert y_train.tolist() == [0, 1, 2, 3, 4]
    assert x_test[0, 7, 9].tolist() == [50, 51, 52]
    assert y_test.tolist() == [5]


def test_module_names_are_those_of_the_documentation():
    assert files.DATA_VARIABLE == "PRECISION_LAB_DATA"
    assert issubclass(DataError, ValueError)

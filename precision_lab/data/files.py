"""Finding the files of a data set: the user's folder, then the cache, then a download, then a clear error.

Every file has known checksums and nothing else is read. A file with another checksum is refused and left as it is,
since it may be somebody's only copy.
"""

import dataclasses
import hashlib
import os
from pathlib import Path

DATA_VARIABLE = "PRECISION_LAB_DATA"
CACHE_VARIABLE = "PRECISION_LAB_CACHE"


class DataError(ValueError):
    """A data file is missing, or is not what it should be; the message says which and what to do."""


@dataclasses.dataclass(frozen=True)
class DataFile:
    """One file of a data set.

    Attributes:
      name: path relative to the data folder and to the cache alike.
      sha256: checksums to accept; several where the same content is stored in several ways.
      urls: (address, sha256 of what it serves), tried in order; empty if the file cannot be downloaded.
    """

    name: str
    sha256: tuple[str, ...]
    urls: tuple[tuple[str, str], ...] = ()


def find(file: DataFile) -> Path:
    """Returns where `file` is, after downloading it if need be.

    Looks under $PRECISION_LAB_DATA, then in the cache, then downloads to the cache.

    Raises:
      DataError: the file is nowhere and cannot be downloaded, or one was found with a wrong checksum.
    """
    for folder in filter(None, (data_dir(), cache_dir())):
        path = folder / file.name
        if path.is_file():
            _require_checksum(path, file)
            return path
    return _download(file)


def data_dir() -> Path | None:
    """Returns the folder that $PRECISION_LAB_DATA names, or None if it is not set.

    Raises:
      DataError: it is set, but is no folder.
    """
    value = os.environ.get(DATA_VARIABLE)
    if not value:
        return None
    folder = Path(value).expanduser()
    if not folder.is_dir():
        raise DataError(f"{DATA_VARIABLE} is '{value}', which is not a folder. Correct it or unset it.")
    return folder


def cache_dir() -> Path:
    """Returns the folder for downloads: $PRECISION_LAB_CACHE, or the user's cache folder; it need not exist yet."""
    value = os.environ.get(CACHE_VARIABLE)
    if value:
        return Path(value).expanduser()
    import pooch

    return Path(pooch.os_cache("precision_lab"))


def checksum(path: Path) -> str:
    """Returns the sha256 of a file, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _require_checksum(path: Path, file: DataFile) -> None:
    """Raises DataError unless the file at `path` is one of those expected."""
    got = checksum(path)
    if got not in file.sha256:
        expected = " or ".join(file.sha256)
        raise DataError(
            f"'{path}' has the wrong checksum: expected sha256 {expected}, got {got}. "
            "It was left as it is; replace it with the original, or move it away to have it downloaded."
        )


def _download(file: DataFile) -> Path:
    """Returns the path of `file` in the cache after downloading it there."""
    failures = []
    for url, sha256 in file.urls:
        try:
            return _retrieve(url, sha256, cache_dir() / file.name)
        except Exception as error:  # pooch passes on whatever the transport raises
            failures.append(f"{url}: {_first_line(error)}")
    raise DataError(_missing(file, failures))


def _retrieve(url: str, sha256: str, target: Path) -> Path:
    """Downloads to a temporary name, checks, and moves into place."""
    import pooch

    path = pooch.retrieve(url, known_hash=f"sha256:{sha256}", fname=target.name, path=target.parent)
    return Path(path)


def _missing(file: DataFile, failures: list[str]) -> str:
    """Returns what to say when `file` is nowhere to be had."""
    folder = data_dir()
    looked = f"in {DATA_VARIABLE}={folder}" if folder else f"in {DATA_VARIABLE} (not set)"
    tried = (
        f" Download failed: {'; '.join(failures)}." if failures else " It has no public address to download it from."
    )
    return (
        f"data file '{file.name}' not found {looked} or in the cache.{tried} "
        f"Put it at '{cache_dir() / file.name}', or set {DATA_VARIABLE} to the folder that holds '{file.name}'. "
        f"Expected sha256: {' or '.join(file.sha256)}."
    )


def _first_line(error: Exception) -> str:
    """Returns the kind of an error and the first line of its text, shortened."""
    text = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__} {text if len(text) <= 100 else text[:97] + '...'}".strip()

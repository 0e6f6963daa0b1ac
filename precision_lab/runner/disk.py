"""Full disks: recognised whoever reports them, and said with what to free."""

import errno
import shutil
from pathlib import Path

_FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}
_WORDS = ("No space left on device", "Disk quota exceeded")


class DiskFullError(OSError):
    """There is no room for results; the message says where to make some."""


def is_disk_full(error: BaseException | None) -> bool:
    """Returns whether an error, or one that led to it, is that of a full disk; Orbax hands on only the words."""
    while error is not None:
        if (isinstance(error, OSError) and error.errno in _FULL) or any(words in str(error) for words in _WORDS):
            return True
        error = error.__cause__ or error.__context__
    return False


def disk_full(folder: Path) -> DiskFullError:
    """Returns the error that says what to free, and how much there is of it."""
    existing = next((path for path in (folder, *folder.parents) if path.exists()), Path())
    free_mb = shutil.disk_usage(existing).free / 1e6
    saved_mb = sum(path.stat().st_size for path in folder.glob("*/checkpoints/**/*") if path.is_file()) / 1e6
    return DiskFullError(
        f"no space left for {folder} ({free_mb:.1f} MB free). Free some, such as checkpoints/ of runs that are done "
        f"(all checkpoints there take {saved_mb:.1f} MB); the same command then continues from the last checkpoint."
    )

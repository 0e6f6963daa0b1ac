"""Files that are either the old one or the new one, never half of one."""

import json
import os
import threading
from pathlib import Path
from typing import Any

TEMPORARY = ".*.tmp"
"""Names of what a kill in the middle of a write leaves behind."""


def write_text(path: Path, text: str) -> None:
    """Replaces a file by `text`, through a temporary file in the same folder.

    A kill at any moment leaves the old content or the new; a failure (a full disk, say) leaves no temporary file.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def overwrite(path: Path, text: str) -> None:
    """Writes over a file in one call, padded with spaces to its old length: needs no room, and is all but atomic."""
    content = text.encode().ljust(path.stat().st_size)
    with path.open("r+b", buffering=0) as file:
        file.write(content)


def write_json(path: Path, value: Any) -> None:
    """Replaces a file by indented JSON; NaN and infinities must have been encoded."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """Returns indented JSON; NaN and infinities must have been encoded."""
    return json.dumps(value, indent=2, allow_nan=False, ensure_ascii=False) + "\n"


def read_json(path: Path) -> Any:
    """Returns the content of a JSON file.

    Raises:
      ValueError: the file is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error}).") from None

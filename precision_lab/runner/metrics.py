"""The record of a run: `metrics.jsonl`, one JSON object per line, appended while the run goes on.

It is the only truth about a run; every table, plot and verdict is computed from it. Each row has `step`, `split`,
`attempt` and numbers. JSON has no NaN and no infinity, so these are written as the strings "nan", "inf" and "-inf".
"""

import json
import math
import numbers
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from precision_lab.runner.atomic import write_text
from precision_lab.runner.clock import StepClock

_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_LABELS = frozenset({"step", "split", "attempt"})


def encode_number(value: Any) -> Any:
    """Returns an int, a float or text for JSON; a scalar array counts as its number."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    number = float(value)
    return number if math.isfinite(number) else {math.inf: "inf", -math.inf: "-inf"}.get(number, "nan")


def decode_number(value: Any) -> Any:
    """Returns what `encode_number` was given."""
    return _NON_FINITE.get(value, value) if isinstance(value, str) else value


def encode_row(row: Mapping[str, object]) -> str:
    """Returns one line of JSON, without its newline."""
    encoded = {key: value if key == "split" else encode_number(value) for key, value in row.items()}
    return json.dumps(encoded, allow_nan=False, separators=(",", ":"))


def _decode_row(line: bytes) -> dict[str, Any] | None:
    """Returns the row on a line, None if the line is torn."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return {key: decode_number(value) for key, value in row.items()} if isinstance(row, dict) else None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Returns the rows of a metrics file, last one wins for each (step, split), in order of step.

    A missing file has no rows. A torn last line, which a killed process leaves behind, is passed over.

    Raises:
      ValueError: a line before the last one is not a row.
    """
    rows: dict[tuple[int, str], dict[str, Any]] = {}
    for number, line, last in _lines(path):
        row = _decode_row(line)
        if row is None or "step" not in row or "split" not in row:
            if last:
                break
            raise ValueError(f"{path}:{number}: not a metrics row: {line[:60]!r}. Restore the file or delete the run.")
        rows[int(row["step"]), str(row["split"])] = row
    return sorted(rows.values(), key=lambda row: int(row["step"]))


def _lines(path: Path) -> Iterator[tuple[int, bytes, bool]]:
    """Yields the number and the text of each line, and whether it is the last one."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        yield number, line, number == len(lines)


@dataclass(frozen=True)
class Series:
    """One metric of one run over its steps."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)

    def reduce(self, how: str) -> float:
        """Returns the last, mean, maximum or minimum value; NaN anywhere gives NaN for the latter three.

        Raises:
          ValueError: the series is empty.
        """
        if not self.values:
            raise ValueError("the metric was never logged.")
        if how == "last":
            return self.values[-1]
        with np.errstate(invalid="ignore"):
            return float({"mean": np.mean, "max": np.max, "min": np.min}[how](self.values))

    def at(self, step: int) -> float | None:
        """Returns the value of a step, None if it was not logged then."""
        return self.values[self.steps.index(step)] if step in self.steps else None


def series(rows: list[dict[str, Any]]) -> dict[str, Series]:
    """Returns every metric of a run by its name, `split/metric`, in order of step."""
    result: dict[str, Series] = {}
    for row in rows:
        for key, value in row.items():
            if key not in _LABELS and isinstance(value, int | float):
                one = result.setdefault(f"{row['split']}/{key}", Series())
                one.steps.append(int(row["step"]))
                one.values.append(float(value))
    return result


class JsonlSink:
    """Appends rows to `metrics.jsonl`; what `training.train` calls a MetricSink.

    Opening repairs a torn last line. `restart(step)` drops what a killed attempt logged past its last checkpoint,
    so that after any number of kills there is one row for each step and split. Nothing is buffered here: a row that a
    full disk does not take is torn in the file, and not written again when the file is closed.
    """

    def __init__(self, path: Path, attempt: int) -> None:
        """Opens the file for appending, and creates it where there is none."""
        self.path = path
        self.attempt = attempt
        self._clock = StepClock(path.parent)
        _repair(path)
        self._file = path.open("ab", buffering=0)

    def restart(self, step: int) -> None:
        """Drops every row past `step`."""
        self._clock.restart(step)
        keep = [row for row in read_rows(self.path) if int(row["step"]) <= step]
        self._file.close()
        write_text(self.path, "".join(encode_row(row) + "\n" for row in keep))
        self._file = self.path.open("ab", buffering=0)

    def write(self, row: Mapping[str, object]) -> None:
        """Appends one row, and hands it to the operating system at once."""
        if isinstance(step := row.get("step"), int):
            self._clock.note(step)
        left = (encode_row({**row, "attempt": self.attempt}) + "\n").encode()
        while left:
            left = left[self._file.write(left) :]

    def close(self) -> None:
        """Has everything on the disk, and closes."""
        if not self._file.closed:
            try:
                os.fsync(self._file.fileno())
            finally:
                self._file.close()

    def __enter__(self) -> "JsonlSink":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _repair(path: Path) -> None:
    """Removes a last line that is not a whole row, and ends a whole one that lacks its newline."""
    content = path.read_bytes() if path.exists() else b""
    if not content or (content.endswith(b"\n") and _decode_row(content.splitlines()[-1]) is not None):
        return
    head, newline, tail = content.rstrip(b"\n").rpartition(b"\n")
    whole = _decode_row(tail)
    repaired = head + newline + (tail + b"\n" if whole is not None and "step" in whole else b"")
    write_text(path, repaired.decode("utf-8"))

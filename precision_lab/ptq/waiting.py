"""A progress bar for what takes longer than people like to wait without one."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")
_AFTER_S = 2.0


def with_bar(items: Iterable[Item], total: int, label: str) -> Iterator[Item]:
    """Yields `items`; once that has taken two seconds, a bar on a terminal or in Jupyter shows how far it is."""
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    begun, shown = time.monotonic(), False
    bar = Progress(*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn(), transient=True)
    task = bar.add_task(label, total=total)
    seen = bar.console.is_terminal or bar.console.is_jupyter
    try:
        for item in items:
            if seen and not shown and time.monotonic() - begun > _AFTER_S:
                bar.start()
                shown = True
            yield item
            bar.advance(task)
    finally:
        if shown:
            bar.stop()

"""Whether a run that another machine executes still goes on: its notes change, by this process's own clock.

Locks of another machine cannot be seen on many file servers, and the clocks of two machines may differ by minutes. So
nothing that one machine wrote about time is compared with what another one reads: a run counts as gone once this
process has seen the same note for long enough.
"""

import time
from pathlib import Path
from typing import Any

HEARTBEAT_S = 30.0
"""Seconds between two notes in `status.json` that the run is still going on."""

GONE_AFTER_S = 5 * HEARTBEAT_S
"""After seeing the same note for so long, a run of another machine counts as stopped."""

_seen: dict[Path, tuple[Any, float]] = {}


def unchanged_s(run: Path, note: Any) -> float:
    """Returns for how many seconds this process has known the note of a run; 0 when it is new."""
    now = _now()
    known, since = _seen.get(run, (None, now))
    since = since if known == note else now
    _seen[run] = note, since
    return now - since


def _now() -> float:
    return time.monotonic()

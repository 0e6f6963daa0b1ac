"""What processes that train together tell one another; in a single process nothing."""

from collections.abc import Callable
from typing import Any

import numpy as np

_NAME_BYTES = 256
_state: dict[str, bool] = {"together": False}


def begin() -> None:
    """Notes that there are several processes from now on, if there are."""
    import jax

    _state["together"] = jax.process_count() > 1


def leads() -> bool:
    """Returns whether this process is the first, or the only one."""
    if not _state["together"]:
        return True
    import jax

    return jax.process_index() == 0


def announce(name: str) -> None:
    """Tells the other processes which run is trained next; nothing ends the announcements."""
    if _state["together"]:
        _broadcast(np.frombuffer(name.encode().ljust(_NAME_BYTES, b"\0"), np.uint8))


def heard() -> str:
    """Returns the run that the first process announces next."""
    return bytes(_broadcast(np.zeros(_NAME_BYTES, np.uint8))).rstrip(b"\0").decode()


def agreed(should_stop: Callable[[], bool]) -> Callable[[], bool]:
    """Returns a function of which every process gets the value in the first one."""
    if not _state["together"]:
        return should_stop
    return lambda: bool(_broadcast(np.asarray(should_stop(), np.int32)))


def _broadcast(value: np.ndarray) -> Any:
    """Returns the value that the first process has."""
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.broadcast_one_to_all(value))

"""Results that are kept, and made only once even if several threads ask for them at the same time."""

import functools
import threading
from collections.abc import Callable
from typing import Any


def once(maxsize: int) -> Callable[[Callable[..., Any]], Any]:
    """Returns a decorator like `functools.lru_cache`, under which threads wait for the one that makes a result.

    `lru_cache` lets all that find nothing make one each: runs in lockstep would compile as many programs as there are
    runs, and load their data as often.
    """

    def decorator(function: Callable[..., Any]) -> Any:
        kept, lock = functools.lru_cache(maxsize)(function), threading.RLock()

        @functools.wraps(function)
        def locked(*args: Any) -> Any:
            with lock:
                return kept(*args)

        locked.cache_clear = kept.cache_clear  # pyright: ignore[reportAttributeAccessIssue]
        return locked

    return decorator

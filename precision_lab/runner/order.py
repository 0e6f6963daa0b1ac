"""The order of runs: none is handed out before the run that it begins from has ended."""

from collections.abc import Iterator, Sequence

from precision_lab.runner.parents import parent_of
from precision_lab.runner.trial import Planned


class Order:
    """Runs that are to be made, handed out in turn; what another command holds comes last, and is waited for."""

    def __init__(self, pending: Sequence[Planned]) -> None:
        """Starts with all runs to be made."""
        self._waiting = list(pending)
        self._held: list[Planned] = []
        self._going: list[Planned] = []

    def __bool__(self) -> bool:
        """Returns whether any run has not ended."""
        return bool(self._waiting or self._held or self._going)

    def take(self) -> tuple[Planned, bool] | None:
        """Returns the next run, and whether to wait for another command that holds it; None if none may go now.

        To wait takes the place of a run, so nothing may be left then that could go on instead.
        """
        if (one := self._free(self._waiting)) is not None:
            self._waiting.remove(one)
        elif not (self._waiting and self._going) and (one := self._free(self._held)) is not None:
            self._held.remove(one)
            self._going.append(one)
            return one, True
        else:
            return None
        self._going.append(one)
        return one, not self._waiting

    def held(self, one: Planned) -> None:
        """Takes a run back that another command turned out to hold."""
        self._going.remove(one)
        self._held.append(one)

    def ended(self, one: Planned) -> None:
        """Notes that a run has ended, however it did."""
        self._going.remove(one)

    def waves(self) -> Iterator[list[Planned]]:
        """Yields lists of all runs that may go now; each is to have ended when the next is asked for."""
        while wave := self._all_free():
            self._going = wave
            yield wave
            self._going = []

    def _all_free(self) -> list[Planned]:
        free = [one for one in self._waiting if self._is_free(one)]
        self._waiting = [one for one in self._waiting if one not in free]
        return free

    def _free(self, runs: Sequence[Planned]) -> Planned | None:
        """Returns the first run that begins from none which has yet to end."""
        return next((one for one in runs if self._is_free(one)), None)

    def _is_free(self, one: Planned) -> bool:
        above = parent_of(one.run, one.config)
        return above is None or above.id not in {other.run.id for other in (*self._waiting, *self._held, *self._going)}

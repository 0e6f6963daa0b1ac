"""Where commands print: tables for people, or JSON for programs; messages never mix with either."""

import json
import sys
import threading
from typing import Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

_PIPE_WIDTH = 200
_PATIENCE_S = 2.0


def console() -> Console:
    """Returns a console on stdout; wide where no terminal gives a width, so that a pipe gets whole lines."""
    return Console() if sys.stdout.isatty() else Console(width=_PIPE_WIDTH)


def error_console() -> Console:
    """Returns a console on stderr, made when needed so that a redirected stderr is respected."""
    return Console(file=sys.stderr)


def say(message: str) -> None:
    """Prints a message of one line to stderr."""
    error_console().print(message, markup=False, highlight=False, soft_wrap=True)


def show(table: Table, data: Any, *, as_json: bool) -> None:
    """Prints a table, or the same as JSON."""
    if as_json:
        show_json(data)
    else:
        console().print(table)


def show_json(data: Any) -> None:
    """Prints plain data as JSON; numbers that are not finite must have been encoded as text."""
    typer.echo(json.dumps(data, indent=2, allow_nan=False, ensure_ascii=False))


class Bar:
    """Says on stderr what is going on, once two seconds have passed.

    On a terminal that is a progress bar, which goes when the work is done; elsewhere it is one line.
    """

    def __init__(self, total: int | None, message: str = "") -> None:
        """Starts before any of `total` units is done; None where their number is not known."""
        self._progress = Progress(console=error_console(), transient=True)
        self._task = self._progress.add_task(message, total=total)
        self._message = message
        self._shown = threading.Timer(_PATIENCE_S, self._show)

    def tell(self, message: str, units: int) -> None:
        """Notes what is being done, and that so many units are done."""
        self._progress.update(self._task, description=message, advance=units)

    def _show(self) -> None:
        """Starts the bar, or says the message where there is no terminal."""
        if self._progress.console.is_interactive:
            self._progress.start()
        elif self._message:
            say(self._message)

    def __enter__(self) -> "Bar":
        self._shown.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._shown.cancel()
        self._shown.join()
        if self._progress.live.is_started:  # Else stopping prints an empty line.
            self._progress.stop()

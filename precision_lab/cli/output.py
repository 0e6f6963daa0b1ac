"""Where commands print: tables for people, or JSON for programs; messages never mix with either."""

import json
import sys
from typing import Any

import typer
from rich.console import Console
from rich.table import Table

_PIPE_WIDTH = 200


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

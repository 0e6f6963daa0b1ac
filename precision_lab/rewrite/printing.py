"""Tables as text."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def table_text(table: Table, *, width: int) -> str:
    """Returns a rich table as plain text of at most `width` columns, the same in a terminal, a pipe and a notebook.

    Unless told otherwise, rich shows tables in a notebook as it sees fit, and writes nothing.
    """
    from rich.console import Console

    stream = io.StringIO()
    Console(file=stream, width=width, color_system=None, force_jupyter=False).print(table)
    return stream.getvalue()

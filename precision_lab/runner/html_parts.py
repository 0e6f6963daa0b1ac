"""Small pieces of HTML that the sections of a report share."""

import re
from collections.abc import Mapping
from html import escape
from typing import Any

from precision_lab.runner.summary import change_text


def breakable(name: str) -> str:
    """Returns a name that may be broken after a slash or an underscore, so that a column is as wide as its numbers."""
    return escape(name).replace("/", "/<wbr>").replace("_", "_<wbr>")


def prose(text: str) -> str:
    """Returns text with `code` as code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def figure(svg: str | None, caption: str) -> str:
    """Returns a plot with its caption, nothing without a plot."""
    return f"<figure>\n{svg}\n<figcaption>{escape(caption)}</figcaption>\n</figure>\n" if svg else ""


def changes_code(changes: Mapping[str, Any]) -> str:
    """Returns changes as code."""
    return " ".join(f"<code>{escape(change_text({key: value}))}</code>" for key, value in changes.items())

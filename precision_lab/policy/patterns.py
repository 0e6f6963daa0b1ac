"""Globs over site paths, with `**` for any number of path components."""

import functools
import re


def glob_matches(pattern: str, name: str) -> bool:
    """Returns whether the whole of `name` matches `pattern` (`*` and `?` stay within a component, `**` does not)."""
    return _compiled(pattern).fullmatch(name) is not None


@functools.lru_cache(maxsize=1024)
def _compiled(pattern: str) -> re.Pattern[str]:
    """Translates a glob: `a/**/b` also matches `a/b`, and `**/a/**` also matches `a`."""
    tokens = re.split(r"(^\*\*/|/\*\*/|/\*\*$|\*\*|\*|\?)", pattern)
    translated = {"**/": "(?:.*/)?", "/**/": "/(?:.*/)?", "/**": "(?:/.*)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.compile("".join(translated.get(token, re.escape(token)) for token in tokens))

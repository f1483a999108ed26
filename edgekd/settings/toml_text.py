"""Line numbers in TOML texts, for error messages; the standard library's parser does not keep them."""

from __future__ import annotations

import tomllib
from typing import Any


def line_of(text: str, path: tuple[str, ...]) -> int:
    """The line, counted from 1, on which the key at `path` stands; 0 if the text has no such key.

    The key stands on the first line after the longest beginning of the text that parses and lacks it.
    """
    lines = text.splitlines()
    complete = 0
    for count in range(1, len(lines) + 1):
        data = _parse("\n".join(lines[:count]))
        if data is None:
            continue
        if _has(data, path):
            return complete + 1
        complete = count
    return 0


def error_line(text: str) -> int:
    """The line, counted from 1, of the statement that is not TOML: the first after the longest beginning that parses."""
    lines = text.splitlines()
    parsing = [count for count in range(1, len(lines) + 1) if _parse("\n".join(lines[:count])) is not None]
    return min(max(parsing, default=0) + 1, max(len(lines), 1))


def _parse(text: str) -> dict[str, Any] | None:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return None


def _has(data: Any, path: tuple[str, ...]) -> bool:
    for part in path:
        if not isinstance(data, dict) or part not in data:
            return False
        data = data[part]
    return True

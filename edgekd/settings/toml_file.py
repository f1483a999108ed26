"""Tables of a TOML file as frozen records, every refusal with the line it is about: what job files are read with."""

from __future__ import annotations

import re
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from edgekd.errors import ConfigError, InputError, near_names
from edgekd.records.base import Record
from edgekd.settings.toml_text import error_line, line_of

R = TypeVar("R", bound=Record)
KeyPath = tuple[str, ...]

_PATH_IN_MESSAGE = re.compile(r"at `\$((?:\.[^`\[\].]+|\[[^\]]*\])*)`")


@dataclass(frozen=True)
class TomlText:
    """A parsed TOML text. `name` is the file's path, or what it is called in messages; `overridden` holds the key paths
    that came from `--set` and thus have no line."""

    name: str
    text: str
    data: dict[str, Any]
    error: type[InputError] = ConfigError
    overridden: frozenset[KeyPath] = field(default_factory=frozenset)

    def where(self, path: Sequence[str]) -> str:
        """`file, line 3` of a key, or of the nearest table around it; `--set a.b` when an override set it."""
        keys = tuple(path)
        while keys:
            if keys in self.overridden:
                return f"--set {'.'.join(keys)}"
            if line := line_of(self.text, keys):
                return f"{self.name}, line {line}"
            keys = keys[:-1]
        return self.name

    def problem(self, path: Sequence[str], what: str, **details: Any) -> InputError:
        """The error about the key at `path`, its place in front."""
        return self.error(f"{self.where(path)}: {what}", subject=".".join(path), **details)


def parse_toml(text: str, name: str, error: type[InputError] = ConfigError) -> TomlText:
    """The parsed text; `name` is what messages call it.

    Raises:
        error: the text is no TOML; the message tells the line.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as problem:
        raise error(f"{name}, line {error_line(text)}: this is not TOML", found=str(problem), hint="texts stand in quotes", subject=name) from problem
    return TomlText(name=name, text=text, data=data, error=error)


def load_toml(path: Path, error: type[InputError] = ConfigError) -> TomlText:
    """The parsed file.

    Raises:
        error: the file is missing, is not UTF-8 or is no TOML.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError) as problem:
        raise error(f"{path} is not a file", hint="check the path", subject=path) from problem
    except UnicodeDecodeError as problem:
        raise error(f"{path} is not UTF-8 text", found=str(problem), subject=path) from problem
    return parse_toml(text, str(path), error)


def parse_value(text: str) -> Any:
    """The value of an override as TOML reads it (`1`, `0.5`, `true`, `["a"]`); anything else is a text."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def parse_overrides(overrides: Sequence[str] | Mapping[str, Any], error: type[InputError] = ConfigError) -> dict[KeyPath, Any]:
    """Overrides as key path to value: from texts such as `runtime.threads=1`, or from a mapping of dotted names.

    Raises:
        error: a text has no `=` or an empty name.
    """
    if isinstance(overrides, Mapping):
        return {tuple(name.split(".")): value for name, value in overrides.items()}
    found: dict[KeyPath, Any] = {}
    for text in overrides:
        name, sign, value = text.partition("=")
        keys = tuple(part.strip() for part in name.split("."))
        if not sign or not all(keys):
            raise error("an override is not of the form name=value", found=text, hint="for example --set runtime.threads=1", subject=text)
        found[keys] = parse_value(value.strip())
    return found


def apply_overrides(document: TomlText, overrides: Sequence[str] | Mapping[str, Any]) -> TomlText:
    """The document with the overrides applied; tables that are missing are made. The original is untouched.

    Raises:
        InputError (of the document's class): an override is malformed, or goes through something that is no table.
    """
    parsed = parse_overrides(overrides, document.error)
    data = _copy(document.data)
    for keys, value in parsed.items():
        table = data
        for index, key in enumerate(keys[:-1]):
            table = table.setdefault(key, {})
            if not isinstance(table, dict):
                raise document.problem(keys[: index + 1], f"--set {'.'.join(keys)} goes through {key!r}, which is not a table", found=table)
        table[keys[-1]] = value
    return TomlText(document.name, document.text, data, document.error, document.overridden | frozenset(parsed))


def _copy(value: Any) -> Any:
    return {key: _copy(item) for key, item in value.items()} if isinstance(value, dict) else value


def to_record(document: TomlText, kind: type[R], path: KeyPath = (), table: Mapping[str, Any] | None = None) -> R:
    """The record in the document's table at `path` (or in `table`, if it was changed on the way).

    Raises:
        InputError (of the document's class): an unknown key, or a value of the wrong type or out of range; with the line.
    """
    if table is None:
        found: Any = document.data
        for key in path:
            found = found.get(key, {}) if isinstance(found, Mapping) else found
        if not isinstance(found, Mapping):
            raise document.problem(path, f"{'.'.join(path)!r} must be a table", found=found, hint=f"write [{'.'.join(path)}]")
        table = found
    _check_keys(document, kind, path, table)
    try:
        return msgspec.convert(dict(table), kind)
    except msgspec.ValidationError as problem:
        keys = (*path, *_error_path(str(problem)))
        value: Any = table
        for key in keys[len(path) :]:
            value = value.get(key) if isinstance(value, Mapping) else value
        reason = str(problem).split(" - at `", 1)[0]
        raise document.problem(keys, f"the value of {'.'.join(keys)!r} cannot be used", found=repr(value), allowed=reason) from problem


def _error_path(message: str) -> KeyPath:
    match = _PATH_IN_MESSAGE.search(message)
    return tuple(re.findall(r"\.([^.\[\]]+)", match.group(1))) if match else ()


def check_known(document: TomlText, path: KeyPath, table: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuse keys that are not `known`, with near names and the line."""
    for key in table:
        if key not in known:
            inside = f" in [{'.'.join(path)}]" if path else ""
            raise document.problem((*path, key), f"unknown key {key!r}{inside}", allowed=near_names(key, known))


def _check_keys(document: TomlText, kind: type[Record], path: KeyPath, table: Mapping[str, Any]) -> None:
    check_known(document, path, table, kind.__struct_fields__)
    hints = typing.get_type_hints(kind)
    for key, value in table.items():
        nested = _record_in(hints[key])
        if nested is None:
            continue
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, Mapping):
                _check_keys(document, nested, (*path, key), item)


def _record_in(hint: Any) -> type[Record] | None:
    """The record class in a type such as `X`, `X | None` or `tuple[X, ...]`."""
    if isinstance(hint, type) and not isinstance(hint, types.GenericAlias) and issubclass(hint, Record):
        return hint
    if typing.get_origin(hint) in (dict, Mapping):
        return None
    for argument in typing.get_args(hint):
        found = _record_in(argument)
        if found is not None:
            return found
    return None

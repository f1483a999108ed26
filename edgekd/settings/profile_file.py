"""Profiles on file: where they are looked for, how they are checked, and how a call overrides a field."""

from __future__ import annotations

import enum
import importlib.resources
import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import msgspec.inspect as inspect

from edgekd.errors import ProfileError, near_names
from edgekd.records import Profile
from edgekd.settings.profile_fields import OFF, FieldRow, allowed_text, describe_fields, fits, plain, struct_of
from edgekd.settings.toml_text import error_line, line_of

__all__ = ["FieldRow", "Overrides", "ProfileEntry", "describe_fields", "list_profiles", "load_profile", "override_profile"]

Overrides = Sequence[str] | Mapping[str, Any]
"""`("runtime.threads=2",)`, `{"runtime.threads": 2}` or `{"runtime": {"threads": 2}}`."""


@dataclass(frozen=True)
class ProfileEntry:
    """A profile that the search path offers. `origin` is `project` or `shipped`; `problem` says why it cannot be loaded."""

    name: str
    origin: str
    path: str
    profile: Profile | None
    problem: str = ""


@dataclass(frozen=True)
class _Origin:
    """Where values come from, for messages: a file with its text, or an override."""

    name: str
    text: str = ""

    def at(self, path: tuple[str, ...]) -> str:
        line = line_of(self.text, path) if self.text else 0
        return f"{self.name}, line {line}" if line else self.name


def load_profile(name_or_path: str | Path, overrides: Overrides = ()) -> Profile:
    """The profile of this name or at this path, with the overrides applied and every value checked.

    A text with a slash or ending in `.toml` is a path. A name is looked for in `./profiles`, then among those shipped.
    An override is a dotted key with a TOML value, for example `runtime.threads=1`; where the field takes text the
    quotes may be left out.

    Raises:
        ProfileError: no such profile, bad TOML, an unknown key, a value of the wrong type or out of range. The message
            names file, line, value, what is allowed, and near names.
    """
    if isinstance(name_or_path, Path) or "/" in name_or_path or name_or_path.endswith(".toml"):
        path = Path(name_or_path)
        return _apply(_parse(_read(path), str(path), path.stem), overrides)
    found = _search_path().get(name_or_path)
    if found is None:
        raise ProfileError(
            f"no profile is called {name_or_path!r}",
            found=name_or_path,
            allowed=near_names(name_or_path, _search_path()),
            hint="`edgekd targets` lists them; a file is given by its path, for example ./my_board.toml",
            subject=name_or_path,
        )
    _, where, text = found
    return _apply(_named(_parse(text, where, name_or_path), name_or_path, _Origin(where, text)), overrides)


def override_profile(profile: Profile, overrides: Overrides) -> Profile:
    """The profile with the overrides applied and checked, as `load_profile` does.

    Raises:
        ProfileError: an unknown key, or a value of the wrong type or out of range.
    """
    return _apply(profile, overrides)


def list_profiles() -> tuple[ProfileEntry, ...]:
    """Every profile on the search path by name; a project's profile hides a shipped one. A broken file is listed with its problem."""
    rows = []
    for name, (origin, where, text) in sorted(_search_path().items()):
        try:
            profile = _named(_parse(text, where, name), name, _Origin(where, text))
        except ProfileError as error:
            rows.append(ProfileEntry(name, origin, where, None, str(error)))
        else:
            rows.append(ProfileEntry(name, origin, where, profile))
    return tuple(rows)


# ---------------------------------------------------------------------------------------------- finding and reading


def _search_path() -> dict[str, tuple[str, str, str]]:
    """Name to (origin, path, text); the project's profiles hide the shipped ones."""
    found: dict[str, tuple[str, str, str]] = {}
    for item in importlib.resources.files("edgekd.profiles").iterdir():
        if item.name.endswith(".toml"):
            found[item.name.removesuffix(".toml")] = ("shipped", str(item), item.read_text(encoding="utf-8"))
    project = Path("profiles")
    if project.is_dir():
        for file in sorted(project.glob("*.toml")):
            hidden = found.get(file.stem)
            if hidden is None or Path(hidden[1]).resolve() != file.resolve():
                found[file.stem] = ("project", str(file), _read(file))
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ProfileError(
            f"the profile {path} does not exist", hint="check the path, or give a name that `edgekd targets` lists", subject=str(path)
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ProfileError(f"the profile {path} cannot be read", found=str(error), allowed="a TOML file in UTF-8", subject=str(path)) from error


def _parse(text: str, where: str, stem: str) -> Profile:
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ProfileError(
            f"{where}, line {error_line(text)}: this is not TOML",
            found=str(error),
            hint="texts need quotes, tables are written [runtime]; the grammar is in the README beside the shipped profiles",
            subject=where,
        ) from error
    origin = _Origin(where, text)
    values: dict[str, Any] = {"name": stem}
    missing = [key for key in ("description",) if key not in data]
    if missing:
        raise ProfileError(f"{where}: the key {missing[0]!r} is missing", allowed="one sentence on the device", hint='add description = "..."', subject=where)
    values |= plain(Profile(name=stem, description=""))
    _overlay(values, data, struct_of(Profile), (), origin)
    return _checked(values, origin)


def _named(profile: Profile, name: str, origin: _Origin) -> Profile:
    if profile.name != name:
        raise ProfileError(
            f"{origin.at(('name',))}: a profile on the search path is called like its file",
            found=profile.name,
            allowed=name,
            hint="rename the file or leave `name` out",
            subject=name,
        )
    return profile


# ---------------------------------------------------------------------------------------------- overrides


def _apply(profile: Profile, overrides: Overrides) -> Profile:
    if isinstance(overrides, str):
        overrides = (overrides,)
    values = plain(profile)
    last = _Origin("overrides")
    if isinstance(overrides, Mapping):
        for key, value in overrides.items():
            last = _Origin(f"override {key}")
            _overlay(values, _nested(tuple(key.split(".")), value), struct_of(Profile), (), last)
    else:
        for text in overrides:
            last = _Origin(f"override {text}")
            key, equals, value_text = text.partition("=")
            path = tuple(part.strip() for part in key.split("."))
            if not equals or not all(path):
                raise ProfileError(f"{last.name}: this is not a setting", found=text, allowed="key=value, for example runtime.threads=1", subject=text)
            kind = _kind_at(path, last)
            _overlay(values, _nested(path, _override_value(value_text.strip(), kind)), struct_of(Profile), (), last)
    return _checked(values, last)


def _nested(path: tuple[str, ...], value: Any) -> dict[str, Any]:
    for part in reversed(path):
        value = {part: value}
    return dict(value)


def _override_value(text: str, kind: inspect.Type) -> Any:
    """The text as a TOML value, or as it stands where the field takes text and the TOML value would not fit."""
    try:
        parsed = tomllib.loads(f"v = {text}\n")
    except tomllib.TOMLDecodeError:
        return text
    if set(parsed) != {"v"}:
        return text
    return text if isinstance(kind, inspect.StrType) and not isinstance(parsed["v"], str) else parsed["v"]


def _kind_at(path: tuple[str, ...], origin: _Origin) -> inspect.Type:
    kind: inspect.Type = struct_of(Profile)
    for depth, part in enumerate(path):
        if isinstance(kind, inspect.StructType):
            fields = {item.encode_name: item.type for item in kind.fields}
            if part not in fields:
                raise _unknown(part, path[: depth + 1], fields, origin)
            kind = fields[part]
        elif isinstance(kind, inspect.DictType):
            kind = kind.value_type
        else:
            raise ProfileError(
                f"{origin.name}: {'.'.join(path[:depth])!r} has no fields", found=".".join(path), allowed=allowed_text(kind), subject=".".join(path)
            )
    return kind


# ---------------------------------------------------------------------------------------------- checking


def _overlay(values: dict[str, Any], given: Mapping[str, Any], kind: inspect.StructType, path: tuple[str, ...], origin: _Origin) -> None:
    """Put `given` over `values`, checking every key and value on the way."""
    fields = {item.encode_name: item for item in kind.fields}
    for key, value in given.items():
        here = (*path, key)
        if key not in fields:
            raise _unknown(key, here, fields, origin)
        inner = fields[key].type
        if isinstance(inner, inspect.StructType):
            if not isinstance(value, Mapping):
                raise _wrong(here, value, f"a table with {near_names('', [item.encode_name for item in inner.fields])}", origin)
            _overlay(values[key], value, inner, here, origin)
        elif isinstance(inner, inspect.DictType):
            if not isinstance(value, Mapping):
                raise _wrong(here, value, allowed_text(inner), origin)
            for name, entry in value.items():
                values[key] = values[key] | {name: _value(entry, inner.value_type, (*here, name), origin)}
        else:
            values[key] = _value(value, inner, here, origin)


def _value(value: Any, kind: inspect.Type, path: tuple[str, ...], origin: _Origin) -> Any:
    if value == OFF and isinstance(kind, inspect.UnionType) and any(isinstance(item, inspect.NoneType) for item in kind.types):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        raise _wrong(path, value, f"{allowed_text(kind)}, finite", origin)
    if isinstance(kind, inspect.VarTupleType):
        if not isinstance(value, list | tuple):
            raise _wrong(path, value, allowed_text(kind), origin)
        return [_value(item, kind.item_type, path, origin) for item in value]
    if not fits(value, kind):
        raise _wrong(path, value, allowed_text(kind, value), origin)
    return value.value if isinstance(value, enum.Enum) else value


def _checked(values: dict[str, Any], origin: _Origin) -> Profile:
    """The profile, after the rules that concern more than one field."""
    profile = msgspec.convert(values, type=Profile, strict=True)
    if not profile.runtime.precisions or len(set(profile.runtime.precisions)) != len(profile.runtime.precisions):
        raise _wrong(("runtime", "precisions"), [item.value for item in profile.runtime.precisions], "at least one precision, each once", origin)
    if not all(fact.split() for fact in profile.proven_on):
        raise _wrong(("proven_on",), list(profile.proven_on), "a machine with instruction sets each, for example x86_64 avx512 vnni", origin)
    if not profile.identity:
        raise _wrong(("identity",), [], "at least one field of the fingerprint", origin)
    for grade in ("screen", "verdict"):
        plan = getattr(profile.measure, grade)
        for section, low, high in (((), "launches", "max_launches"), (("launch",), "warmup_min_s", "warmup_max_s"), (("launch",), "min_time_s", "max_time_s")):
            record = plan.launch if section else plan
            if getattr(record, low) > getattr(record, high):
                path = ("measure", grade, *section)
                raise _wrong((*path, low), getattr(record, low), f"at most {high} ({getattr(record, high)})", origin)
    return profile


def _unknown(key: str, path: tuple[str, ...], known: Mapping[str, Any], origin: _Origin) -> ProfileError:
    table = ".".join(path[:-1])
    return ProfileError(
        f"{origin.at(path)}: unknown key {'.'.join(path)!r}",
        found=key,
        allowed=near_names(key, known),
        hint=f"these are the keys of [{table}]" if table else "these are the keys at the top of a profile",
        subject=".".join(path),
    )


def _wrong(path: tuple[str, ...], value: Any, allowed: str, origin: _Origin) -> ProfileError:
    return ProfileError(f"{origin.at(path)}: the value of {'.'.join(path)!r} cannot be used", found=repr(value), allowed=allowed, subject=".".join(path))

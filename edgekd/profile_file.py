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
from edgekd.toml_text import error_line, line_of

OFF = "off"
"""The text that sets a field which may be absent (a limit) to nothing; TOML has no null."""

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
class FieldRow:
    """A field of a profile: its dotted key, what it takes, and its default as TOML text (empty when it must be given)."""

    key: str
    allowed: str
    default: str


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


def describe_fields() -> tuple[FieldRow, ...]:
    """Every field that a profile may set, in the order of the records; the README beside the profiles holds the same table."""
    base = _plain(Profile(name="", description=""))
    rows: list[FieldRow] = []

    def walk(kind: inspect.StructType, values: Mapping[str, Any], path: tuple[str, ...]) -> None:
        for item in kind.fields:
            here = (*path, item.encode_name)
            if isinstance(item.type, inspect.StructType):
                walk(item.type, values[item.encode_name], here)
            else:
                rows.append(FieldRow(".".join(here), _allowed(item.type), "" if item.required else _toml(values[item.encode_name])))

    walk(_struct(Profile), base, ())
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
    values |= _plain(Profile(name=stem, description=""))
    _overlay(values, data, _struct(Profile), (), origin)
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
    values = _plain(profile)
    last = _Origin("overrides")
    if isinstance(overrides, Mapping):
        for key, value in overrides.items():
            last = _Origin(f"override {key}")
            _overlay(values, _nested(tuple(key.split(".")), value), _struct(Profile), (), last)
    else:
        for text in overrides:
            last = _Origin(f"override {text}")
            key, equals, value_text = text.partition("=")
            path = tuple(part.strip() for part in key.split("."))
            if not equals or not all(path):
                raise ProfileError(f"{last.name}: this is not a setting", found=text, allowed="key=value, for example runtime.threads=1", subject=text)
            kind = _kind_at(path, last)
            _overlay(values, _nested(path, _override_value(value_text.strip(), kind)), _struct(Profile), (), last)
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
    kind: inspect.Type = _struct(Profile)
    for depth, part in enumerate(path):
        if isinstance(kind, inspect.StructType):
            fields = {item.encode_name: item.type for item in kind.fields}
            if part not in fields:
                raise _unknown(part, path[: depth + 1], fields, origin)
            kind = fields[part]
        elif isinstance(kind, inspect.DictType):
            kind = kind.value_type
        else:
            raise ProfileError(f"{origin.name}: {'.'.join(path[:depth])!r} has no fields", found=".".join(path), allowed=_allowed(kind), subject=".".join(path))
    return kind


# ---------------------------------------------------------------------------------------------- checking


def _struct(cls: type) -> inspect.StructType:
    kind = inspect.type_info(cls)
    if not isinstance(kind, inspect.StructType):
        raise TypeError(f"{cls} is not a record")
    return kind


def _plain(record: msgspec.Struct) -> dict[str, Any]:
    """The record as nested dictionaries without type tags."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: strip(item) for key, item in value.items() if key != "type"}
        return value

    return {key: strip(value) for key, value in msgspec.to_builtins(record).items() if key != "type"}


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
                raise _wrong(here, value, _allowed(inner), origin)
            for name, entry in value.items():
                values[key] = values[key] | {name: _value(entry, inner.value_type, (*here, name), origin)}
        else:
            values[key] = _value(value, inner, here, origin)


def _value(value: Any, kind: inspect.Type, path: tuple[str, ...], origin: _Origin) -> Any:
    if value == OFF and isinstance(kind, inspect.UnionType) and any(isinstance(item, inspect.NoneType) for item in kind.types):
        return None
    if isinstance(value, float) and not math.isfinite(value):
        raise _wrong(path, value, f"{_allowed(kind)}, finite", origin)
    if isinstance(kind, inspect.VarTupleType):
        if not isinstance(value, list | tuple):
            raise _wrong(path, value, _allowed(kind), origin)
        return [_value(item, kind.item_type, path, origin) for item in value]
    if not _fits(value, kind):
        raise _wrong(path, value, _allowed(kind, value), origin)
    return value.value if isinstance(value, enum.Enum) else value


def _fits(value: Any, kind: inspect.Type) -> bool:
    """Whether a TOML scalar is of this kind and within its bounds; an integer is also a float, a boolean is only a boolean."""
    if isinstance(kind, inspect.UnionType):
        return any(_fits(value, item) for item in kind.types)
    if isinstance(kind, inspect.NoneType):
        return value is None
    if isinstance(kind, inspect.BoolType):
        return isinstance(value, bool)
    if isinstance(kind, inspect.StrType):
        return isinstance(value, str) and not isinstance(value, enum.Enum)
    if isinstance(kind, inspect.EnumType):
        return value in {item.value for item in kind.cls}
    if isinstance(kind, inspect.IntType | inspect.FloatType):
        if isinstance(value, bool) or not isinstance(value, int if isinstance(kind, inspect.IntType) else (int, float)):
            return False
        return (
            (kind.ge is None or value >= kind.ge)
            and (kind.gt is None or value > kind.gt)
            and (kind.le is None or value <= kind.le)
            and (kind.lt is None or value < kind.lt)
        )
    raise TypeError(f"a profile has no fields of the kind {kind!r}")


def _checked(values: dict[str, Any], origin: _Origin) -> Profile:
    """The profile, after the rules that concern more than one field."""
    profile = msgspec.convert(values, type=Profile, strict=True)
    if not profile.runtime.precisions or len(set(profile.runtime.precisions)) != len(profile.runtime.precisions):
        raise _wrong(("runtime", "precisions"), [item.value for item in profile.runtime.precisions], "at least one precision, each once", origin)
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


def _allowed(kind: inspect.Type, value: Any = "") -> str:
    """What a field takes, in words: `integer > 0`, `one of fp16, fp32, int8`, `number from 0 to 1, or "off"`."""
    if isinstance(kind, inspect.UnionType):
        names = [_allowed(item, value) for item in kind.types if not isinstance(item, inspect.NoneType)]
        return " or ".join(names) + (f', or "{OFF}"' if len(names) < len(kind.types) else "")
    if isinstance(kind, inspect.IntType | inspect.FloatType):
        bounds = [f"{sign} {bound:g}" for sign, bound in ((">", kind.gt), (">=", kind.ge), ("<", kind.lt), ("<=", kind.le)) if bound is not None]
        return " ".join(["integer" if isinstance(kind, inspect.IntType) else "number", " and ".join(bounds)]).strip()
    if isinstance(kind, inspect.EnumType):
        return "one of " + near_names(str(value), [str(item.value) for item in kind.cls])
    if isinstance(kind, inspect.VarTupleType):
        return f"list of ({_allowed(kind.item_type, value)})"
    if isinstance(kind, inspect.DictType):
        return f"table of ({_allowed(kind.value_type, value)})"
    return {inspect.StrType: "text", inspect.BoolType: "true or false"}[type(kind)]


def _toml(value: Any) -> str:
    """A default as TOML text."""
    if value is None:
        return f'"{OFF}"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    return "{}" if isinstance(value, dict) else repr(value)

"""The fields of a profile as data: what each takes, its default, and whether a value fits."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import msgspec.inspect as inspect

from edgekd.errors import near_names
from edgekd.records import Profile

OFF = "off"
"""The text that sets a field which may be absent (a limit) to nothing; TOML has no null."""


@dataclass(frozen=True)
class FieldRow:
    """A field of a profile: its dotted key, what it takes, and its default as TOML text (empty when it must be given)."""

    key: str
    allowed: str
    default: str


def describe_fields() -> tuple[FieldRow, ...]:
    """Every field that a profile may set, in the order of the records; the README beside the profiles holds the same table."""
    base = plain(Profile(name="", description=""))
    rows: list[FieldRow] = []

    def walk(kind: inspect.StructType, values: Mapping[str, Any], path: tuple[str, ...]) -> None:
        for item in kind.fields:
            here = (*path, item.encode_name)
            if isinstance(item.type, inspect.StructType):
                walk(item.type, values[item.encode_name], here)
            else:
                rows.append(FieldRow(".".join(here), allowed_text(item.type), "" if item.required else toml_text(values[item.encode_name])))

    walk(struct_of(Profile), base, ())
    return tuple(rows)


def struct_of(cls: type) -> inspect.StructType:
    """The fields of a record with their types."""
    kind = inspect.type_info(cls)
    if not isinstance(kind, inspect.StructType):
        raise TypeError(f"{cls} is not a record")
    return kind


def plain(record: msgspec.Struct) -> dict[str, Any]:
    """The record as nested dictionaries without type tags."""

    def strip(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: strip(item) for key, item in value.items() if key != "type"}
        return value

    return {key: strip(value) for key, value in msgspec.to_builtins(record).items() if key != "type"}


def fits(value: Any, kind: inspect.Type) -> bool:
    """Whether a TOML scalar is of this kind and within its bounds; an integer is also a float, a boolean is only a boolean."""
    if isinstance(kind, inspect.UnionType):
        return any(fits(value, item) for item in kind.types)
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


def allowed_text(kind: inspect.Type, value: Any = "") -> str:
    """What a field takes, in words: `integer > 0`, `one of fp16, fp32, int8`, `number from 0 to 1, or "off"`."""
    if isinstance(kind, inspect.UnionType):
        names = [allowed_text(item, value) for item in kind.types if not isinstance(item, inspect.NoneType)]
        return " or ".join(names) + (f', or "{OFF}"' if len(names) < len(kind.types) else "")
    if isinstance(kind, inspect.IntType | inspect.FloatType):
        bounds = [f"{sign} {bound:g}" for sign, bound in ((">", kind.gt), (">=", kind.ge), ("<", kind.lt), ("<=", kind.le)) if bound is not None]
        return " ".join(["integer" if isinstance(kind, inspect.IntType) else "number", " and ".join(bounds)]).strip()
    if isinstance(kind, inspect.EnumType):
        return "one of " + near_names(str(value), [str(item.value) for item in kind.cls])
    if isinstance(kind, inspect.VarTupleType):
        return f"list of ({allowed_text(kind.item_type, value)})"
    if isinstance(kind, inspect.DictType):
        return f"table of ({allowed_text(kind.value_type, value)})"
    return {inspect.StrType: "text", inspect.BoolType: "true or false"}[type(kind)]


def toml_text(value: Any) -> str:
    """A value as TOML text."""
    if value is None:
        return f'"{OFF}"'
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, list | tuple):
        return "[" + ", ".join(toml_text(item) for item in value) + "]"
    return "{}" if isinstance(value, dict) else repr(value)

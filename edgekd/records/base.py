"""The base of everything that is saved: frozen, typed, versioned JSON with one canonical form."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from edgekd.errors import InputError
from edgekd.storage import write_atomic

R = TypeVar("R", bound="Record")


class Record(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type"):
    """A small frozen value with a versioned type tag, for example `edgekd.artifact/1`.

    Every subclass states its tag: `class Artifact(Record, tag="edgekd.artifact/1")`. Unknown fields, a foreign
    tag and values of the wrong type are refused on loading.
    """

    def to_json(self) -> bytes:
        """The canonical JSON: sorted keys, no white space."""
        return msgspec.json.encode(self, order="deterministic")

    def to_builtins(self) -> Any:
        """The record as dictionaries, lists and numbers."""
        return msgspec.to_builtins(self, order="deterministic")

    def digest(self) -> str:
        """The SHA-256 of the canonical JSON, in hexadecimal."""
        return hashlib.sha256(self.to_json()).hexdigest()

    def save(self, path: Path) -> None:
        """Write the record as indented JSON, whole or not at all."""
        write_atomic(path, msgspec.json.format(self.to_json(), indent=1) + b"\n")

    @classmethod
    def from_json(cls: type[R], data: bytes | str, *, source: str = "JSON text") -> R:
        """The record in `data`.

        Raises:
            InputError: the text is no JSON, has another type tag, an unknown field or a value out of range.
        """
        try:
            return msgspec.json.decode(data, type=cls)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise InputError(
                f"{source} does not hold a {cls.__struct_config__.tag}",
                found=str(error),
                hint="the file was changed, cut off or written by another version of edgekd",
                subject=source,
            ) from error

    @classmethod
    def load(cls: type[R], path: Path) -> R:
        """The record in the file `path`.

        Raises:
            InputError: the file is missing or does not hold such a record.
        """
        try:
            data = path.read_bytes()
        except FileNotFoundError as error:
            raise InputError(f"{path} does not exist", hint="check the path", subject=path) from error
        return cls.from_json(data, source=str(path))

"""What stands in a model file beside its graph: edgekd's notes, the same words in ONNX and TFLite."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from edgekd.artifact import StoredArtifact
from edgekd.contracts import ConvertRequest
from edgekd.errors import ModelError
from edgekd.records import Format, IOSpec, Precision

CARRIED = ("labels", "processing", "source")
"""Notes that go from a file to what is made of it. In an artifact's metadata they have the same names."""

HELD = (Format.ONNX.value, Format.TFLITE.value)
"""Formats that hold notes."""

_OWN = ("iospec", "normalization", "parent", "precision", "recipe", "version")


def notes_text(iospec: IOSpec, precision: Precision, *, parent: str = "", recipe: str = "", notes: Mapping[str, str] | None = None) -> dict[str, str]:
    """Everything that edgekd writes into a file, name to text; no dates, so that the same model has the same bytes.

    `version` is edgekd's, `iospec` JSON, `normalization` JSON (input to text), `parent` and `recipe` are hashes; absent ones are left out.
    """
    from edgekd import __version__

    normalization = {tensor.name: tensor.normalization for tensor in iospec.inputs if tensor.normalization}
    told = {
        "version": __version__,
        "iospec": iospec.to_json().decode(),
        "normalization": json.dumps(normalization, sort_keys=True) if normalization else "",
        "parent": parent,
        "precision": precision.value,
        "recipe": recipe,
    }
    return {name: text for name, text in {**(notes or {}), **told}.items() if text}


def free_notes(told: Mapping[str, str]) -> dict[str, str]:
    """The notes that are not made anew for every file."""
    return {name: text for name, text in told.items() if name not in _OWN}


def carried_notes(request: ConvertRequest) -> dict[str, str]:
    """The notes that a converter passes on: those of its source, then those of the request."""
    found = request.source.record.metadata if isinstance(request.source, StoredArtifact) else {}
    return {**{name: found[name] for name in CARRIED if name in found}, **request.notes}


def noted_iospec(told: Mapping[str, str], source: Path) -> IOSpec | None:
    """The description in the notes of a file, if there is one.

    Raises:
        InputError: the text holds none.
    """
    return IOSpec.from_json(told["iospec"], source=f"the notes in {source}") if "iospec" in told else None


def labels_text(labels: Sequence[str]) -> str:
    """Class labels as a note: a JSON list."""
    return json.dumps(list(labels), ensure_ascii=False, separators=(",", ":"))


def read_metadata(path: Path) -> dict[str, str]:
    """What edgekd wrote into an ONNX or TFLite file, name to text; nothing for a file of others.

    Raises:
        ModelError: the file is missing or no model, or its notes are damaged. MissingDependency: the package that reads the format is missing.
    """
    from edgekd.models.model_file import format_of

    if format_of(path) is Format.TFLITE:
        from edgekd.models.tflite_artifact import read_notes
        from edgekd.models.tflite_file import load_model as load_tflite

        return read_notes(load_tflite(path))
    from edgekd.models.onnx_artifact import read_notes as read_onnx_notes
    from edgekd.models.onnx_file import load_model as load_onnx

    return read_onnx_notes(load_onnx(path))


def annotate(source: StoredArtifact, folder: Path, notes: Mapping[str, str], *, iospec: IOSpec | None = None) -> StoredArtifact:
    """The artifact in another folder with `notes` added inside its file, and with the layouts, ranges and normalization of `iospec`.

    Operators and weights are as before; the parent is the source. Call it before the artifact is hashed for anything else, or measured.

    Raises:
        ModelError: the format holds no notes.
    """
    kind = source.record.format
    if kind is Format.TFLITE:
        from edgekd.models.tflite_artifact import annotate_tflite

        return annotate_tflite(source, folder, notes, iospec=iospec)
    if kind is Format.ONNX:
        from edgekd.models.onnx_artifact import annotate_onnx

        return annotate_onnx(source, folder, notes, iospec=iospec)
    raise ModelError("this format holds no notes", found=kind.value, allowed="onnx, tflite", subject=source.record.entry)


def noted_metadata(metadata: Mapping[str, str], notes: Mapping[str, str]) -> dict[str, str]:
    """An artifact's metadata with the notes that go on to other files."""
    return {**metadata, **{name: text for name, text in notes.items() if name in CARRIED}}


def shown_notes(path: Path) -> dict[str, str]:
    """The notes of a file as commands show them: short, long texts by their length."""
    told = read_metadata(path)
    shown = {}
    for name, text in sorted(told.items()):
        if name == "iospec":
            spec = noted_iospec(told, path)
            layouts = {} if spec is None else {tensor.name: tensor.layout for tensor in (*spec.inputs, *spec.outputs) if tensor.layout}
            if layouts:
                shown["layouts"] = ", ".join(f"{tensor} {layout}" for tensor, layout in layouts.items())
        elif name == "labels":
            shown[name] = _listed(text)
        else:
            shown[name] = text if len(text) <= 200 else f"{text[:197]}..."
    return shown


def _listed(text: str) -> str:
    try:
        labels = msgspec.json.decode(text, type=list[str])
    except msgspec.DecodeError:
        return text
    return ", ".join(labels) if len(labels) <= 8 else f"{len(labels)}: {', '.join(labels[:6])}, ..."

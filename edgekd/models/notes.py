"""What stands in a model file beside its graph: edgekd's notes, the same words in ONNX and TFLite."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from edgekd.artifact import StoredArtifact
from edgekd.contracts import ConvertRequest
from edgekd.errors import InputError, ModelError
from edgekd.records import Format, IOSpec, Precision

if TYPE_CHECKING:
    import torch

CARRIED = ("labels", "processing", "source")
"""Notes that go from a file to what is made of it. In an artifact's metadata they have the same names."""

HELD = (Format.ONNX.value, Format.TFLITE.value)
"""Formats that hold notes."""

DROPPED = "dropped_notes"
"""In the metadata of an artifact that was taken in from a file: which note of that file was not used, and why."""

_OF_GRAPH = ("depth", "layout_ops", "transposes", "tensors", "ops", "prepared", "prepared_reason")
_NOT_USED = "not used"
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


def carried(metadata: Mapping[str, str]) -> dict[str, str]:
    """The notes in an artifact's metadata that go on to what is made of it."""
    return {name: metadata[name] for name in CARRIED if name in metadata}


def still_true(metadata: Mapping[str, str]) -> dict[str, str]:
    """What an artifact's metadata say that an edit of its graph does not change."""
    return {name: text for name, text in metadata.items() if name not in _OF_GRAPH}


def weights_hash(module: torch.nn.Module) -> str:
    """A SHA-256 over names, types, shapes and bytes of a module's weights and buffers: what says in the file which weights it was made from."""
    import torch

    found = hashlib.sha256()
    for name, value in sorted(module.state_dict(keep_vars=False).items()):
        if not hasattr(value, "detach"):  # an extra state of the user's own
            continue
        array = value.detach().cpu()
        found.update(f"{name} {array.dtype} {tuple(array.shape)};".encode())
        found.update(array.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


def carried_notes(request: ConvertRequest) -> dict[str, str]:
    """The notes that a converter passes on: those of its source, then those of the request."""
    found = request.source.record.metadata if isinstance(request.source, StoredArtifact) else {}
    return {**carried(found), **request.notes}


def noted_iospec(told: Mapping[str, str], source: Path) -> IOSpec | None:
    """The description in the notes of a file, if there is one.

    Raises:
        InputError: the text holds none.
    """
    return IOSpec.from_json(told["iospec"], source=f"the notes in {source}") if "iospec" in told else None


def fitting_iospec(told: Mapping[str, str], read: Callable[[IOSpec | None], IOSpec], source: Path) -> tuple[IOSpec | None, str]:
    """The description in the notes of a file, if it fits the graph; else nothing, and why it is not used.

    `read` gives the description of the graph itself, with what another one adds to it.

    Raises:
        ModelError: the graph cannot be described.
    """
    graph = read(None)
    try:
        noted = noted_iospec(told, source)
        if noted is None:
            return None, ""
        misfit = _misfit(noted, graph)
        if misfit:
            return None, f"iospec: {misfit}"
        read(noted)
    except InputError as error:
        return None, f"iospec: {error.what}; found: {error.found}"
    return noted, ""


def _misfit(noted: IOSpec, graph: IOSpec) -> str:
    """Which tensor of a description the graph lacks, or has in another type or rank; nothing if it fits."""
    for kind, wanted, present in (("input", noted.inputs, graph.inputs), ("output", noted.outputs, graph.outputs)):
        known = {tensor.name: tensor for tensor in present}
        for tensor in wanted:
            if tensor.name not in known:
                return f"it describes the {kind} {tensor.name!r}, which the graph lacks; its {kind}s are {', '.join(known)}"
            found = known[tensor.name]
            if (tensor.dtype, len(tensor.shape)) != (found.dtype, len(found.shape)):
                return f"it describes the {kind} {tensor.name!r} as {tensor.dtype} {tensor.shape}, which is {found.dtype} {found.shape} in the graph"
    return ""


def labels_text(labels: Sequence[str]) -> str:
    """Class labels as a note: a JSON list."""
    return json.dumps(list(labels), ensure_ascii=False, separators=(",", ":"))


def read_metadata(path: Path) -> dict[str, str]:
    """What edgekd wrote into an ONNX or TFLite file, name to text; nothing for a file of others.

    Raises:
        ModelError: the file is missing or no model, or its notes are damaged. MissingDependency: the package that reads the format is missing.
    """
    return _opened(path)[0]


def _opened(path: Path) -> tuple[dict[str, str], Callable[[IOSpec | None], IOSpec]]:
    """The notes of a file, and what describes its graph."""
    from edgekd.models.model_file import format_of

    if format_of(path) is Format.TFLITE:
        from edgekd.models import tflite_file
        from edgekd.models.tflite_artifact import read_notes

        model = tflite_file.load_model(path)
        return read_notes(model), lambda like: tflite_file.iospec_of(tflite_file.read_graph(model), like)
    from edgekd.models import onnx_file
    from edgekd.models.onnx_artifact import read_notes as read_onnx_notes

    proto = onnx_file.load_model(path)
    return read_onnx_notes(proto), lambda like: onnx_file.iospec_of(proto, like)


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
    """The notes of a file as commands show them: short, long texts by their length; `not used` says which one does not fit the graph, and why."""
    told, read = _opened(path)
    shown = {}
    for name, text in sorted(told.items()):
        if name == "iospec":
            spec, dropped = fitting_iospec(told, read, path)
            layouts = {} if spec is None else {tensor.name: tensor.layout for tensor in (*spec.inputs, *spec.outputs) if tensor.layout}
            if layouts:
                shown["layouts"] = ", ".join(f"{tensor} {layout}" for tensor, layout in layouts.items())
            if dropped:
                shown[_NOT_USED] = dropped
        elif name == "labels":
            shown[name] = _listed(text)
        else:
            shown[name] = text if len(text) <= 200 else f"{text[:197]}..."
    return shown


def artifact_notes(stored: StoredArtifact) -> dict[str, str]:
    """The notes in an artifact's file as commands show them, with what was not used of those in the file that it was taken in from."""
    dropped = stored.record.metadata.get(DROPPED)
    return {**shown_notes(stored.entry), **({_NOT_USED: dropped} if dropped else {})}


def _listed(text: str) -> str:
    try:
        labels = msgspec.json.decode(text, type=list[str])
    except msgspec.DecodeError:
        return text
    return ", ".join(labels) if len(labels) <= 8 else f"{len(labels)}: {', '.join(labels[:6])}, ..."

"""ONNX models as artifacts: stored with what is known about them, taken in from a user's file, and annotated."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgekd.artifact import StoredArtifact, store_artifact
from edgekd.errors import ModelError
from edgekd.models.layout import layout_ops
from edgekd.models.notes import DROPPED, carried, fitting_iospec, free_notes, noted_metadata, notes_text
from edgekd.models.onnx_file import (
    PROTO_LIMIT,
    bind_axes,
    depth_of,
    first_line,
    iospec_of,
    load_model,
    name_nodes,
    named_ops,
    opset_of,
    precision_of,
    require_onnx,
    write_model,
)
from edgekd.records import Format, IOSpec, Precision

_PREFIX = "edgekd."


def store_onnx(
    model: Any,
    folder: Path,
    entry: str,
    *,
    precision: Precision,
    iospec: IOSpec,
    producers: Mapping[str, str],
    parent: str = "",
    recipe: str = "",
    metadata: Mapping[str, str] | None = None,
    notes: Mapping[str, str] | None = None,
    limit: int = PROTO_LIMIT,
) -> StoredArtifact:
    """The artifact `entry` in `folder`, written whole.

    The file itself carries, as properties `edgekd.NAME`, its description, precision, the hash of its parent and `notes`; properties of
    others stay. The artifact's metadata say `depth`, `layout_ops` and `transposes`, and `metadata` what the converter knows.

    Raises:
        StorageError: the disk is full or the folder is not writable.
    """
    told = dict(notes or {})
    set_notes(model, notes_text(iospec, precision, parent=parent, recipe=recipe, notes=told))
    extra = write_model(model, folder, entry, limit=limit)
    return store_artifact(
        folder,
        entry,
        format=Format.ONNX,
        precision=precision,
        iospec=iospec,
        opset=opset_of(model),
        producers=producers,
        parent=parent,
        recipe=recipe,
        metadata=noted_metadata({"depth": str(depth_of(model)), **layout_ops(named_ops(model)).metadata(), **(metadata or {})}, told),
        extra_files=extra,
    )


def set_notes(model: Any, told: Mapping[str, str]) -> None:
    """Write edgekd's notes into the model, in place; those that stood there go, properties of others stay."""
    onnx = require_onnx("writing the notes of an ONNX model")
    kept = [(item.key, item.value) for item in model.metadata_props if not item.key.startswith(_PREFIX)]
    del model.metadata_props[:]
    entries = [*kept, *sorted((f"{_PREFIX}{name}", text) for name, text in told.items())]
    model.metadata_props.extend(onnx.StringStringEntryProto(key=key, value=value) for key, value in entries)


def read_notes(model: Any) -> dict[str, str]:
    """What edgekd wrote into a file, name to text, or nothing."""
    return {item.key.removeprefix(_PREFIX): item.value for item in model.metadata_props if item.key.startswith(_PREFIX)}


def annotate_onnx(source: StoredArtifact, folder: Path, notes: Mapping[str, str], *, iospec: IOSpec | None = None) -> StoredArtifact:
    """The artifact in another folder with `notes` added to edgekd's notes inside the file, and `iospec` instead of its description.

    Nodes, weights and metadata are as before; the parent is the source.

    Raises:
        ModelError: the source is no ONNX file.
    """
    record = source.record
    model = load_model(source.entry)
    return store_onnx(
        model,
        folder,
        record.entry,
        precision=record.precision,
        iospec=iospec or record.iospec,
        producers=record.producers,
        parent=record.content_hash(),
        recipe=record.recipe,
        metadata=record.metadata,
        notes={**free_notes(read_notes(model)), **carried(record.metadata), **notes},
    )


def import_onnx(
    path: Path, folder: Path, *, binding: Mapping[str, int] | None = None, like: IOSpec | None = None, notes: Mapping[str, str] | None = None
) -> StoredArtifact:
    """A user's ONNX file as an artifact `model.onnx` in `folder`, checked, with every node named.

    `binding` gives dynamic axes their sizes; `None` binds a dynamic first axis to 1 and refuses other dynamic axes;
    an empty mapping leaves all axes as they are. Notes that edgekd wrote into the file (layout, value ranges, normalization, labels) are
    used; `like` goes before them. A description that does not fit the graph, or that another version wrote in another form, is not used:
    the metadata `dropped_notes` say why. `notes` are added where the file has none of these names.

    Raises:
        ModelError: the file is no valid model, or a dynamic axis has no size.
    """
    onnx = require_onnx("importing an ONNX model")
    model = load_model(path)
    try:
        onnx.checker.check_model(model)
    except onnx.checker.ValidationError as error:
        raise ModelError(f"{path} is not a valid ONNX model", found=first_line(error), hint="export it again", subject=path) from error
    noted = read_notes(model)
    spec = iospec_of(model, like)
    wanted = dict(binding) if binding is not None else {axis: 1 for tensor in spec.inputs for axis in tensor.shape[:1] if isinstance(axis, str)}
    if wanted:
        model = bind_axes(model, wanted)
    hints, dropped = (like, "") if like is not None else fitting_iospec(noted, lambda found: iospec_of(model, found), path)
    spec = iospec_of(model, hints)
    if binding is None:
        for tensor in spec.inputs:
            tensor.sizes({})
    name_nodes(model)
    return store_onnx(
        model,
        folder,
        "model.onnx",
        precision=precision_of(model),
        iospec=IOSpec(inputs=spec.inputs, outputs=spec.outputs, state=spec.state, static_binding={**spec.static_binding, **wanted}),
        producers={model.producer_name or "unknown": model.producer_version or "unknown"},
        metadata={DROPPED: dropped} if dropped else {},
        notes={**(notes or {}), **free_notes(noted)},
    )

"""TFLite models as artifacts: stored with what is known about them, taken in from a user's file, and annotated."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from edgekd.artifact import StoredArtifact, store_artifact
from edgekd.contracts import Array, Tensors
from edgekd.errors import DataError, ModelError
from edgekd.models.layout import layout_ops
from edgekd.models.notes import DROPPED, carried, fitting_iospec, free_notes, noted_metadata, notes_text
from edgekd.models.tflite_file import (
    TfliteGraph,
    depth_of,
    ensure_signature,
    iospec_of,
    load_model,
    named_ops,
    op_counts,
    pack_model,
    parse_model,
    precision_of,
    read_graph,
    read_metadata,
    set_metadata,
    unique_tensor_names,
)
from edgekd.records import Format, IOSpec, Precision
from edgekd.storage import write_atomic

ENTRY = "model.tflite"
"""The file of a TFLite artifact."""

NOTES = "edgekd"
"""The metadata entry of a file that holds edgekd's JSON."""

_NESTED = ("iospec", "normalization")

COMPUTING = frozenset({
    "ADD", "AVERAGE_POOL_2D", "BATCH_MATMUL", "CONCATENATION", "CONV_2D", "DEPTHWISE_CONV_2D", "DIV", "FULLY_CONNECTED", "GELU", "HARD_SWISH",
    "LOGISTIC", "MEAN", "MUL", "RESIZE_BILINEAR", "RSQRT", "SOFTMAX", "SQRT", "SQUARED_DIFFERENCE", "SUB", "SUM", "TANH", "TRANSPOSE_CONV",
})  # fmt: skip
"""Operators that lose accuracy of their own in int8; the others move values."""


def store_tflite(
    model: Any,
    folder: Path,
    *,
    precision: Precision,
    like: IOSpec,
    converter: str,
    producers: Mapping[str, str],
    parent: str = "",
    recipe: str = "",
    metadata: Mapping[str, str] | None = None,
    notes: Mapping[str, str] | None = None,
) -> StoredArtifact:
    """The artifact `model.tflite` in `folder`, written whole. Layouts, value ranges and normalization are taken from `like`.

    The file itself carries, as metadata entry `edgekd`, JSON with its inputs and outputs, the hash of its parent and `notes`.
    The artifact's metadata says: `op_counts` (JSON), `layout_ops`, `transposes`, `depth`, `tensors` (JSON: elements per sample of what
    calibration observes), `ops` (JSON: `[name, operator]` of what can stay in float), `tensor_names` (JSON: input or output to
    the tensor that it is in the file) and `signature`; `tensors` and `ops` for fp32 only.

    Raises:
        StorageError: the disk is full or the folder is not writable.
    """
    graph = read_graph(model)
    iospec = iospec_of(graph, like)
    told = dict(notes or {})
    _set_notes(model, notes_text(iospec, precision, parent=parent, recipe=recipe, notes=told))
    data = pack_model(model)
    parse_model(data)
    write_atomic(folder / ENTRY, data)
    counts = op_counts(model)
    return store_artifact(
        folder,
        ENTRY,
        format=Format.TFLITE,
        precision=precision,
        iospec=iospec,
        opset=int(model.version),
        producers=producers,
        parent=parent,
        recipe=recipe,
        metadata=noted_metadata(
            {
                "converter": converter,
                "op_counts": json.dumps(counts),
                "op_total": str(sum(counts.values())),
                **layout_ops(named_ops(model)).metadata(),
                "layouts": json.dumps({tensor.name: tensor.layout for tensor in (*iospec.inputs, *iospec.outputs) if tensor.layout}),
                "depth": str(depth_of(graph)),
                "signature": graph.signature,
                "tensor_names": json.dumps(
                    {
                        "inputs": {name: tensor.name for name, tensor in graph.inputs.items()},
                        "outputs": {name: tensor.name for name, tensor in graph.outputs.items()},
                    }
                ),
                **(quantizable(graph) if precision is Precision.FP32 else {}),
                **(metadata or {}),
            },
            told,
        ),
    )


def quantizable(graph: TfliteGraph) -> dict[str, str]:
    """What a quantizer is told of a float graph, as metadata: `tensors` and `ops`."""
    floats = {tensor.index for tensor in graph.activations()}
    ops = [[op.name, op.kind] for op in graph.ops if op.kind in COMPUTING and op.outputs and op.outputs[0].index in floats]
    return {
        "tensors": json.dumps({tensor.name: abs(math.prod(tensor.shape)) if -1 not in tensor.shape else -1 for tensor in graph.activations()}),
        "ops": json.dumps(ops),
    }


def import_tflite(path: Path, folder: Path, *, like: IOSpec | None = None, notes: Mapping[str, str] | None = None) -> StoredArtifact:
    """A user's TFLite file as an artifact `model.tflite` in `folder`; tensors get names of their own, numbers stay.

    Notes that edgekd wrote into the file (layout, value ranges, normalization) are used unless `like` is given. A description that does not
    fit the graph, or that another version wrote in another form, is not used: the metadata `dropped_notes` say why. `notes` are added where
    the file has none of these names.

    Raises:
        ModelError: the file is missing, cut off, no TFLite model, or has a dynamic axis.
    """
    model = load_model(path)
    renamed = unique_tensor_names(model)
    ensure_signature(model)
    graph = read_graph(model)
    noted = read_notes(model)
    hints, dropped = (like, "") if like is not None else fitting_iospec(noted, lambda found: iospec_of(graph, found), path)
    spec = iospec_of(graph, hints)
    for tensor in spec.inputs:
        tensor.sizes({})
    return store_tflite(
        model,
        folder,
        precision=precision_of(graph),
        like=spec,
        converter="import",
        producers={"unknown": "unknown"},
        metadata={"renamed_tensors": str(renamed), **({DROPPED: dropped} if dropped else {})},
        notes={**(notes or {}), **free_notes(noted)},
    )


def _set_notes(model: Any, told: Mapping[str, str]) -> None:
    """Write edgekd's notes into the model, in place: one entry with JSON, in which the description is an object."""
    data = {name: json.loads(text) if name in _NESTED else text for name, text in told.items()}
    set_metadata(model, {NOTES: json.dumps(data, sort_keys=True, separators=(",", ":")).encode()})


def read_notes(model: Any) -> dict[str, str]:
    """What edgekd wrote into a file, name to text, or nothing.

    Raises:
        ModelError: the entry holds no JSON.
    """
    data = read_metadata(model).get(NOTES, b"{}")
    try:
        found = json.loads(data)
    except ValueError as error:
        raise ModelError("the notes in the TFLite file are no JSON", found=str(error), hint="convert it again", subject=NOTES) from error
    if not isinstance(found, dict):
        return {}
    return {name: value if isinstance(value, str) else json.dumps(value, sort_keys=True, separators=(",", ":")) for name, value in found.items()}


def annotate_tflite(source: StoredArtifact, folder: Path, notes: Mapping[str, str], *, iospec: IOSpec | None = None) -> StoredArtifact:
    """The artifact in another folder with `notes` (labels, processing) added to edgekd's JSON inside the file, and `iospec` for its description.

    Operators, weights and metadata are as before; the parent is the source.

    Raises:
        ModelError: the source is no TFLite file.
    """
    model = load_model(source.entry)
    record = source.record
    spec, parent = iospec or record.iospec, record.content_hash()
    told = {**free_notes(read_notes(model)), **carried(record.metadata), **notes}
    _set_notes(model, notes_text(spec, record.precision, parent=parent, recipe=record.recipe, notes=told))
    write_atomic(folder / ENTRY, pack_model(model))
    return store_artifact(
        folder,
        ENTRY,
        format=record.format,
        precision=record.precision,
        iospec=spec,
        opset=record.opset,
        producers=record.producers,
        parent=parent,
        recipe=record.recipe,
        metadata=noted_metadata(record.metadata, told),
    )


def fit_layouts(arrays: Tensors, found: IOSpec, wanted: IOSpec) -> dict[str, Array]:
    """Inputs or outputs that are laid out as in `found`, laid out as in `wanted`: NCHW to NHWC and back, by name.

    A tensor without a layout on one of the two sides is left as it is.

    Raises:
        DataError: the two layouts differ in another way.
    """
    here = {tensor.name: tensor.layout for tensor in (*found.inputs, *found.outputs)}
    there = {tensor.name: tensor.layout for tensor in (*wanted.inputs, *wanted.outputs)}
    fitted = {}
    for name, array in arrays.items():
        pair = (here.get(name, ""), there.get(name, ""))
        if not all(pair) or pair[0] == pair[1]:
            fitted[name] = array
        elif pair == ("NCHW", "NHWC"):
            fitted[name] = np.ascontiguousarray(np.moveaxis(array, 1, -1))
        elif pair == ("NHWC", "NCHW"):
            fitted[name] = np.ascontiguousarray(np.moveaxis(array, -1, 1))
        else:
            raise DataError(f"the layout of {name!r} cannot be changed", found=pair[0], allowed=f"{pair[1]} from NCHW or NHWC", subject=name)
    return fitted

"""What the edges to and from SavedModel share: which Python has TensorFlow, and a folder of files as one artifact."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edgekd.artifact import StoredArtifact, store_artifact
from edgekd.contracts import ConvertRequest
from edgekd.conversion.environments import environment_python
from edgekd.errors import ConfigError, DataError, ModelError
from edgekd.models.notes import carried_notes, noted_metadata
from edgekd.records import Format, IOSpec, Precision, TensorSpec
from edgekd.storage import copy_file

from ._child import own_python
from ._tflite_edges import environments_of

ENTRY = "saved_model.pb"
"""The file of a SavedModel that names the rest."""

ENVIRONMENT = "tensorflow"


def tensorflow_python(request: ConvertRequest, purpose: str) -> tuple[Path, str]:
    """The Python that has TensorFlow, and where that is: this one if it is installed here, else that of the environment `tensorflow`.

    The option `environments` asks for the environment even if TensorFlow is installed here.

    Raises:
        MissingEnvironment: neither is there.
    """
    path = environments_of(request)
    if path is None and importlib.util.find_spec("tensorflow") is not None:
        return own_python(), "this one"
    return environment_python(ENVIRONMENT, purpose=purpose, path=path), ENVIRONMENT


def stored_source(request: ConvertRequest, format: Format, precision: Precision, converter: str) -> StoredArtifact:
    """The source, which must be an artifact of this format and precision.

    Raises:
        ModelError: it is something else.
    """
    source = request.source
    if not isinstance(source, StoredArtifact) or source.record.format is not format:
        raise ModelError(
            f"{converter} takes a {format.value} artifact", found=type(source).__name__, hint="edgekd.artifact.store_artifact makes one", subject=converter
        )
    if source.record.precision is not precision:
        raise ModelError(f"{converter} takes a {precision.value} model", found=source.record.precision.value, subject=converter)
    return source


def fixed_binding(spec: IOSpec) -> dict[str, int]:
    """Sizes of all named axes: those of the IOSpec's binding, and 1 for first axes that it leaves out.

    Raises:
        ModelError: another named axis has no size.
    """
    binding = {axis: 1 for tensor in spec.inputs for axis in tensor.shape[:1] if isinstance(axis, str)} | spec.static_binding
    for tensor in spec.inputs:
        tensor.sizes(binding)
    return binding


def described(tensors: Sequence[TensorSpec], binding: Mapping[str, int] | None) -> list[dict[str, Any]]:
    """The tensors for a worker: name, type, and shape with sizes from `binding`; without one named axes stay open."""
    found: list[dict[str, Any]] = []
    for tensor in tensors:
        shape: list[int | None] = (
            list(tensor.sizes(dict(binding))) if binding is not None else [axis if isinstance(axis, int) else None for axis in tensor.shape]
        )
        found.append({"name": tensor.name, "dtype": tensor.dtype, "shape": shape})
    return found


def store_saved_model(
    made: Path,
    request: ConvertRequest,
    iospec: IOSpec,
    *,
    graph_version: int,
    converter: str,
    producers: Mapping[str, str],
    metadata: Mapping[str, str],
) -> StoredArtifact:
    """The SavedModel in the folder `made` as an artifact in `request.folder`: all its files, `saved_model.pb` copied last.

    Its `opset` is the version of TensorFlow's GraphDef.
    """
    names = sorted(str(path.relative_to(made)) for path in made.rglob("*") if path.is_file())
    extra = tuple(name for name in names if name != ENTRY)
    for name in (*extra, ENTRY):
        copy_file(made / name, request.folder / name)
    return store_artifact(
        request.folder,
        ENTRY,
        format=Format.SAVED_MODEL,
        precision=Precision.FP32,
        iospec=iospec,
        opset=graph_version,
        producers=producers,
        parent=request.source.record.content_hash(),
        metadata=noted_metadata({"converter": converter, **metadata}, carried_notes(request)),
        extra_files=extra,
    )


def refuse_quantizing(request: ConvertRequest, converter: str) -> None:
    """Refuse a recipe: a SavedModel stays in float.

    Raises:
        ConfigError: the request has one.
    """
    if request.recipe is not None or request.calibration is not None:
        raise ConfigError(
            f"{converter} does not quantize", found="a recipe or calibration inputs", hint="quantize with tflite-from-saved-model", subject=converter
        )


def require_names(request: ConvertRequest, spec: IOSpec) -> None:
    """Refuse an IOSpec in the request whose inputs are others than the source's.

    Raises:
        DataError: names differ.
    """
    asked, there = [tensor.name for tensor in request.iospec.inputs], [tensor.name for tensor in spec.inputs]
    if sorted(asked) != sorted(there):
        raise DataError("the request names other inputs than the source", found=asked, allowed=there, subject=asked[0])

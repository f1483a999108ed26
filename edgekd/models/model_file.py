"""A user's model file taken in by what it is, ONNX or TFLite, so that commands take either."""

from __future__ import annotations

from pathlib import Path

from edgekd.artifact import StoredArtifact
from edgekd.errors import ModelError
from edgekd.records import Artifact, Format

_STORED = "artifact.json"


def format_of(path: Path) -> Format:
    """The format of a model file: TFLite by its identifier in bytes 4 to 8, else by its ending; ONNX has no identifier.

    Raises:
        ModelError: the file is missing, or called `.tflite` without being one.
    """
    try:
        with path.open("rb") as stream:
            head = stream.read(8)
    except OSError as error:
        raise ModelError(f"{path} cannot be read", found=error.strerror, hint="check the path", subject=path) from error
    if head[4:8] == b"TFL3":
        return Format.TFLITE
    if path.suffix == ".tflite":
        raise ModelError(f"{path} is no TFLite model", found="no identifier TFL3 in bytes 4 to 8", hint="convert it again", subject=path)
    return Format.ONNX


def import_model(path: Path, folder: Path) -> StoredArtifact:
    """The file as an artifact in `folder`, checked; an open first axis is bound to 1. A folder with `artifact.json` is an artifact already.

    Raises:
        ModelError: the file is no model, or has another axis without a size; a folder holds no artifact. BundleError: its files were changed.
        MissingDependency: the package that reads this format is missing.
    """
    if path.is_dir():
        if not (path / _STORED).is_file():
            raise ModelError(f"the folder {path} holds no artifact", allowed=f"a model file, or a folder with {_STORED}", subject=path)
        stored = StoredArtifact(Artifact.load(path / _STORED), path)
        stored.verify()
        return stored
    if format_of(path) is Format.TFLITE:
        from edgekd.models.tflite_import import take_tflite

        return take_tflite(path, folder)
    from edgekd.models.onnx_artifact import import_onnx

    return import_onnx(path, folder)

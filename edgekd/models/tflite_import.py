"""A user's TFLite file as it is: what is measured are the bytes that the user has, with nothing renamed or packed anew."""

from __future__ import annotations

from pathlib import Path

import msgspec

from edgekd.artifact import StoredArtifact, store_artifact
from edgekd.models.layout import layout_ops
from edgekd.models.notes import DROPPED, carried, fitting_iospec
from edgekd.models.tflite_artifact import read_notes
from edgekd.models.tflite_file import depth_of, iospec_of, load_model, named_ops, precision_of, read_graph
from edgekd.records import Format, IOSpec, TensorSpec
from edgekd.storage import copy_file

_ENTRY = "model.tflite"
_BATCH = "batch"


def take_tflite(path: Path, folder: Path) -> StoredArtifact:
    """The file as an artifact `model.tflite` in `folder`, byte for byte; an open first axis counts as 1, which it is in the file.

    What edgekd noted in it of its state is kept if it fits the graph; else the metadata `dropped_notes` say why not. Inputs and outputs go by
    the names in the first signature, or by those of the tensors where there is none.

    Raises:
        ModelError: the file is missing, cut off or no TFLite model, two of its inputs or outputs share a name, or another axis is open.
        MissingDependency: ai-edge-litert, which reads TFLite files, is not installed.
    """
    model = load_model(path)
    graph = read_graph(model)
    noted = read_notes(model)
    hints, dropped = fitting_iospec(noted, lambda like: iospec_of(graph, like), path)
    found = iospec_of(graph, hints)
    spec = IOSpec(inputs=tuple(map(_one_sample, found.inputs)), outputs=tuple(map(_one_sample, found.outputs)), state=found.state)
    for tensor in spec.inputs:
        tensor.sizes({})
    copy_file(path, folder / _ENTRY)
    return store_artifact(
        folder,
        _ENTRY,
        format=Format.TFLITE,
        precision=precision_of(graph),
        iospec=spec,
        opset=int(model.version),
        producers={"unknown": "unknown"},
        metadata={
            "depth": str(depth_of(graph)),
            "signature": graph.signature,
            **layout_ops(named_ops(model)).metadata(),
            **carried(noted),
            **({DROPPED: dropped} if dropped else {}),
        },
    )


def _one_sample(tensor: TensorSpec) -> TensorSpec:
    return msgspec.structs.replace(tensor, shape=tuple(1 if axis == _BATCH and not at else axis for at, axis in enumerate(tensor.shape)))

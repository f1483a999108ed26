"""From an ONNX file to a SavedModel by onnx-tf, which can do one conversion per process."""

from __future__ import annotations

import itertools
import os
import runpy
import uuid
from typing import Any

import numpy as np

parts = runpy.run_path(os.path.join(os.path.dirname(os.path.abspath(__file__)), "tflite_parts.py"))
Refused = parts["Refused"]

_TOLERANCE = 1e-3


def count_instead_of_chance() -> None:
    """Make the suffixes that onnx-tf takes from random UUIDs count up, so that the same request gives the same bytes."""
    numbers = itertools.count(1)
    uuid.uuid4 = lambda: uuid.UUID(int=next(numbers) << 96)


def work(request: dict[str, Any]) -> dict[str, Any]:
    """The folder of the SavedModel, and how far its outputs are from those of ONNX Runtime on the example."""
    count_instead_of_chance()
    import onnx
    import onnxruntime
    import tensorflow as tf
    from onnx_tf.backend import prepare

    feeds = {name: np.load(path, allow_pickle=False) for name, path in request["example"].items()}
    session = onnxruntime.InferenceSession(request["model"], providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_outputs()]
    expected = dict(zip(names, session.run(names, feeds), strict=True))
    model = onnx.load(request["model"])
    prepare(model).export_graph("raw")
    loaded = tf.saved_model.load("raw")
    signature = loaded.signatures["serving_default"]
    inner, outer = request["inner_inputs"], [item["name"] for item in request["inputs"]]

    def run(tensors: dict[str, Any]) -> dict[str, Any]:
        found = signature(**{name: tensors[wish] for name, wish in zip(inner, outer, strict=True)})
        return {wish: found[name] for name, wish in zip(request["inner_outputs"], request["outputs"], strict=True)}

    parts["save_named"](tf, run, loaded, request["inputs"], "made")
    again = tf.saved_model.load("made").signatures["serving_default"]
    found = again(**{wish: tf.constant(feeds[name]) for name, wish in zip(inner, outer, strict=True)})
    errors = {}
    for name, wish in zip(request["inner_outputs"], request["outputs"], strict=True):
        value = found[wish].numpy()
        if value.shape != expected[name].shape:
            raise Refused(f"the output {wish!r} has shape {value.shape} instead of {expected[name].shape}", wish)
        errors[wish] = float(np.abs(value.astype(np.float64) - expected[name]).max()) / max(float(np.abs(expected[name]).max()), 1e-9)
        if not errors[wish] <= _TOLERANCE:
            raise Refused(f"the SavedModel computes something else: output {wish!r} differs by {errors[wish]:.2e} of its largest value", wish)
    return {
        "folder": os.path.abspath("made"),
        "errors": errors,
        "versions": parts["versions"]("onnx-tf", "tensorflow-cpu", "onnx"),
        "graph_version": int(tf.version.GRAPH_DEF_VERSION),
    }

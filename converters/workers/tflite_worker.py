"""From a SavedModel to a TFLite file by TensorFlow, all sizes fixed."""

from __future__ import annotations

import os
import runpy
from collections.abc import Iterator
from typing import Any

import numpy as np

parts = runpy.run_path(os.path.join(os.path.dirname(os.path.abspath(__file__)), "tflite_parts.py"))
Refused = parts["Refused"]

_TOLERANCE = 1e-3


def signature_of(loaded: Any, inputs: list[str], outputs: list[str]) -> Any:
    """The signature `serving_default`, after its names were compared with those asked for."""
    if "serving_default" not in loaded.signatures:
        raise Refused(f"the SavedModel has no signature serving_default, it has {sorted(loaded.signatures)}", "serving_default", "save it with one")
    signature = loaded.signatures["serving_default"]
    there = {"inputs": set(signature.structured_input_signature[1]), "outputs": set(signature.structured_outputs)}
    for kind, asked in (("inputs", inputs), ("outputs", outputs)):
        if there[kind] != set(asked):
            raise Refused(
                f"the SavedModel has the {kind} {sorted(there[kind])}, and the IOSpec {sorted(asked)}",
                sorted(there[kind] ^ set(asked))[0],
                "name them alike",
            )
    return signature


def work(request: dict[str, Any]) -> dict[str, Any]:
    """The path of the file, and the tensors that are its inputs and outputs."""
    import tensorflow as tf

    names = [item["name"] for item in request["inputs"]]
    loaded = tf.saved_model.load(request["model"])
    signature = signature_of(loaded, names, request["outputs"])
    parts["save_named"](tf, lambda tensors: signature(**tensors), loaded, request["inputs"], "fixed")
    arrays = {name: np.load(path, allow_pickle=False, mmap_mode="r") for name, path in request["calibration"].items()}
    batch = request["inputs"][0]["shape"][0] if request["inputs"][0]["shape"] else 1

    def calibration() -> Iterator[dict[str, Any]]:
        for start in range(0, len(next(iter(arrays.values()))), batch):
            yield {name: np.ascontiguousarray(array[start : start + batch]) for name, array in arrays.items()}

    parts["write_tflite"](tf, "fixed", "model.tflite", request["kind"], calibration, request["per_channel"])
    runner = parts["interpreter"](tf, "model.tflite")
    where = parts["borders"](runner, names, request["outputs"])
    feeds = {name: np.load(path, allow_pickle=False) for name, path in request["example"].items()}
    found = parts["run"](runner, where, feeds)
    expected = signature(**{name: tf.constant(value) for name, value in feeds.items()})
    errors = {}
    for name, value in found.items():
        wanted = expected[name].numpy()
        if value.shape != wanted.shape:
            raise Refused(f"the output {name!r} has shape {value.shape} instead of {wanted.shape}", name)
        errors[name] = float(np.abs(value.astype(np.float64) - wanted).max()) / max(float(np.abs(wanted).max()), 1e-9)
        if request["kind"] == "fp32" and not errors[name] <= _TOLERANCE:
            raise Refused(f"the file computes something else: output {name!r} differs by {errors[name]:.2e} of its largest value", name)
    return {
        "file": os.path.abspath("model.tflite"),
        "borders": where,
        "errors": errors,
        "versions": {"tensorflow": tf.__version__},
    }

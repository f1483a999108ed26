"""From a Keras file to a SavedModel by Keras on TensorFlow; code inside the file is refused."""

from __future__ import annotations

import os
import runpy
from typing import Any

os.environ["KERAS_BACKEND"] = "tensorflow"
parts = runpy.run_path(os.path.join(os.path.dirname(os.path.abspath(__file__)), "tflite_parts.py"))
Refused = parts["Refused"]


def named_inputs(model: Any, asked: list[str]) -> list[str]:
    """The model's own input names in the order of `asked`."""
    own = [item.name.split(":")[0] for item in model.inputs or []]
    if sorted(own) == sorted(asked):
        return list(asked)
    if len(own) == len(asked) == 1:
        return own
    raise Refused(f"the Keras model has the inputs {own}, and the IOSpec {asked}", (own or asked)[0], "name them alike")


def named_outputs(value: Any, asked: list[str]) -> dict[str, Any]:
    """The outputs by the names asked for: a dictionary by its keys, a list in its order."""
    if isinstance(value, dict):
        if set(value) != set(asked):
            raise Refused(f"the Keras model has the outputs {sorted(value)}, and the IOSpec {asked}", sorted(value)[0], "name them alike")
        return {name: value[name] for name in asked}
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    if len(values) != len(asked):
        raise Refused(f"the Keras model has {len(values)} outputs, and the IOSpec {asked}", asked[0], "name every output")
    return dict(zip(asked, values, strict=True))


def work(request: dict[str, Any]) -> dict[str, Any]:
    """The folder of the SavedModel."""
    import keras
    import tensorflow as tf

    model = keras.saving.load_model(request["model"], compile=False, safe_mode=True)
    asked = [item["name"] for item in request["inputs"]]
    own = named_inputs(model, asked)
    order = [item.name.split(":")[0] for item in model.inputs]

    def run(tensors: dict[str, Any]) -> dict[str, Any]:
        by_own = {name: tensors[wish] for name, wish in zip(own, asked, strict=True)}
        values = [by_own[name] for name in order]
        return named_outputs(model(values if len(values) > 1 else values[0], training=False), request["outputs"])

    parts["save_named"](tf, run, model, request["inputs"], "made")
    return {
        "folder": os.path.abspath("made"),
        "versions": {"tensorflow": tf.__version__, "keras": keras.__version__},
        "graph_version": int(tf.version.GRAPH_DEF_VERSION),
    }

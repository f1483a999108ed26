"""What the workers that write TFLite files share; loaded by path, because a worker is no module of a package."""

from __future__ import annotations

import importlib.metadata
import os
import re
from typing import Any

import numpy as np


class Refused(Exception):
    """What a worker says when it cannot do the work: `subject` is the tensor or operator concerned, `hint` the next step."""

    def __init__(self, message: str, subject: str = "", hint: str = "") -> None:
        super().__init__(message)
        self.subject = subject
        self.hint = hint


def versions(*packages: str) -> dict[str, str]:
    """Installed versions by package."""
    return {package: importlib.metadata.version(package) for package in packages}


def interpreter(tf: Any, path: str) -> Any:
    """An interpreter of TensorFlow for a file, without delegates, so that its operators can be counted."""
    kind = tf.lite.experimental.OpResolverType.BUILTIN_WITHOUT_DEFAULT_DELEGATES
    made = tf.lite.Interpreter(model_path=path, num_threads=1, experimental_op_resolver_type=kind)
    return made


def borders(runner: Any, inputs: list[str], outputs: list[str]) -> dict[str, dict[str, int]]:
    """Indices of the tensors that are the named inputs and outputs.

    A file with a signature names them itself, or numbers its outputs `output_0`, ...; one without has tensors called after the inputs,
    and outputs called `Identity`, `Identity_1`, ...
    """
    signatures = runner._get_full_signature_list()
    if signatures:
        first = next(iter(signatures.values()))
        ins, outs = dict(first["inputs"]), dict(first["outputs"])
    else:
        ins = {re.sub(r"^serving_default_|:0$", "", item["name"]): item["index"] for item in runner.get_input_details()}
        outs = {item["name"]: item["index"] for item in runner.get_output_details()}
    found: dict[str, dict[str, int]] = {"inputs": {}, "outputs": {}}
    for name in inputs:
        if name not in ins:
            raise Refused(f"the TFLite file has no input {name!r}, it has {sorted(ins)}", name)
        found["inputs"][name] = int(ins[name])
    for position, name in enumerate(outputs):
        wishes = (name, f"output_{position}", f"Identity_{position}" if position else "Identity")
        index = next((outs[wish] for wish in wishes if wish in outs), None)
        if index is None:
            raise Refused(f"the TFLite file has no output {name!r}, it has {sorted(outs)}", name)
        found["outputs"][name] = int(index)
    return found


def run(runner: Any, where: dict[str, dict[str, int]], feeds: dict[str, Any]) -> dict[str, Any]:
    """Outputs by name for one feed by name."""
    runner.allocate_tensors()
    for name, index in where["inputs"].items():
        runner.set_tensor(index, np.ascontiguousarray(feeds[name]))
    runner.invoke()
    return {name: np.array(runner.get_tensor(index)) for name, index in where["outputs"].items()}


def write_tflite(tf: Any, folder: str, path: str, kind: str, calibration: Any, per_channel: bool = True) -> None:
    """Convert the SavedModel in `folder` with TensorFlow's converter; `calibration` gives dictionaries of inputs by name."""
    converter = tf.lite.TFLiteConverter.from_saved_model(folder, signature_keys=["serving_default"])
    if kind != "fp32":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if kind == "fp16":
        converter.target_spec.supported_types = [tf.float16]
    if kind == "static_int8":
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8, tf.lite.OpsSet.TFLITE_BUILTINS]
        converter.representative_dataset = calibration
    converter._experimental_disable_per_channel = not per_channel
    data = converter.convert()
    with open(path, "wb") as stream:
        stream.write(data)


def save_named(tf: Any, function: Any, held: Any, inputs: list[dict[str, Any]], folder: str) -> None:
    """Write a SavedModel whose one signature has exactly these inputs; `function` takes and gives tensors by name.

    `inputs` are dictionaries with `name`, `dtype` and `shape` (`None`: any size); `held` are the objects that own the weights. The
    fingerprint, which holds a random number, is left out.
    """

    def serve(**tensors: Any) -> Any:
        return function(tensors)

    specs = {item["name"]: tf.TensorSpec(item["shape"], tf.as_dtype(item["dtype"]), name=item["name"]) for item in inputs}
    module = tf.Module()
    module.held = held
    module.serve = tf.function(serve, autograph=False)
    tf.saved_model.save(module, folder, signatures={"serving_default": module.serve.get_concrete_function(**specs)})
    fingerprint = os.path.join(folder, "fingerprint.pb")
    if os.path.exists(fingerprint):
        os.remove(fingerprint)

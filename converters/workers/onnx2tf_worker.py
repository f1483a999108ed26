"""From an ONNX file to a TFLite file by onnx2tf, and the order of axes that it chose, found by running both."""

from __future__ import annotations

import itertools
import os
import runpy
from typing import Any

import numpy as np

parts = runpy.run_path(os.path.join(os.path.dirname(os.path.abspath(__file__)), "tflite_parts.py"))
Refused = parts["Refused"]

FILES = {"fp32": "float32", "fp16": "float16", "dynamic_int8": "dynamic_range_quant", "static_int8": "integer_quant"}
_LAST = {3: (0, 2, 1), 4: (0, 2, 3, 1), 5: (0, 2, 3, 4, 1)}
_MAX_PERMUTED_RANK = 5
_TOLERANCE = 1e-3


def nearest(name: str, expected: Any, found: Any, likely: Any) -> tuple[tuple[int, ...], float]:
    """The order of axes of `expected` that comes nearest to `found`, with the error as a share of the largest value."""
    rank = expected.ndim
    orders = [tuple(range(rank))]
    if 3 <= rank <= _MAX_PERMUTED_RANK:
        orders += [(0, *rest) for rest in itertools.permutations(range(1, rank)) if rest != tuple(range(1, rank))]
    if likely in orders:
        orders.remove(likely)
        orders.insert(0, likely)
    fitting = [order for order in orders if tuple(expected.shape[axis] for axis in order) == found.shape]
    if not fitting:
        raise Refused(f"the output {name!r} has shape {found.shape} instead of {expected.shape}", name)
    largest = max(float(np.abs(expected).max()), 1e-9)
    errors = [float(np.abs(np.transpose(expected, order).astype(np.float64) - found).max()) / largest for order in fitting]
    best = min(range(len(fitting)), key=lambda at: errors[at])
    if not errors[best] <= _TOLERANCE:
        raise Refused(
            f"the float file computes something else: output {name!r} differs by {errors[best]:.2e} of its largest value, {_TOLERANCE:.0e} is allowed",
            name,
            "give the inputs that are no channel-first images to the option keep_inputs, or take another road",
        )
    return fitting[0] if errors[0] <= max(errors[best], 1e-6) else fitting[best], errors[best]


def reference(model: str, feeds: dict[str, Any]) -> dict[str, Any]:
    """What ONNX Runtime computes."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_outputs()]
    return dict(zip(names, session.run(names, feeds), strict=True))


def work(request: dict[str, Any]) -> dict[str, Any]:
    """The path of the file, the tensors that are its inputs and outputs, and the order of axes of each."""
    feeds = {name: np.load(path, allow_pickle=False) for name, path in request["example"].items()}
    expected = reference(request["model"], feeds)
    keep = request["keep"]
    orders = {name: tuple(range(value.ndim)) if name in keep else _LAST.get(value.ndim, tuple(range(value.ndim))) for name, value in feeds.items()}
    # onnx2tf fetches this file of photographs where an input has three channels, even if it uses none of it
    np.save("calibration_image_sample_data_20x128x128x3_float32.npy", np.zeros((20, 128, 128, 3), dtype=np.float32))
    calibration = []
    for name, path in request["calibration"].items():
        np.save(f"calibration.{name}.npy", np.transpose(np.load(path, allow_pickle=False), orders[name]))
        calibration.append([name, f"calibration.{name}.npy", 0.0, 1.0])
    import onnx2tf
    import tensorflow as tf

    os.makedirs("out")
    with open(request["model"], "rb") as stream, open("model.onnx", "wb") as copy:
        copy.write(stream.read())
    model = onnx2tf.convert(
        input_onnx_file_path="model.onnx",
        output_folder_path="out",
        output_signaturedefs=True,
        output_dynamic_range_quantized_tflite=request["kind"] == "dynamic_int8",
        output_integer_quantized_tflite=request["kind"] == "static_int8",
        quant_type="per-channel" if request["per_channel"] else "per-tensor",
        custom_input_op_name_np_data_path=calibration or None,
        input_quant_dtype="int8",
        output_quant_dtype="int8",
        keep_shape_absolutely_input_names=keep or None,
        verbosity="info",
    )
    likely = {name: bool(flag) for name, flag in getattr(model, "onnx_output_layouts", {}).items()}
    paths = {kind: os.path.abspath(os.path.join("out", f"model_{FILES[kind]}.tflite")) for kind in ("fp32", request["kind"])}
    if not os.path.exists(paths[request["kind"]]):
        raise Refused("onnx2tf wrote no {} file".format(request["kind"]), "", "its log says why; quantize by another road")
    runner = parts["interpreter"](tf, paths["fp32"])
    where = parts["borders"](runner, list(feeds), request["outputs"])
    found = parts["run"](runner, where, {name: np.transpose(value, orders[name]) for name, value in feeds.items()})
    errors = {}
    for name, value in found.items():
        rank = value.ndim
        wish = _LAST.get(rank) if likely.get(name) else tuple(range(rank))
        orders[name], errors[name] = nearest(name, expected[name], value, wish)
    chosen = parts["interpreter"](tf, paths[request["kind"]])
    return {
        "file": paths[request["kind"]],
        "borders": parts["borders"](chosen, list(feeds), request["outputs"]),
        "orders": {name: list(order) for name, order in orders.items()},
        "float_errors": errors,
        "versions": parts["versions"]("onnx2tf", "tensorflow", "onnx"),
    }

"""Pre- and post-processing as nodes of an ONNX graph: normalisation at inputs, softmax, argmax, sigmoid and suppression of boxes at outputs."""

from __future__ import annotations

from typing import Any

import numpy as np

from edgekd.errors import ConfigError, ModelError, near_names
from edgekd.models.onnx_batchnorm import fold_batch_norms
from edgekd.models.onnx_file import name_nodes, opset_of, require_onnx
from edgekd.models.onnx_trim import Links, trim
from edgekd.records import InputProcessing, OutputProcessing

_DETECTION = 6
_OLDEST_OPSET = 13


def require_opset(model: Any) -> None:
    """Refuse a file whose operator set is older than the nodes that are added.

    Raises:
        ModelError: names it.
    """
    if opset_of(model) < _OLDEST_OPSET:
        raise ModelError(
            "processing cannot be built into a file of this operator set", found=opset_of(model), allowed=f"{_OLDEST_OPSET} or newer", hint="export it anew"
        )


def normalise_input(model: Any, name: str, part: InputProcessing, axis: int) -> str:
    """Put the normalisation behind an input, in place, which then takes raw values; `folded` or `nodes`: where it lies.

    It goes into the weights of the first convolution or matrix product where that is exact (one that pads with zeros would pad with raw
    zeros, which are no zeros behind the normalisation); else it is a Mul and an Add.
    """
    onnx = require_onnx("building processing into an ONNX model")
    graph = model.graph
    item = next(item for item in graph.input if item.name == name)
    rank = len(item.type.tensor_type.shape.dim)
    size = item.type.tensor_type.shape.dim[axis].dim_value if rank > axis else 0
    scale, shift = (np.asarray(values, dtype=np.float64) for values in factors(part))
    links = Links(graph)
    made = links.free(f"{name}_normalised")
    for node in links.readers.get(name, []):
        if node is not None:
            node.input[:] = [made if other == name else other for other in node.input]
    if axis == 1 and rank >= 2 and size:  # as a batch norm, which knows how to get into the weights
        values = [np.broadcast_to(scale, size), np.broadcast_to(shift, size), np.zeros(size), np.ones(size)]
        names = [links.free(f"{made}_{what}") for what in ("scale", "shift", "mean", "variance")]
        graph.initializer.extend(onnx.numpy_helper.from_array(value.astype(np.float32), own) for value, own in zip(values, names, strict=True))
        node = onnx.helper.make_node("BatchNormalization", [name, *names], [made], name=links.free(f"{made}_node"), epsilon=0.0)
        graph.node.insert(0, node)
        others = [other.name for other in graph.node if other.op_type == "BatchNormalization" and other.name != node.name]
        if fold_batch_norms(model, skip=others).done:
            trim(model)
            return "folded"
        graph.node.remove(node)
        trim(model)
    shape = [1] * rank
    if len(scale) > 1:
        shape[axis] = len(scale)
    names = [f"{made}_factor", f"{made}_offset"]  # not `_scale`, which quantizers call scales of their own
    graph.initializer.extend(
        onnx.numpy_helper.from_array(value.astype(np.float32).reshape(shape if len(scale) > 1 else []), own)
        for value, own in zip((scale, shift), names, strict=True)
    )
    scaled = f"{made}_product"
    graph.node.insert(0, onnx.helper.make_node("Add", [scaled, names[1]], [made]))
    graph.node.insert(0, onnx.helper.make_node("Mul", [name, names[0]], [scaled]))
    name_nodes(model)
    return "nodes"


def factors(part: InputProcessing) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Scale and shift of `scale * x + shift`, which is the normalisation."""
    return tuple(part.scale / std for std in part.std), tuple(-mean / std for mean, std in zip(part.mean, part.std, strict=True))


def process_output(model: Any, part: OutputProcessing) -> None:
    """Put softmax, sigmoid or argmax behind an output, in place; the output keeps its name.

    Raises:
        ConfigError: the output does not exist, or has no such axis.
    """
    onnx = require_onnx("building processing into an ONNX model")
    graph = model.graph
    item = next(item for item in graph.output if item.name == part.output)
    rank = len(item.type.tensor_type.shape.dim)
    if part.kind != "sigmoid" and not -rank <= part.axis < rank:
        raise ConfigError(f"the output {part.output!r} has no axis {part.axis}", found=f"{rank} axes", hint="name the axis of the classes", subject=part.output)
    links = Links(graph)
    maker = links.makers.get(part.output)
    if maker is None:
        raise ConfigError(f"the output {part.output!r} is an input or a weight", found=part.output, hint="leave it as it is", subject=part.output)
    raw = links.free(f"{part.output}_raw")
    maker.output[:] = [raw if name == part.output else name for name in maker.output]
    for node in links.readers.get(part.output, []):
        if node is not None:
            node.input[:] = [raw if name == part.output else name for name in node.input]
    operator = {"softmax": "Softmax", "sigmoid": "Sigmoid", "argmax": "ArgMax"}[part.kind]
    attributes: dict[str, int] = {} if part.kind == "sigmoid" else {"axis": part.axis}
    if part.kind == "argmax":
        attributes["keepdims"] = 0
        item.type.tensor_type.elem_type = onnx.TensorProto.INT64
        del item.type.tensor_type.shape.dim[part.axis % rank]
    graph.node.append(onnx.helper.make_node(operator, [raw], [part.output], name=links.free(f"{part.output}_{part.kind}"), **attributes))


def suppress_boxes(model: Any, part: OutputProcessing) -> None:
    """Put a suppression of overlapping boxes behind the outputs `boxes` and `scores`, in place, which become one output of a fixed size.

    Raises:
        ConfigError: one of them does not exist, or they do not fit each other.
    """
    onnx = require_onnx("building processing into an ONNX model")
    graph = model.graph
    outputs = {item.name: item for item in graph.output}
    for name in (part.boxes, part.scores):
        if name not in outputs:
            raise ConfigError(f"nms reads the output {name!r}, which the model lacks", found=name, allowed=near_names(name, outputs), subject=name)
    shapes = {name: [axis.dim_value for axis in outputs[name].type.tensor_type.shape.dim] for name in (part.boxes, part.scores)}
    boxes, scores = shapes[part.boxes], shapes[part.scores]
    if len(boxes) != 3 or boxes[0] != 1 or boxes[2] != 4 or len(scores) != 3 or scores[0] != 1 or boxes[1] not in scores[1:]:
        raise ConfigError(
            "boxes and scores do not fit each other", found=f"{part.boxes} {boxes}, {part.scores} {scores}", allowed="(1, n, 4) and (1, n, c) or (1, c, n)"
        )
    links = Links(graph)
    wanted = part.output or "detections"
    if wanted in outputs and wanted not in (part.boxes, part.scores):
        raise ConfigError(f"the model has an output {wanted!r} already", found=wanted, hint="give the nms another output", subject=wanted)
    stem = links.free(f"{wanted}_nms")
    most = part.max_detections
    weights: dict[str, Any] = {
        "most": np.array([most], np.int64),
        "iou": np.array([part.iou_threshold], np.float32),
        "least": np.array([part.score_threshold], np.float32),
        "zero": np.array([0], np.int64),
        "one": np.array([1], np.int64),
        "two": np.array([2], np.int64),
        "three": np.array([3], np.int64),
        "flat": np.array([-1], np.int64),
        "column": np.array([4], np.int64),
        "fifth": np.array([5], np.int64),
        "pad": np.repeat(np.array([[0, 0, 0, 0, 0, -1]], np.float32), most, axis=0),
    }
    graph.initializer.extend(onnx.numpy_helper.from_array(value, f"{stem}_{name}") for name, value in weights.items())

    def add(operator: str, inputs: list[str], made: str, **attributes: Any) -> str:
        names = [name.removeprefix("=") if name.startswith("=") else f"{stem}_{name}" for name in inputs]  # "=": a tensor of the model
        target = made if made == wanted else f"{stem}_{made}"
        graph.node.append(onnx.helper.make_node(operator, names, [target], name=f"{stem}/{made}", **attributes))
        return made

    all_boxes, by_class = f"={part.boxes}", f"={part.scores}"
    if scores[1] == boxes[1] and scores[2] != boxes[1]:
        by_class = add("Transpose", [by_class], "by_class", perm=[0, 2, 1])
    add("NonMaxSuppression", [all_boxes, by_class, "most", "iou", "least"], "selected", center_point_box=int(part.centered))
    add("Slice", ["selected", "one", "three", "one"], "pairs")
    add("Slice", ["selected", "two", "three", "one"], "places")
    add("Slice", ["selected", "one", "two", "one"], "classes")
    add("Squeeze", [all_boxes, "zero"], "flat_boxes")
    add("Squeeze", [by_class, "zero"], "flat_scores")
    add("Squeeze", ["places", "one"], "rows")
    add("Gather", ["flat_boxes", "rows"], "kept_boxes", axis=0)
    add("GatherND", ["flat_scores", "pairs"], "kept_flat")
    add("Unsqueeze", ["kept_flat", "one"], "kept_scores")
    add("Cast", ["classes"], "kept_classes", to=onnx.TensorProto.FLOAT)
    add("Concat", ["kept_boxes", "kept_scores", "kept_classes"], "found", axis=1)
    add("Concat", ["found", "pad"], "padded", axis=0)
    add("Slice", ["padded", "column", "fifth", "one"], "keys")
    add("Squeeze", ["keys", "one"], "flat_keys")
    graph.node.append(onnx.helper.make_node("TopK", [f"{stem}_flat_keys", f"{stem}_most"], [f"{stem}_best", f"{stem}_order"], name=f"{stem}/top", axis=0))
    add("Gather", ["padded", "order"], "ordered", axis=0)
    add("Unsqueeze", ["ordered", "zero"], wanted)
    kept = [type(item).FromString(item.SerializeToString()) for item in graph.output if item.name not in (part.boxes, part.scores)]
    del graph.output[:]
    graph.output.extend([*kept, onnx.helper.make_tensor_value_info(wanted, onnx.TensorProto.FLOAT, [1, most, _DETECTION])])
    trim(model)

"""Pre- and post-processing as nodes of an ONNX graph: normalisation at inputs, softmax, argmax, sigmoid and suppression of boxes at outputs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from edgekd.errors import ConfigError, ModelError, near_names
from edgekd.models.onnx_batchnorm import fold_batch_norms
from edgekd.models.onnx_file import PROTO_LIMIT, first_line, name_nodes, opset_of, require_onnx
from edgekd.models.onnx_trim import Links, trim
from edgekd.records import InputProcessing, OutputProcessing

_DETECTION = 6
_OLDEST_OPSET = 13


@dataclass(frozen=True)
class Step:
    """One part that was built in behind the network: the tensors of the file that it reads, and the one that it makes."""

    part: OutputProcessing
    reads: tuple[str, ...]
    made: str


def require_opset(model: Any) -> None:
    """Refuse a file whose operator set is older than the nodes that are added.

    Raises:
        ModelError: names it.
    """
    if opset_of(model) < _OLDEST_OPSET:
        raise ModelError(
            "processing cannot be built into a file of this operator set", found=opset_of(model), allowed=f"{_OLDEST_OPSET} or newer", hint="export it anew"
        )


def require_sound(model: Any, *, limit: int = PROTO_LIMIT) -> str:
    """Refuse a file that ONNX's own checker refuses, types and shapes of all nodes included; a note where it is too large to be checked so.

    Raises:
        ModelError: gives the checker's words.
    """
    onnx = require_onnx("building processing into an ONNX model")
    if model.ByteSize() > limit:
        return f"onnx.checker did not read the file with its processing inside: it takes at most {limit} bytes at once"
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ModelError(
            "with its processing inside the file is no valid ONNX model",
            found=first_line(error),
            hint='export the model anew, or write where = "outside"',
            subject="processing",
        ) from error
    return ""


def _require_uncaptured(links: Links, name: str, what: str) -> None:
    """Refuse a tensor that a graph inside a node reads: it would go on reading it as it was.

    Raises:
        ModelError: names it.
    """
    if name in links.captured:
        raise ModelError(
            f"processing cannot be built in at the {what} {name!r}, which the body of an If, Loop or Scan reads",
            found=name,
            hint='write where = "outside", or export the model without such a body',
            subject=name,
        )


def normalise_input(model: Any, name: str, part: InputProcessing, axis: int) -> str:
    """Put the normalisation behind an input, in place, which then takes raw values; `folded` or `nodes`: where it lies.

    It goes into the weights of the first convolution or matrix product where that is exact (one that pads with zeros would pad with raw
    zeros, which are no zeros behind the normalisation); else it is a Mul and an Add, of the input's type.

    Raises:
        ModelError: the body of an If, Loop or Scan reads the input.
    """
    onnx = require_onnx("building processing into an ONNX model")
    graph = model.graph
    item = next(item for item in graph.input if item.name == name)
    rank = len(item.type.tensor_type.shape.dim)
    size = item.type.tensor_type.shape.dim[axis].dim_value if rank > axis else 0
    kind = onnx.helper.tensor_dtype_to_np_dtype(item.type.tensor_type.elem_type)
    scale, shift = (np.asarray(values, dtype=np.float64) for values in factors(part))
    links = Links(graph)
    _require_uncaptured(links, name, "input")
    made = links.free(f"{name}_normalised")
    for node in links.readers.get(name, []):
        if node is not None:
            node.input[:] = [made if other == name else other for other in node.input]
    if axis == 1 and rank >= 2 and size:  # as a batch norm, which knows how to get into the weights
        values = [np.broadcast_to(scale, size), np.broadcast_to(shift, size), np.zeros(size), np.ones(size)]
        names = [links.free(f"{made}_{what}") for what in ("scale", "shift", "mean", "variance")]
        graph.initializer.extend(onnx.numpy_helper.from_array(np.array(value), own) for value, own in zip(values, names, strict=True))
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
    names = [links.free(f"{made}_{what}") for what in ("factor", "offset")]  # not `_scale`, which quantizers call scales of their own
    graph.initializer.extend(
        onnx.numpy_helper.from_array(value.astype(kind).reshape(shape if len(scale) > 1 else []), own) for value, own in zip((scale, shift), names, strict=True)
    )
    scaled = links.free(f"{made}_product")
    graph.node.insert(0, onnx.helper.make_node("Add", [scaled, names[1]], [made]))
    graph.node.insert(0, onnx.helper.make_node("Mul", [name, names[0]], [scaled]))
    name_nodes(model)
    return "nodes"


def factors(part: InputProcessing) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Scale and shift of `scale * x + shift`, which is the normalisation."""
    return tuple(part.scale / std for std in part.std), tuple(-mean / std for mean, std in zip(part.mean, part.std, strict=True))


def process_outputs(model: Any, parts: Iterable[OutputProcessing]) -> tuple[dict[str, str], tuple[Step, ...]]:
    """Put these parts behind the network, in place and in order: the tensor that each output of the network is now, by its name, and the steps.

    Raises:
        ConfigError, ModelError: an output does not exist or does not fit its part, or a name is taken.
    """
    origins = {item.name: item.name for item in model.graph.output}
    steps: list[Step] = []
    for part in parts:
        if part.kind == "nms":
            steps.append(Step(part, (part.boxes, part.scores), suppress_boxes(model, part)))
            continue
        raw = process_output(model, part)
        if origins[part.output] == part.output:
            origins[part.output] = raw
        steps = [replace(step, made=raw) if step.made == part.output else step for step in steps]
        steps.append(Step(part, (raw,), part.output))
    return origins, tuple(steps)


def process_output(model: Any, part: OutputProcessing) -> str:
    """Put softmax, sigmoid or argmax behind an output, in place; the output keeps its name. The name of the tensor that it was.

    Raises:
        ConfigError: the output does not exist, or has no such axis. ModelError: the body of an If, Loop or Scan reads it.
    """
    onnx = require_onnx("building processing into an ONNX model")
    graph = model.graph
    outputs = {item.name: item for item in graph.output}
    if part.output not in outputs:
        raise ConfigError(
            f"{part.kind} is to lie behind the output {part.output!r}, which nms took",
            found=part.output,
            allowed=near_names(part.output, outputs),
            hint="name it before nms",
            subject=part.output,
        )
    item = outputs[part.output]
    rank = len(item.type.tensor_type.shape.dim)
    if part.kind != "sigmoid" and not -rank <= part.axis < rank:
        raise ConfigError(f"the output {part.output!r} has no axis {part.axis}", found=f"{rank} axes", hint="name the axis of the classes", subject=part.output)
    links = Links(graph)
    maker = links.makers.get(part.output)
    if maker is None:
        raise ConfigError(f"the output {part.output!r} is an input or a weight", found=part.output, hint="leave it as it is", subject=part.output)
    _require_uncaptured(links, part.output, "output")
    raw = links.free(f"{part.output}_raw")
    maker.output[:] = [raw if name == part.output else name for name in maker.output]
    for node in links.readers.get(part.output, []):
        if node is not None:
            node.input[:] = [raw if name == part.output else name for name in node.input]
    for known in graph.value_info:
        if known.name == part.output:
            known.name = raw
    operator = {"softmax": "Softmax", "sigmoid": "Sigmoid", "argmax": "ArgMax"}[part.kind]
    attributes: dict[str, int] = {} if part.kind == "sigmoid" else {"axis": part.axis}
    if part.kind == "argmax":
        attributes["keepdims"] = 0
        item.type.tensor_type.elem_type = onnx.TensorProto.INT64
        del item.type.tensor_type.shape.dim[part.axis % rank]
    graph.node.append(onnx.helper.make_node(operator, [raw], [part.output], name=links.free(f"{part.output}_{part.kind}"), **attributes))
    return raw


def suppress_boxes(model: Any, part: OutputProcessing) -> str:
    """Put a suppression of overlapping boxes behind the outputs `boxes` and `scores`, in place, which become one output of a fixed size: its name.

    Raises:
        ConfigError: one of them does not exist, they do not fit each other, there are as many boxes as classes, so that nothing tells
            which axis is which, or a tensor has the name of the new output.
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
    if scores[1] == scores[2]:
        raise ConfigError(
            "there are as many boxes as classes, so that nothing tells which axis of the scores is which",
            found=f"{part.boxes} {boxes}, {part.scores} {scores}",
            allowed="another number of boxes than of classes",
            hint='write where = "outside", or export the model with another number of boxes',
            subject=part.scores,
        )
    kinds = {name: onnx.TensorProto.DataType.Name(outputs[name].type.tensor_type.elem_type) for name in (part.boxes, part.scores)}
    if set(kinds.values()) != {"FLOAT"}:
        raise ConfigError("nms takes boxes and scores in float32", found=kinds, allowed="FLOAT", hint='write where = "outside"', subject="nms")
    links = Links(graph)
    wanted = part.output or "detections"
    if links.holds(wanted):
        raise ConfigError(
            f"the model has a tensor {wanted!r} already, so that nms cannot give its output this name",
            found=wanted,
            allowed=f"for example {links.free(f'{wanted}_nms')}",
            hint='give the nms another output: output = "NAME"',
            subject=wanted,
        )
    stem = _free_stem(links, f"{wanted}_nms")
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
        graph.node.append(onnx.helper.make_node(operator, names, [f"{stem}_{made}"], name=f"{stem}/{made}", **attributes))
        return made

    all_boxes, by_class = f"={part.boxes}", f"={part.scores}"
    if scores[1] == boxes[1]:
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
    graph.node.append(onnx.helper.make_node("Unsqueeze", [f"{stem}_ordered", f"{stem}_zero"], [wanted], name=f"{stem}/out"))
    kept = [type(item).FromString(item.SerializeToString()) for item in graph.output if item.name not in (part.boxes, part.scores)]
    del graph.output[:]
    graph.output.extend([*kept, onnx.helper.make_tensor_value_info(wanted, onnx.TensorProto.FLOAT, [1, most, _DETECTION])])
    return wanted


def _free_stem(links: Links, wish: str) -> str:
    """A beginning that no name of a tensor has."""
    stem, count = wish, 1
    while any(name.startswith(f"{stem}_") for name in (*links.makers, *links.readers, *links.inputs, *links.initializers)):
        count += 1
        stem = f"{wish}_{count}"
    return stem

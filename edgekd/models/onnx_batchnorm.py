"""Batch normalization folded into the weights beside it, in ONNX graphs; what cannot be folded is told with its reason."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.models.onnx_file import require_onnx
from edgekd.models.onnx_trim import Links

_Doubles = NDArray[np.float64]
_EPSILON = 1e-5
"""The default of the ONNX operator."""

_WEIGHTED = ("Conv", "ConvTranspose", "Gemm")


@dataclass(frozen=True)
class Folded:
    """Names of the nodes that were folded, and of those that were left, each with its reason."""

    done: tuple[str, ...]
    left: tuple[tuple[str, str], ...]


class _Left(Exception):
    """This node stays; the text says why."""


def fold_batch_norms(model: Any, *, skip: Collection[str] = ()) -> Folded:
    """Fold every BatchNormalization that can be, in place: into the Conv, ConvTranspose or Gemm before it, or into one behind it.

    Before it: whose output nothing else reads. Behind it: a Conv without padding (with padding only if the shift is zero, since padded zeros
    would be shifted too) or a Gemm. Weights that others read are copied. Nodes whose name is in `skip` stay.
    """
    done: list[str] = []
    left: list[tuple[str, str]] = []
    for node in [node for node in model.graph.node if node.op_type == "BatchNormalization"]:
        if node.name in skip:
            left.append((node.name, "folding changed the outputs beyond the tolerance"))
            continue
        try:
            _fold(model, node)
            done.append(node.name)
        except _Left as reason:
            left.append((node.name, str(reason)))
    return Folded(tuple(done), tuple(left))


def _fold(model: Any, node: Any) -> None:
    links = Links(model.graph)
    attributes = {item.name: item for item in node.attribute}
    if ("training_mode" in attributes and attributes["training_mode"].i) or len([name for name in node.output if name]) > 1:
        raise _Left("it is in training mode: it normalises by the batch at hand")
    constants = [links.constant(name) for name in node.input[1:5]]
    if any(value is None for value in constants):
        raise _Left("its scale or its statistics are no constants")
    gamma, beta, mean, variance = (np.asarray(value, dtype=np.float64) for value in constants)
    epsilon = float(attributes["epsilon"].f) if "epsilon" in attributes else _EPSILON
    scale: _Doubles = gamma / np.sqrt(variance + epsilon)
    shift: _Doubles = beta - mean * scale
    before: Any = links.makers.get(node.input[0])
    behind = links.readers.get(node.output[0], [])
    why_before = _before(links, node, before)
    if not why_before:
        _scale_outputs(model.graph, links, before, scale, shift)
        before.output[0] = node.output[0]
        model.graph.node.remove(node)
        return
    why_behind = _behind(links, node, behind, shift)
    if why_behind:
        raise _Left(f"{why_before}; {why_behind}")
    _scale_inputs(model.graph, links, behind[0], scale, shift)
    behind[0].input[0] = node.input[0]
    model.graph.node.remove(node)


def _before(links: Links, node: Any, maker: Any) -> str:
    """Why the operator before it cannot take it; nothing if it can."""
    if maker is None:
        return "it reads an input of the model"
    if maker.op_type not in _WEIGHTED:
        return f"it stands behind {maker.op_type}"
    if len(links.readers[node.input[0]]) > 1 or node.input[0] in links.outputs:
        return f"the output of {maker.name!r} before it is read elsewhere too"
    return _weights_of(links, maker)


def _behind(links: Links, node: Any, readers: list[Any], shift: _Doubles) -> str:
    """Why the operator behind it cannot take it; nothing if it can."""
    if len(readers) != 1 or node.output[0] in links.outputs:
        return "and its own output is read by more than one" if readers else "and its output is one of the model's"
    reader = readers[0]
    attributes = {item.name: item for item in reader.attribute}
    if reader.op_type not in ("Conv", "Gemm") or reader.input[0] != node.output[0] or node.output[0] in reader.input[1:]:
        return f"and in front of {reader.op_type}"
    if reader.op_type == "Conv" and np.any(shift != 0.0):
        padded = "pads" in attributes and any(attributes["pads"].ints)
        if padded or ("auto_pad" in attributes and attributes["auto_pad"].s not in (b"NOTSET", b"VALID")):
            return "and in front of a Conv that pads with zeros, which it would shift"
    if reader.op_type == "Gemm" and _number(attributes, "transA", 0):
        return "and in front of a Gemm that transposes its input"
    return _weights_of(links, reader)


def _weights_of(links: Links, node: Any) -> str:
    """Why the weights of an operator cannot be changed; nothing if they can."""
    if any(links.constant(name) is None for name in node.input[1:] if name):
        return f"the weights of {node.name!r} are no constants"
    if node.op_type == "Gemm" and len(node.input) > 2 and node.input[2]:
        bias = links.constant(node.input[2])
        if bias is not None and bias.ndim > 1 and any(size > 1 for size in bias.shape[:-1]):
            return f"{node.name!r} adds another bias to every sample"
    return ""


def _number(attributes: dict[str, Any], name: str, default: int) -> int:
    return int(attributes[name].i) if name in attributes else default


def _scale_outputs(graph: Any, links: Links, node: Any, scale: _Doubles, shift: _Doubles) -> None:
    """Change weights and bias so that channel `c` of the output becomes `scale[c] * y + shift[c]`."""
    weight = np.asarray(links.constant(node.input[1]))
    attributes = {item.name: item for item in node.attribute}
    groups = _number(attributes, "group", 1)
    wide = weight.astype(np.float64)
    bias = _bias(links, node, attributes, len(scale))
    if node.op_type == "Gemm":
        alpha = float(attributes["alpha"].f) if "alpha" in attributes else 1.0
        wide = alpha * (wide * scale[:, None] if _number(attributes, "transB", 0) else wide * scale[None, :])
    elif node.op_type == "Conv":
        wide = wide * scale.reshape(-1, *[1] * (wide.ndim - 1))
    else:  # (inputs, outputs / groups, ...): the inputs of group g make its outputs only
        parts = np.split(wide, groups, axis=0)
        shares = np.split(scale, groups)
        wide = np.concatenate([part * share.reshape(1, -1, *[1] * (wide.ndim - 2)) for part, share in zip(parts, shares, strict=True)])
    _replace(graph, links, node, _stored(wide, weight.dtype), _stored(bias * scale + shift, weight.dtype))


def _scale_inputs(graph: Any, links: Links, node: Any, scale: _Doubles, shift: _Doubles) -> None:
    """Change weights and bias so that the operator gives on `x` what it gave on `scale[c] * x + shift[c]`."""
    weight = np.asarray(links.constant(node.input[1]))
    attributes = {item.name: item for item in node.attribute}
    wide = weight.astype(np.float64)
    if node.op_type == "Gemm":
        alpha = float(attributes["alpha"].f) if "alpha" in attributes else 1.0
        across = bool(_number(attributes, "transB", 0))
        matrix = alpha * (wide.T if across else wide)
        bias = _bias(links, node, attributes, matrix.shape[1]) + shift @ matrix
        wide = matrix * scale[:, None]
        wide = wide.T if across else wide
    else:  # (outputs, inputs / groups, ...)
        groups, spatial = _number(attributes, "group", 1), tuple(range(2, wide.ndim))
        bias = _bias(links, node, attributes, len(wide))
        parts = np.split(wide, groups, axis=0)
        shares = list(zip(np.split(scale, groups), np.split(shift, groups), strict=True))
        bias = bias + np.concatenate([part.sum(axis=spatial) @ moved for part, (_, moved) in zip(parts, shares, strict=True)])
        wide = np.concatenate([part * share.reshape(1, -1, *[1] * len(spatial)) for part, (share, _) in zip(parts, shares, strict=True)])
    _replace(graph, links, node, _stored(wide, weight.dtype), _stored(bias, weight.dtype))


def _stored(values: _Doubles, dtype: Any) -> NDArray[Any]:
    """The values in the type of the weights."""
    if not np.isfinite(values).all() or np.abs(values).max(initial=0.0) > np.finfo(dtype).max:
        raise _Left("the folded weights are beyond what their type holds")
    return values.astype(dtype)


def _bias(links: Links, node: Any, attributes: dict[str, Any], channels: int) -> _Doubles:
    """The operator's bias, one value for each channel of its output."""
    if len(node.input) < 3 or not node.input[2]:
        return np.zeros(channels)
    factor = float(attributes["beta"].f) if node.op_type == "Gemm" and "beta" in attributes else 1.0
    flat = factor * np.asarray(links.constant(node.input[2]), dtype=np.float64).reshape(-1)
    return np.broadcast_to(flat, (channels,)).copy()


def _plain_gemm(node: Any) -> None:
    """Take the factors out of a Gemm; they are in its weights and its bias now."""
    kept = [item for item in node.attribute if item.name not in ("alpha", "beta")]
    del node.attribute[:]
    node.attribute.extend(kept)


def _replace(graph: Any, links: Links, node: Any, weight: NDArray[Any], bias: NDArray[Any]) -> None:
    """Give the node new weights of its own: as its old ones are called, where nothing else reads those."""
    onnx = require_onnx("folding batch normalization")
    if node.op_type == "Gemm":
        _plain_gemm(node)
    inputs = [node.input[0]]
    for position, (value, what) in enumerate(((weight, "weight"), (bias, "bias")), start=1):
        old = node.input[position] if len(node.input) > position else ""
        name = old if old and old in links.initializers and len(links.readers[old]) == 1 and old not in links.outputs else links.free(f"{node.name}_{what}")
        made = onnx.numpy_helper.from_array(np.ascontiguousarray(value), name)
        if name in links.initializers:
            links.initializers[name].CopyFrom(made)
        else:
            graph.initializer.append(made)
        inputs.append(name)
    node.input[:] = inputs

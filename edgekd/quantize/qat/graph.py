"""The traced network: batch norms folded, and a fake quantization after every tensor that the scheme keeps in int8."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from edgekd.quantize.qat.fake_quant import FakeQuantize, QuantWeighted, quantizable
from edgekd.quantize.recipes import Scheme

POINTS = "quant_points"
"""The submodule that holds the fake quantizations, by the names of their tensors."""

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

_RELUS: frozenset[Any] = frozenset({nn.ReLU, nn.ReLU6, torch.relu, F.relu, F.relu6, "relu"})
_JOINS: frozenset[Any] = frozenset({operator.add, operator.mul, torch.add, torch.mul, "add", "mul"})
_CONCATENATIONS: frozenset[Any] = frozenset({torch.cat, torch.concat})
_SAME_SCALE: frozenset[Any] = frozenset({nn.AvgPool1d, nn.AvgPool2d, F.avg_pool1d, F.avg_pool2d})
_MEANS: frozenset[Any] = frozenset({nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, torch.mean, "mean"})
_COMPUTED: frozenset[Any] = _MEANS | {
    nn.Hardsigmoid, nn.Hardswish, nn.Sigmoid, nn.Upsample, F.hardsigmoid, F.hardswish, F.interpolate, F.sigmoid, torch.sigmoid, "sigmoid",
}  # fmt: skip
_MOVING: frozenset[Any] = frozenset({
    nn.Dropout, nn.Dropout2d, nn.Flatten, nn.Identity, nn.MaxPool1d, nn.MaxPool2d, nn.PixelShuffle, nn.Unflatten, nn.ZeroPad2d,
    F.dropout, F.max_pool1d, F.max_pool2d, F.pixel_shuffle, torch.flatten, torch.permute, torch.reshape, torch.squeeze, torch.transpose,
    torch.unsqueeze, operator.getitem,
    "contiguous", "flatten", "permute", "reshape", "squeeze", "transpose", "unsqueeze", "view",
})  # fmt: skip


def fold_norms(model: fx.GraphModule) -> tuple[str, ...]:
    """Fold every batch norm that alone reads a convolution or linear layer into it, in place; the layers, by name."""
    folded: list[str] = []
    calls: dict[str, int] = {}
    for node in model.graph.nodes:
        if node.op == "call_module":
            calls[node.target] = calls.get(node.target, 0) + 1
    for node in list(model.graph.nodes):
        layer_node = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(layer_node, fx.Node) or layer_node.op != "call_module":
            continue
        norm, layer = model.get_submodule(node.target), model.get_submodule(str(layer_node.target))
        alone = len(layer_node.users) == 1 and calls[node.target] == calls[str(layer_node.target)] == 1
        fused = fuse(layer, norm) if alone else None
        if fused is None:
            continue
        model.set_submodule(str(layer_node.target), fused)
        node.replace_all_uses_with(layer_node)
        model.graph.erase_node(node)
        folded.append(str(layer_node.target))
    model.delete_all_unused_submodules()
    model.recompile()
    return tuple(folded)


def fuse(layer: nn.Module, norm: nn.Module) -> nn.Module | None:
    """The layer with the batch norm in its weights; `None` where the two are not such a pair, or the norm has no statistics of its own."""
    if not isinstance(norm, NORMS) or norm.running_mean is None or not quantizable(layer):
        return None
    if isinstance(layer, nn.Linear):
        return fuse_linear_bn_eval(layer, norm) if isinstance(norm, nn.BatchNorm1d) and norm.num_features == layer.out_features else None
    return fuse_conv_bn_eval(layer, norm, transpose=isinstance(layer, _TRANSPOSED))  # type: ignore[type-var]


class Placement:
    """Puts weights and activations of a traced model into fake quantization, in place, by the rules of one scheme."""

    def __init__(self, model: fx.GraphModule, name: str, scheme: Scheme, example: tuple[torch.Tensor, ...]) -> None:
        self.model, self.scheme = model, scheme
        self.fuses_relu = not scheme.symmetric_activations or name == "s8s8_tensorrt"
        self.inputs_only = name == "s8s8_tensorrt"
        self.shares = name in ("static_int8", "s8s8_tensorrt")
        self.left: dict[str, str] = {}
        ShapeProp(model).propagate(*example)
        for module in model.modules():
            if getattr(module, "inplace", False) is True:
                module.inplace = False  # type: ignore[assignment]
        for node in model.graph.nodes:
            if node.op == "call_function" and node.target in (operator.iadd, operator.imul):
                node.target = operator.add if node.target is operator.iadd else operator.mul

    def run(self) -> None:
        """Place everything; what stays in float is in `left`, by name with its kind."""
        weighted = [str(node.target) for node in self.model.graph.nodes if node.op == "call_module" and quantizable(self.model.get_submodule(node.target))]
        for name in dict.fromkeys(weighted):
            self.model.set_submodule(name, QuantWeighted(self.model.get_submodule(name), self.scheme))
        for node in list(self.model.graph.nodes):
            if node.op in ("call_module", "call_function", "call_method") and self.is_float(node):
                self.visit(node)
            elif node.op == "call_module":  # several outputs: a recurrent layer, an attention
                self.left[str(node.target)] = type(self.model.get_submodule(node.target)).__name__
        self.model.graph.lint()
        self.model.delete_all_unused_submodules()
        self.model.recompile()

    def visit(self, node: fx.Node) -> None:
        """Ask for int8 around one node."""
        kind, tensors = self.kind(node), [one for one in node.all_input_nodes if self.is_float(one)]
        if kind is QuantWeighted:
            self.quantize(tensors[0], node)
            self.output(node)
        elif kind in _CONCATENATIONS:
            if not self.inputs_only:
                for tensor in tensors:
                    self.quantize(tensor, node)
                self.output(node)
                if self.shares:
                    self.share(node)
        elif kind in _JOINS:
            if len(tensors) == 2 and not self.inputs_only:
                for tensor in tensors:
                    self.quantize(tensor, node)
                self.output(node)
            elif self.inputs_only and len(tensors) == 2 and kind in (operator.add, torch.add, "add"):
                self.residual(tensors, node)
        elif kind in _SAME_SCALE:
            point = self.quantize(tensors[0], node)
            if not self.inputs_only:
                self.insert(node, str(point.target), track=False)
        elif kind in _COMPUTED or (kind in _RELUS and not self.behind(node)):
            if not self.inputs_only:
                self.quantize(tensors[0], node)
                self.output(node)
        elif kind not in _RELUS and kind not in _MOVING:
            self.left[str(node.target) if node.op == "call_module" else node.name] = getattr(kind, "__name__", str(kind))

    def kind(self, node: fx.Node) -> Any:
        """The class of a module, the function, or the name of the method."""
        return type(self.model.get_submodule(str(node.target))) if node.op == "call_module" else node.target

    def is_float(self, node: fx.Node) -> bool:
        """Whether the node gives one float tensor with a batch axis."""
        told = node.meta.get("tensor_meta")
        dtype, shape = getattr(told, "dtype", None), getattr(told, "shape", ())
        return dtype is not None and dtype.is_floating_point and len(shape) > 0

    def is_point(self, node: fx.Node) -> bool:
        return node.op == "call_module" and str(node.target).startswith(f"{POINTS}.")

    def quantize(self, tensor: fx.Node, reader: fx.Node) -> fx.Node:
        """The fake quantization that a reader's input comes from, through operators that only move values; made where it is missing."""
        origin = tensor
        while not self.is_point(origin) and origin.op != "placeholder" and self.kind_of(origin) in _MOVING:
            before = [one for one in origin.all_input_nodes if self.is_float(one)]
            if len(before) != 1:
                break
            origin = before[0]
        if self.is_point(origin):
            return origin
        return self.insert(origin, self.point(origin), only=reader if self.inputs_only and origin is tensor else None)

    def kind_of(self, node: fx.Node) -> Any:
        return self.kind(node) if node.op in ("call_module", "call_function", "call_method") else None

    def output(self, node: fx.Node) -> None:
        """A fake quantization of what a node gives, behind the activation that is computed with it."""
        if self.inputs_only:
            return
        readers = list(node.users)
        if self.fuses_relu and len(readers) == 1 and self.kind_of(readers[0]) in _RELUS:
            node = readers[0]
        self.insert(node, self.point(node))

    def behind(self, node: fx.Node) -> bool:
        """Whether an activation's own output is quantized already, or, in TensorRT's rules, never is."""
        return self.inputs_only or any(self.is_point(reader) for reader in node.users)

    def residual(self, tensors: list[fx.Node], node: fx.Node) -> None:
        """TensorRT joins an Add to the layer on its longer branch; only the other branch is int8."""
        order: dict[fx.Node, int] = {}
        for one in self.model.graph.nodes:
            order[one] = max((order[before] for before in one.all_input_nodes), default=0) + int(not self.is_point(one))
        fused = [one for one in tensors if self.kind_of(one) is QuantWeighted and len(one.users) == 1]
        if fused:
            joined = max(fused, key=lambda one: order[one])
            self.quantize(next(one for one in tensors if one is not joined), node)

    def share(self, node: fx.Node) -> None:
        """Give what a concatenation alone reads the range of its result, as the quantizer of TFLite files does."""
        result = next(reader for reader in node.users if self.is_point(reader))
        for part in node.all_input_nodes:
            if self.is_point(part) and len(part.users) == 1 and sum(one.target == part.target for one in self.model.graph.nodes) == 1:
                part.target = result.target
                part.kwargs = {"track": False}

    def point(self, node: fx.Node) -> str:
        """A new fake quantization under the tensor's name."""
        target = f"{POINTS}.{node.name}"
        self.model.add_submodule(target, FakeQuantize(self.scheme))
        return target

    def insert(self, after: fx.Node, target: str, *, only: fx.Node | None = None, track: bool = True) -> fx.Node:
        graph = self.model.graph
        with graph.inserting_after(after):
            made = graph.call_module(target, (after,), {} if track else {"track": False})
        made.meta = dict(after.meta)
        if only is None:
            after.replace_all_uses_with(made, delete_user_cb=lambda user: user is not made)
        else:
            only.replace_input_with(after, made)
        return made


def points_of(model: nn.Module) -> Mapping[str, FakeQuantize]:
    """The fake quantizations of activations, by name, each once."""
    return {name.removeprefix(f"{POINTS}."): module for name, module in model.named_modules() if isinstance(module, FakeQuantize)}

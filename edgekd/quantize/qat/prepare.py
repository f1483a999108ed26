"""A network made ready for quantization-aware training: a copy with batch norms folded and fake quantization where the scheme has int8."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from edgekd.contracts import Array
from edgekd.errors import ConfigError, DataError, ModelError, near_names
from edgekd.quantize.qat.fake_quant import FakeQuantize, Phase, QuantWeighted, quantizable
from edgekd.quantize.qat.graph import NORMS, Placement, fold_norms, fuse, points_of
from edgekd.quantize.recipes import SCHEMES, Scheme
from edgekd.tree import flatten_outputs

_TRACE_ERRORS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)
_FOLD_TOLERANCE = 1e-4
"""Largest difference that folding may make, of the largest output: float rounding in another order."""


@dataclass(frozen=True)
class QatReport:
    """What was placed. `traced`: functions in `forward` are covered too; else modules only, and `reason` says why.

    `folded` are layers that took in a batch norm, `weighted` layers with rounded weights, `points` the fake-quantized tensors, `left_in_float` what
    stays as it is, by name with its kind.
    """

    scheme: str
    traced: bool
    reason: str
    folded: tuple[str, ...]
    weighted: tuple[str, ...]
    points: tuple[str, ...]
    left_in_float: Mapping[str, str]


class QatModule(nn.Module):
    """The prepared copy as `model`; called as the network is. Training mode leaves batch norms that were not folded in evaluation."""

    def __init__(self, model: nn.Module, report: QatReport) -> None:
        super().__init__()
        self.model = model
        self.report = report

    def forward(self, *inputs: Tensor) -> Any:
        """What the network gives, computed with the rounding of int8."""
        return self.model(*inputs)

    def train(self, mode: bool = True) -> QatModule:
        """Go over to training, batch norms excepted."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, NORMS):
                module.eval()
        return self

    def observe(self) -> QatModule:
        """Warm-up: ranges follow the training batches."""
        return self._set(Phase.OBSERVE)

    def learn(self) -> QatModule:
        """Ranges are trained with the weights."""
        return self._set(Phase.LEARN)

    def freeze(self) -> QatModule:
        """Ranges and scales become constants. `onnx-from-torch` then writes them as QuantizeLinear and DequantizeLinear."""
        return self._set(Phase.FREEZE)

    def without_rounding(self) -> QatModule:
        """A copy that computes in float with the trained weights: what the float ONNX or TFLite file is made from."""
        return copy.deepcopy(self).eval()._set(Phase.OFF)

    def ranges(self) -> dict[str, tuple[float, float]]:
        """Lowest and highest value of every fake-quantized tensor, by the names in the report."""
        return {name: point.ends() for name, point in points_of(self.model).items()}

    def _set(self, phase: Phase) -> QatModule:
        for module in self.modules():
            if isinstance(module, (FakeQuantize, QuantWeighted)):
                module.set_phase(phase)
        return self


def prepare_qat(
    module: nn.Module, scheme: str, example: Mapping[str, Array] | Sequence[Tensor], ranges: Mapping[str, tuple[float, float]] | None = None
) -> QatModule:
    """A copy of the network for quantization-aware training in a scheme, in evaluation mode, in the phase `observe`.

    `example` holds a batch for each argument, in order; every range starts as the extremes that it shows, or from `ranges`, by the names
    in the report. Weights are rounded per output channel, activations per tensor, where the scheme has int8. What `torch.fx` can trace
    is covered with its functions and joins; else convolutions and linear layers alone. The report names what stays in float.

    Raises:
        ConfigError: the scheme is unknown or quantizes at run time, or `ranges` names a tensor that there is not.
        DataError: there is no example. ModelError: the network fails on it, or nothing in it can be quantized.
    """
    rules = _rules(scheme)
    arguments = tuple(torch.as_tensor(value) for value in (example.values() if isinstance(example, Mapping) else example))
    if not arguments or any(argument.ndim == 0 or not len(argument) for argument in arguments):
        raise DataError("preparing for training in int8 needs an example", found=[tuple(one.shape) for one in arguments], hint="give a batch of real inputs")
    plain = copy.deepcopy(module).eval()
    expected = _outputs(plain, arguments, "the network fails on its example")
    made = _traced(plain, scheme, rules, arguments, expected)
    prepared = made if isinstance(made, QatModule) else _by_modules(plain, scheme, rules, arguments, expected, made)
    if not prepared.report.weighted:
        raise ModelError(
            "nothing in the network can be trained in int8", found=dict(prepared.report.left_in_float), allowed="Conv, ConvTranspose and Linear layers"
        )
    _start(prepared, arguments, ranges or {})
    return prepared


def _rules(scheme: str) -> Scheme:
    known = [name for name in SCHEMES if name != "dynamic_int8"]
    if scheme not in known:
        hint = "its activations get their range at run time: there is none to train" if scheme == "dynamic_int8" else None
        raise ConfigError(f"there is no scheme {scheme!r} for training in int8", allowed=near_names(scheme, known), hint=hint, subject=scheme)
    return SCHEMES[scheme]


def _outputs(module: nn.Module, arguments: tuple[Tensor, ...], what: str) -> dict[str, Tensor]:
    try:
        with torch.no_grad():
            return {name: value for name, value in flatten_outputs(module(*arguments)).items() if isinstance(value, Tensor)}
    except _TRACE_ERRORS as error:
        raise ModelError(
            what,
            found=str(error).splitlines()[0] if str(error) else type(error).__name__,
            hint="check the order and shapes of its inputs",
            subject=type(module).__name__,
        ) from error


def _differs(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """The output that is not the same within float rounding, or nothing."""
    for name, value in expected.items():
        if not value.is_floating_point():
            continue
        largest = max(float(value.abs().max()), 1e-6)
        if name not in found or float((found[name] - value).abs().max()) > _FOLD_TOLERANCE * largest:
            return name
    return ""


def _traced(plain: nn.Module, scheme: str, rules: Scheme, arguments: tuple[Tensor, ...], expected: Mapping[str, Tensor]) -> QatModule | str:
    """The network by its trace, or why it has none that computes the same."""
    try:
        model = fx.symbolic_trace(copy.deepcopy(plain))
    except _TRACE_ERRORS as error:
        return f"torch.fx cannot trace it: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    folded = fold_norms(model)
    bad = _differs(expected, _outputs(model, arguments, "the traced network fails on the example"))
    if bad:
        return f"its trace computes another {bad}"
    placement = Placement(model, scheme, rules, arguments)
    placement.run()
    return QatModule(model, _report(model, scheme, "", folded, placement.left)).eval()


def _by_modules(plain: nn.Module, scheme: str, rules: Scheme, arguments: tuple[Tensor, ...], expected: Mapping[str, Tensor], reason: str) -> QatModule:
    """Layers replaced one by one, each with a fake quantization of its input and its output; batch norms are folded within a `Sequential`."""
    model = copy.deepcopy(plain)
    folded: list[str] = []
    for path, holder in model.named_modules():
        if type(holder) is nn.Sequential:
            children = list(holder.named_children())
            for (name, layer), (norm_name, norm) in itertools.pairwise(children):
                fused = fuse(layer, norm)
                if fused is not None:
                    holder.set_submodule(name, fused)
                    holder.set_submodule(norm_name, nn.Identity())
                    folded.append(f"{path}.{name}" if path else name)
    bad = _differs(expected, _outputs(model, arguments, "the network with folded batch norms fails on the example"))
    if bad:  # a pair in a row is no pair in use: norms over another axis, or layers that are called elsewhere too
        model, folded = copy.deepcopy(plain), []
    inside = _inside_torch(model)
    left = {
        name: type(one).__name__
        for name, one in model.named_modules()
        if not list(one.children()) and list(one.parameters()) and (name in inside or not quantizable(one))
    }
    if quantizable(model):
        model = _Around(QuantWeighted(model, rules), rules)
    else:
        for name in [name for name, one in model.named_modules() if name not in inside and quantizable(one)]:
            model.set_submodule(name, _Around(QuantWeighted(model.get_submodule(name), rules), rules))
    return QatModule(model, _report(model, scheme, reason, tuple(folded), left)).eval()


def _inside_torch(model: nn.Module) -> set[str]:
    """The paths of what lies inside torch's own layers (attention, transformer layers): these read their parts' weights themselves."""
    found: set[str] = set()
    for path, one in model.named_modules():
        kind = type(one).__module__
        if kind.startswith("torch.") and not kind.endswith(".container"):
            found |= {f"{path}.{name}" if path else name for name, _ in one.named_modules() if name}
    return found


class _Around(nn.Module):
    """A layer between fake quantizations of its input and its output."""

    def __init__(self, layer: QuantWeighted, scheme: Scheme) -> None:
        super().__init__()
        self.input_point, self.layer, self.output_point = FakeQuantize(scheme), layer, FakeQuantize(scheme)

    def forward(self, values: Tensor) -> Tensor:
        """The layer's output, in 8 bits as its input."""
        made: Tensor = self.output_point(self.layer(self.input_point(values)))
        return made


def _report(model: nn.Module, scheme: str, reason: str, folded: tuple[str, ...], left: Mapping[str, str]) -> QatReport:
    weighted = tuple(name for name, one in model.named_modules() if isinstance(one, QuantWeighted))
    return QatReport(scheme, not reason, reason, folded, weighted, tuple(points_of(model)), dict(left))


def _start(prepared: QatModule, arguments: tuple[Tensor, ...], ranges: Mapping[str, tuple[float, float]]) -> None:
    """Every range as the extremes that the float network shows on the example, or as it is given."""
    points = points_of(prepared.model)
    for name in ranges:
        if name not in points:
            raise ConfigError(f"there is no fake-quantized tensor {name!r}", allowed=near_names(name, points), subject=name)
    seen = point_values(prepared, arguments)
    for name, point in points.items():
        if name in ranges:
            point.set_range(*ranges[name])
        elif name in seen:
            point.set_range(min(float(one.min()) for one in seen[name]), max(float(one.max()) for one in seen[name]))
    prepared.observe()


def point_values(prepared: QatModule, arguments: tuple[Tensor, ...]) -> dict[str, list[Tensor]]:
    """What the fake-quantized tensors are in float, by name; several where tensors share a range."""
    plain = prepared.without_rounding()
    seen: dict[str, list[Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen.setdefault(name, []).append(inputs[0].detach())

        return hook

    for name, point in points_of(plain.model).items():
        point.register_forward_pre_hook(keep(name))
    with torch.no_grad():
        plain(*arguments)
    return seen

"""One hop of one network: converted as it is, asked of the target, run there once and compared with torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekd.artifact import StoredArtifact
from edgekd.contracts import Array, ConvertRequest, Target, Tensors
from edgekd.conversion.toolchain import Toolchain
from edgekd.errors import ModelError, Rejected, RunnerFailed, UnsupportedModel
from edgekd.parity.blame import Compare, blame
from edgekd.parity.compare import BASE_DEPTH, compare_hop
from edgekd.parity.graph import depth_told
from edgekd.records import HopParity, IOSpec, Precision, TensorSpec
from edgekd.teachers import tensors_of
from edgekd.tree import flatten_outputs, to_numpy

if TYPE_CHECKING:
    import torch

_CODE_LINE = re.compile(r".+\.py:\d+")
_UNTOLD = ("format", "session", "model")
"""What a runtime answers where it blames no operator."""


@dataclass(frozen=True)
class Trouble:
    """Why a network fails: `step` is `convert`, `support`, `run` or `parity`; `operator` is empty where nothing is blamed. `parity` is the comparison."""

    step: str
    operator: str
    reason: str
    parity: HopParity | None = None


def spec_of(inputs: Tensors) -> IOSpec:
    """The description of inputs with the batch bound to 1; outputs are filled in by the converter."""
    tensors = tuple(TensorSpec(name=name, dtype=str(value.dtype), shape=(1, *value.shape[1:])) for name, value in inputs.items())
    return IOSpec(inputs=tensors, outputs=(TensorSpec(name="output", dtype="float32", shape=()),), static_binding={"batch": 1})


def torch_outputs(module: torch.nn.Module, inputs: Tensors) -> dict[str, Array]:
    """The outputs of a module for all samples, one by one as they are deployed."""
    import torch

    parts: list[dict[str, Any]] = []
    with torch.no_grad():
        for at in range(len(next(iter(inputs.values())))):
            given = tensors_of({name: value[at : at + 1] for name, value in inputs.items()})
            parts.append(flatten_outputs(module(*given)))
    return {name: np.concatenate([to_numpy(part[name]) for part in parts]) for name in parts[0]}


@dataclass(frozen=True)
class Hop:
    """The hop from torch to a target, by the target's own exporter."""

    target: Target
    toolchain: Toolchain

    def convert(self, module: torch.nn.Module, inputs: Tensors, folder: Path) -> StoredArtifact:
        """The module as a float file.

        Raises:
            Rejected: the converter refuses it.
        """
        request = ConvertRequest(source=module, folder=folder, iospec=spec_of(inputs), example={name: value[:1] for name, value in inputs.items()})
        return self.toolchain.converter("exporter").convert(request)

    def trouble(self, model: StoredArtifact, module: torch.nn.Module, inputs: Tensors) -> tuple[Trouble | None, str]:
        """What is wrong with a file on the target, and a note about what could not be compared; `module` is in evaluation mode."""
        report = self.target.runtime.supports(model)
        if not report.supported:
            told = [name for name in report.missing if name not in _UNTOLD]
            return Trouble("support", ", ".join(told), "; ".join(f"{name}: {why}" for name, why in report.missing.items())), ""
        reference = torch_outputs(module, inputs)
        try:
            outputs = self.target.runtime.infer(model, inputs)
        except (ModelError, RunnerFailed, UnsupportedModel) as error:
            return Trouble("run", "", str(error.found or error)), ""
        if any(value.dtype.kind == "f" and not np.isfinite(value).all() for value in reference.values()):
            return None, "not compared: the untrained network gives NaN or infinity"
        parity = _compared(model)(self.toolchain.export_hop, reference, outputs)
        bad = next((row for row in parity.tensors if not row.passed), None)
        return (None if bad is None else Trouble("parity", "", f"{bad.name}: {bad.reason}", parity)), ""

    def blamed(self, parity: HopParity, model: StoredArtifact, module: torch.nn.Module, inputs: Tensors) -> HopParity:
        """A failed comparison of a file with torch as that of the hop that is to blame, with the faults that explain it."""
        return blame(
            parity,
            model,
            lambda given: torch_outputs(module, given),
            inputs,
            toolchain=self.toolchain,
            device=lambda given: self.target.runtime.infer(model, given),
            compare=_compared(model),
        )

    def attempt(self, module: torch.nn.Module, inputs: Tensors, folder: Path) -> Trouble | None:
        """All of it for a part of a network; nothing where it passes."""
        try:
            model = self.convert(module, inputs, folder)
        except Rejected as error:
            return refusal(error, module)
        return self.trouble(model, module, inputs)[0]


def _compared(model: StoredArtifact) -> Compare:
    """Compares in float32 at the depth of a file."""
    depth = max(BASE_DEPTH, depth_told(model, BASE_DEPTH))
    return lambda name, expected, found: compare_hop(name, expected, found, precision=Precision.FP32, depth=depth)


def refusal(error: Rejected, module: torch.nn.Module) -> Trouble:
    """A converter's refusal, with the operator that it blames, if any; one that knows none gives the module's class, or a line of code."""
    told = error.subject if isinstance(error.subject, str) else ""
    untold = told == type(module).__name__ or " " in told or _CODE_LINE.fullmatch(told) is not None
    return Trouble("convert", "" if untold else told, str(error.found or error.what))


def flat_call(layer: torch.nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[torch.nn.Module, dict[str, Array]]:
    """A call of an inner module as a network of its own: it takes the tensors of the call that the module reads, each with a leading axis of 1,
    and gives all tensors of its result. The inputs are empty where the module reads none. What is in bfloat16 passes its borders in float32."""
    import torch
    from torch.utils import _pytree

    from edgekd.operators.sets import dispatch_watch

    leaves, structure = _pytree.tree_flatten((tuple(args), dict(kwargs)))
    leaves = [leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
    read: set[int] = set()

    def seen(func: Any, given: Any, named: Any) -> None:
        read.update(id(leaf) for leaf in _pytree.tree_leaves((given, named)) if isinstance(leaf, torch.Tensor))

    with torch.no_grad(), dispatch_watch(seen):
        call_args, call_kwargs = _pytree.tree_unflatten(leaves, structure)
        result = layer(*call_args, **call_kwargs)
    taken = [at for at, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor) and id(leaf) in read]
    bare = {at for at in taken if leaves[at].ndim == 0 or leaves[at].shape[0] != 1}
    outputs = [leaf for leaf in _pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor) and leaf.numel()]
    opened = [leaf.ndim == 0 or leaf.shape[0] != 1 for leaf in outputs]

    def forward(self: torch.nn.Module, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        whole = list(leaves)
        for at, tensor in zip(taken, tensors, strict=True):
            whole[at] = (tensor.squeeze(0) if at in bare else tensor).to(leaves[at].dtype)
        given, named = _pytree.tree_unflatten(whole, structure)
        made = [leaf for leaf in _pytree.tree_leaves(self.get_submodule("part")(*given, **named)) if isinstance(leaf, torch.Tensor) and leaf.numel()]
        made = [leaf.float() if leaf.dtype is torch.bfloat16 else leaf for leaf in made]
        return tuple(leaf.unsqueeze(0) if add else leaf for leaf, add in zip(made, opened, strict=True))

    alone: torch.nn.Module = type(type(layer).__name__, (torch.nn.Module,), {"forward": forward})()
    alone.add_module("part", layer)
    inputs = {f"input_{at}": to_numpy(leaves[at].unsqueeze(0) if at in bare else leaves[at]) for at in taken}
    return alone.eval(), inputs

"""Tiny real models, and a real ONNX Runtime in this process, for the tests of converters, quantization and parity."""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from edgekd.artifact import StoredArtifact, store_artifact
from edgekd.contracts import ConvertRequest
from edgekd.records import Capabilities, Format, IOSpec, Precision, SupportReport, TensorSpec
from edgekd.registry import load

torch.set_num_threads(1)


def spec_of(inputs: Mapping[str, np.ndarray], outputs: Mapping[str, Sequence[int]] | None = None) -> IOSpec:
    """An IOSpec with a symbolic batch for arrays `(samples, ...)`."""
    named = outputs or {"output": (1,)}
    return IOSpec(
        inputs=tuple(TensorSpec(name=name, dtype=str(array.dtype), shape=("batch", *array.shape[1:])) for name, array in inputs.items()),
        outputs=tuple(TensorSpec(name=name, dtype="float32", shape=("batch", *shape)) for name, shape in named.items()),
    )


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    """Standard normal float32 values."""
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


class ConvNet(nn.Module):
    """Three convolutions with a batch norm, pooled to four logits."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1)
        self.norm: nn.Module = nn.BatchNorm2d(8)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1)
        self.conv3 = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)
        with torch.no_grad():
            self.get_buffer("norm.running_mean").uniform_(-0.2, 0.2)
            self.get_buffer("norm.running_var").uniform_(0.5, 1.5)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.norm(self.conv1(image)))
        x = torch.relu(self.conv2(x))
        x = torch.relu(self.conv3(x))
        logits: torch.Tensor = self.head(x.mean((2, 3)))
        return logits


class FragileNet(ConvNet):
    """`ConvNet` whose second convolution int8 destroys: a huge weight per output channel, on an input channel that is always zero."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.norm = nn.Identity()
        with torch.no_grad():
            self.get_parameter("conv1.weight")[0] = 0
            self.get_parameter("conv1.bias")[0] = 0
            self.get_parameter("conv2.weight")[:, 0] = 1000.0


class TwoInputs(nn.Module):
    """Two inputs, a nested dictionary and a tuple of outputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.embed = nn.Linear(5, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, image: torch.Tensor, extra: torch.Tensor) -> dict[str, Any]:
        features = torch.relu(self.conv(image)).mean((2, 3)) + self.embed(extra)
        return {"cls": {"logits": self.head(features)}, "parts": (features, features.sum(1, keepdim=True))}


class UNet(nn.Module):
    """Two levels with a resize and a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.down1 = nn.Conv2d(3, 8, 3, padding=1)
        self.down2 = nn.Conv2d(8, 16, 3, padding=1)
        self.bottom = nn.Conv2d(16, 16, 3, padding=1)
        self.merge = nn.Conv2d(32, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 8, 2, stride=2)
        self.out = nn.Conv2d(16, 4, 1)
        self.pool = nn.MaxPool2d(2)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        a = torch.relu(self.down1(image))
        b = torch.relu(self.down2(self.pool(a)))
        c = torch.relu(self.bottom(self.pool(b)))
        d = nn.functional.interpolate(c, scale_factor=2, mode="bilinear")
        e = self.up(self.merge(torch.cat([d, b], 1)))
        out: torch.Tensor = self.out(torch.cat([e, a], 1))
        return out


def export(module: nn.Module, inputs: Mapping[str, np.ndarray], folder: Path, **options: str | int) -> StoredArtifact:
    """The module as ONNX, through the registry."""
    folder.mkdir(parents=True, exist_ok=True)
    request = ConvertRequest(source=module, folder=folder, iospec=spec_of(inputs), example=inputs, options=options)
    artifact = load("converters", "onnx-from-torch")().convert(request)
    assert isinstance(artifact, StoredArtifact)
    return artifact


_KEPT = tempfile.TemporaryDirectory(prefix="edgekd.tests.")


@functools.cache
def exported_convnet(batch: str = "static") -> StoredArtifact:
    """`ConvNet` for images of 3x8x8 as ONNX, exported once per test process."""
    return export(ConvNet(), {"image": noise(4, 3, 8, 8)}, Path(_KEPT.name) / f"convnet-{batch}", batch=batch)


def prepare(source: StoredArtifact, inputs: Mapping[str, np.ndarray], folder: Path) -> StoredArtifact:
    """The artifact made ready for quantization, through the registry."""
    folder.mkdir(parents=True, exist_ok=True)
    request = ConvertRequest(source=source, folder=folder, iospec=source.record.iospec, example=inputs)
    artifact = load("converters", "prepare-onnx")().convert(request)
    assert isinstance(artifact, StoredArtifact)
    return artifact


def torch_outputs(module: nn.Module, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The module's outputs in evaluation mode, by key path."""
    from edgekd.tree import flatten_outputs

    with torch.no_grad():
        outputs = module.eval()(*[torch.from_numpy(array) for array in inputs.values()])
    return {name: value.numpy() for name, value in flatten_outputs(outputs).items()}


def ort_infer(model: StoredArtifact, inputs: Mapping[str, np.ndarray], taps: Sequence[str] = (), *, fused: bool = True) -> dict[str, np.ndarray]:
    """ONNX Runtime with its default optimizations (`fused`) or none, sample by sample."""
    import onnx
    import onnxruntime as ort

    proto = onnx.load(str(model.entry))
    present = {item.name for item in proto.graph.output}
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in taps if name not in present)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    if not fused:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [item.name for item in session.get_outputs()]
    parts: dict[str, list[np.ndarray]] = {name: [] for name in names}
    for position in range(len(next(iter(inputs.values())))):
        feed = {item.name: inputs[item.name][position : position + 1] for item in session.get_inputs()}
        for name, value in zip(names, session.run(names, feed), strict=True):
            parts[name].append(np.asarray(value))
    return {name: np.concatenate(pieces) for name, pieces in parts.items()}


def exact_infer(model: StoredArtifact, inputs: Mapping[str, np.ndarray], taps: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """ONNX Runtime without fusions: int8 in float between its pairs, the file's numbers on every processor. Fused they saturate on an x86 without VNNI."""
    return ort_infer(model, inputs, taps, fused=False)


def changed(source: StoredArtifact, folder: Path, edit: Any) -> StoredArtifact:
    """A copy of an ONNX artifact after `edit(proto)`: how a test plants a fault."""
    import onnx

    proto = onnx.load(str(source.entry))
    edit(proto)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.onnx").write_bytes(proto.SerializeToString())
    return store_artifact(folder, "model.onnx", format=Format.ONNX, precision=source.record.precision, iospec=source.record.iospec)


class HostRuntime:
    """The one part of a runtime that quantization uses, with real numbers; counts its calls."""

    def __init__(self) -> None:
        self.calls = 0

    def infer(self, model: StoredArtifact, inputs: Mapping[str, np.ndarray], taps: Sequence[str] = ()) -> dict[str, np.ndarray]:
        """Outputs and tapped tensors of all samples."""
        self.calls += 1
        return exact_infer(model, inputs, taps)

    def supports(self, model: StoredArtifact) -> SupportReport:
        """Every file is run."""
        return SupportReport(supported=True)


@dataclass
class HostTarget:
    """What `quantize` needs of a target, on ONNX Runtime in this process, with the schemes a test wants."""

    schemes: tuple[str, ...] = ("u8s8",)
    taps: bool = True
    name: str = "host"
    runtime: HostRuntime = field(default_factory=HostRuntime)

    @property
    def capabilities(self) -> Capabilities:
        """ONNX in fp32 and int8."""
        return Capabilities(formats=(Format.ONNX,), precisions=(Precision.INT8, Precision.FP32), schemes=self.schemes, taps=self.taps)

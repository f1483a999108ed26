"""An exporter of another package, as pip would leave it, and a runtime that takes only its files: it counts what it converts, and may do it wrongly."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.contracts.plug_in import install

_SOURCE = '''
from pathlib import Path

import torch
from msgspec.structs import replace

from edgekd.artifact import StoredArtifact, store_artifact
from edgekd.records import Format, Precision, SupportReport
from edgekd.registry import load

NOTES = Path(__file__).with_name("conversions.txt")
Null = load("runtimes", "null")


class Counting:
    """Files of ONNX under the name of another format; a line in a file for each module that is converted."""

    name, source, target = "counting-from-torch", "torch", "keras"
    precisions = (Precision.FP32,)
    needs = {"onnxscript": "distill"}
    cost_s = 1.0

    def convert(self, request):
        with NOTES.open("a") as notes:
            notes.write(type(request.source).__name__ + "\\n")
        made = load("converters", "onnx-from-torch")().convert(replace_source(request, spoilt(request.source)))
        return StoredArtifact(replace(made.record, format=Format.KERAS), made.folder)


def replace_source(request, source):
    import dataclasses

    return dataclasses.replace(request, source=source)


def spoilt(module):
    """The module with a hard tanh wherever it has a tanh: a lowering that is wrong for large values."""
    import copy

    module = copy.deepcopy(module)
    for layer in module.modules():
        if isinstance(layer, torch.nn.Tanh):
            layer.forward = torch.nn.functional.hardtanh
    return module


class KerasOnly(Null):
    """The null runtime for those files."""

    name = "keras-only"

    def capabilities(self):
        return replace(super().capabilities(), formats=(Format.KERAS,), precisions=(Precision.FP32,), schemes=())

    def supports(self, model):
        return super().supports(onnx(model))

    def infer(self, model, inputs, taps=()):
        return super().infer(onnx(model), inputs, taps)

    def benchmark(self, request):
        return super().benchmark(replace_models(request))


class Picky(KerasOnly):
    """A device that lacks one operator."""

    name = "picky"

    def supports(self, model):
        import onnx as library

        kinds = {node.op_type for node in library.load(model.entry).graph.node}
        return SupportReport(supported=False, missing={"Erf": "no kernel"}) if "Erf" in kinds or "Gelu" in kinds else super().supports(model)


def onnx(model):
    return StoredArtifact(replace(model.record, format=Format.ONNX), model.folder)


def replace_models(request):
    import dataclasses

    return dataclasses.replace(request, models={label: onnx(model) for label, model in request.models.items()})
'''


def install_counting(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The exporter `counting-from-torch` and the runtimes `keras-only` and `picky` until the test ends; the file that lists conversions."""
    install(folder, monkeypatch, _SOURCE, converters={"counting-from-torch": "Counting"}, runtimes={"keras-only": "KerasOnly", "picky": "Picky"})
    return folder / "conversions.txt"

"""Converters of another package, as pip would leave them: tiny fake edges around an ONNX file, some with a fault."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.contracts.plug_in import install

_SOURCE = '''
from edgekd.artifact import store_artifact
from edgekd.models.onnx_file import load_model, write_model
from edgekd.records import Format, Precision
from edgekd.storage import copy_file


class Copy:
    """The file of the source under another name and format."""

    precisions = (Precision.FP32,)
    cost_s = 1.0
    scale = 1.0

    def convert(self, request):
        entry = {"saved_model": "saved_model.pb", "keras": "model.keras", "onnx": "model.onnx"}[self.target]
        if self.scale == 1.0:
            copy_file(request.source.entry, request.folder / entry)
        else:
            import onnx
            model = load_model(request.source.entry)
            weight = model.graph.initializer[0]
            weight.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(weight) * self.scale, weight.name))
            write_model(model, request.folder, entry)
        given = Precision.FP16 if self.name == "fake-liar" else Precision.FP32
        return store_artifact(request.folder, entry, format=Format(self.target), precision=given, iospec=request.source.record.iospec)


class Pack(Copy):
    name, source, target = "fake-pack", "onnx", "saved_model"


class LinearToSavedModel(Copy):
    """A torch.nn.Linear as an ONNX file that is called a SavedModel."""

    name, source, target = "fake-saved-model-from-linear", "torch", "saved_model"

    def convert(self, request):
        import onnx

        (x,), (y,) = request.iospec.inputs, request.iospec.outputs
        values = [item.detach().numpy() for item in request.source.parameters()]
        graph = onnx.helper.make_graph(
            [onnx.helper.make_node("Gemm", [x.name, "w", "b"], [y.name], transB=1)],
            "linear",
            [onnx.helper.make_tensor_value_info(x.name, onnx.TensorProto.FLOAT, [1, *x.shape[1:]])],
            [onnx.helper.make_tensor_value_info(y.name, onnx.TensorProto.FLOAT, [1, *y.shape[1:]])],
            [onnx.numpy_helper.from_array(value, name) for name, value in zip("wb", values)],
        )
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
        write_model(model, request.folder, "saved_model.pb")
        return store_artifact(request.folder, "saved_model.pb", format=Format.SAVED_MODEL, precision=Precision.FP32, iospec=request.iospec)


class LinearToOnnx(LinearToSavedModel):
    """A torch.nn.Linear as an ONNX file; `extra` operators that change nothing make it slower, `scale` makes it wrong."""

    name, source, target = "fake-onnx-from-linear", "torch", "onnx"
    extra, scale = 0, 1.0

    def convert(self, request):
        import onnx

        (x,), (y,) = request.iospec.inputs, request.iospec.outputs
        weight, bias = [item.detach().numpy() for item in request.source.parameters()]
        names = ["linear", *(f"more_{number}" for number in range(self.extra))]
        nodes = [onnx.helper.make_node("Gemm", [x.name, "w", "b"], ["linear"], transB=1)]
        nodes += [onnx.helper.make_node("Mul", [before, "one"], [after]) for before, after in zip(names, names[1:])]
        nodes[-1].output[0] = y.name
        values = {"w": weight * self.scale, "b": bias, "one": weight[:1, :1] * 0 + 1}
        graph = onnx.helper.make_graph(
            nodes,
            "linear",
            [onnx.helper.make_tensor_value_info(x.name, onnx.TensorProto.FLOAT, [1, *x.shape[1:]])],
            [onnx.helper.make_tensor_value_info(y.name, onnx.TensorProto.FLOAT, [1, *y.shape[1:]])],
            [onnx.numpy_helper.from_array(value, name) for name, value in values.items()],
        )
        model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
        write_model(model, request.folder, "model.onnx")
        return store_artifact(request.folder, "model.onnx", format=Format.ONNX, precision=Precision.FP32, iospec=request.iospec)


class LinearToOnnxSlow(LinearToOnnx):
    name, extra = "fake-onnx-from-linear-slow", 5


class LinearToOnnxWrong(LinearToOnnx):
    name, scale = "fake-onnx-from-linear-wrong", 1.5


class LinearToOnnxNever(LinearToOnnx):
    name = "fake-onnx-from-linear-never"

    def convert(self, request):
        from edgekd.errors import ConversionRejected

        raise ConversionRejected("the operator Linear is too square", subject="Linear")


class Failing(LinearToOnnx):
    """Ends in the error of that name, which a converter may raise on its way."""

    def convert(self, request):
        from edgekd import errors

        kind = self.name.rpartition("-")[2]
        if kind == "missing":
            raise errors.MissingEnvironment("onnx2tf", found="no folder", purpose="this road", hint="edgekd env create onnx2tf")
        errors_of = {"environment": errors.EnvironmentFailed, "model": errors.ModelError, "config": errors.ConfigError, "runner": errors.RunnerFailed}
        raise errors_of[kind](f"the {kind} is at fault")


class FailingEnvironment(Failing):
    name = "fake-failing-environment"


class FailingModel(Failing):
    name = "fake-failing-model"


class FailingConfig(Failing):
    name = "fake-failing-config"


class FailingRunner(Failing):
    name = "fake-failing-runner"


class FailingMissing(Failing):
    name = "fake-failing-missing"


class LinearToOnnxElsewhere(LinearToOnnx):
    name = "fake-onnx-from-linear-elsewhere"
    needs = {"no_such_module_anywhere": "x86"}


class Unpack(Copy):
    name, source, target = "fake-unpack", "saved_model", "onnx"


class KerasToOnnx(Copy):
    name, source, target = "fake-onnx-from-keras", "keras", "onnx"
    environment = "onnx2tf"


class KerasToOnnxHere(Copy):
    name, source, target = "fake-onnx-from-keras-here", "keras", "onnx"
    needs = {"no_such_module_anywhere": "", "no_such_other_module": "x86"}


class KerasDear(Copy):
    name, source, target = "fake-dear", "keras", "onnx"
    cost_s = 100.0


class Polish(Copy):
    name, source, target = "fake-polish", "onnx", "onnx"


class Spoil(Copy):
    name, source, target = "fake-spoil", "onnx", "onnx"
    scale = 1.5


class Liar(Copy):
    name, source, target = "fake-liar", "onnx", "onnx"


class Foreign(Copy):
    name, source, target = "fake-foreign", "onnx", "paper"
'''


def install_converters(folder: Path, monkeypatch: pytest.MonkeyPatch, **names: str) -> None:
    """Converters by entry points until the test ends: `fake_pack="Pack"` registers that class as `fake-pack`."""
    install(folder, monkeypatch, _SOURCE, converters={name.replace("_", "-"): attribute for name, attribute in names.items()})

"""TFLite from torch without TensorFlow: parity, names, layouts, odd outputs, recurrent nets, refusals that name the place, silence."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgekd.artifact import StoredArtifact
from edgekd.contracts import ConvertRequest
from edgekd.errors import ConfigError, ConversionRejected, DataError
from edgekd.models.tflite_artifact import fit_layouts
from edgekd.models.tflite_file import load_model, read_graph
from edgekd.records import IOSpec, TensorSpec
from edgekd.registry import load
from edgekd.testing import ConverterContract
from tests.contracts.litert_nets import Borders, Recurrent, Residual, SqueezeExcite, Transformer, convert, images, native, one_by_one, sequences
from tests.contracts.tiny_models import ConvNet, UNet, noise, spec_of

pytestmark = [pytest.mark.torch, pytest.mark.environments]

_litert: Any = importlib.import_module("edgekd.converters._litert")

TINY = {"image": noise(2, 3, 8, 8)}


class TestTfliteFromTorchContract(ConverterContract):
    converter_name = "tflite-from-torch"

    def request(self, folder: Path) -> ConvertRequest:
        return ConvertRequest(source=ConvNet(), folder=folder, iospec=spec_of(TINY), example=TINY)

    def unusable_source(self, folder: Path) -> object:
        return "not a module"


NETS: dict[str, tuple[Callable[[], nn.Module], dict[str, np.ndarray]]] = {
    "batch norm": (Residual, images(4)),
    "squeeze-excite and hard-swish": (SqueezeExcite, images(4)),
    "lstm and gru": (Recurrent, sequences(4)),
    "transformer block": (Transformer, sequences(4)),
    "u-net": (UNet, {"image": noise(3, 3, 8, 8)}),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, StoredArtifact]:
    return {name: convert(net(), inputs, tmp_path_factory.mktemp("net")) for name, (net, inputs) in NETS.items()}


@pytest.mark.parametrize("name", NETS)
def test_a_converted_net_computes_what_torch_does(name: str, made: dict[str, StoredArtifact]) -> None:
    net, inputs = NETS[name]
    reference = one_by_one(net(), inputs)
    answer = _litert.host_infer(made[name], inputs)
    assert list(answer) == list(reference) == [tensor.name for tensor in made[name].record.iospec.outputs]
    for key, value in reference.items():
        assert np.ptp(value) > 0.01
        np.testing.assert_allclose(answer[key], value, atol=1e-4, rtol=0)


def test_operators_are_named_after_their_modules_and_counted(made: dict[str, StoredArtifact]) -> None:
    record = made["batch norm"].record
    convolutions = [name for name, kind in json.loads(record.metadata["ops"]) if kind == "CONV_2D"]
    assert convolutions == [f"{path}/CONV_2D" for path in ("stem.0", "first.0", "first.3", "second.0", "second.3", "skip")]
    counts = json.loads(record.metadata["op_counts"])
    assert counts["CONV_2D"] == 6
    assert "MUL" not in counts
    assert int(record.metadata["transposes"]) == counts["TRANSPOSE"]
    assert int(record.metadata["op_total"]) == sum(counts.values())
    assert record.iospec.inputs[0].layout == "NCHW"


def test_a_recurrent_net_is_unrolled_and_says_so(made: dict[str, StoredArtifact]) -> None:
    metadata = made["lstm and gru"].record.metadata
    assert metadata["recurrent_steps"] == "15"
    assert int(metadata["op_total"]) > 150
    assert made["transformer block"].record.metadata["recurrent_steps"] == "0"


def test_channel_last_takes_and_gives_nhwc_and_saves_transpositions(made: dict[str, StoredArtifact], tmp_path: Path) -> None:
    net, inputs = NETS["u-net"]
    last = convert(net(), inputs, tmp_path, channel_last=True)
    spec = native(net(), inputs)
    assert [(tensor.shape, tensor.layout) for tensor in (*last.record.iospec.inputs, *last.record.iospec.outputs)] == [
        ((1, 8, 8, 3), "NHWC"),
        ((1, 8, 8, 4), "NHWC"),
    ]
    answer = _litert.host_infer(last, fit_layouts(inputs, spec, last.record.iospec))
    assert answer["output"].shape == (3, 8, 8, 4)
    np.testing.assert_allclose(fit_layouts(answer, last.record.iospec, spec)["output"], one_by_one(net(), inputs)["output"], atol=1e-4, rtol=0)
    assert (last.record.metadata["transposes"], made["u-net"].record.metadata["transposes"]) == ("0", "2")
    assert json.loads(last.record.metadata["layouts"]) == {"image": "NHWC", "output": "NHWC"}


def test_odd_inputs_and_outputs_keep_their_names_and_values(tmp_path: Path) -> None:
    inputs = {"image": noise(3, 3, 8, 8), "extra": noise(3, 5), "idle": noise(3, 2)}
    borders = convert(Borders(), inputs, tmp_path)
    reference = one_by_one(Borders(), inputs)
    assert list(reference) == ["cls.logits", "parts.0", "parts.1", "again", "constant", "passed"]
    answer = _litert.host_infer(borders, inputs)
    assert list(answer) == list(reference)
    for name, value in reference.items():
        np.testing.assert_allclose(answer[name], value, atol=1e-5)
    graph = read_graph(load_model(borders.entry))
    assert list(graph.inputs) == ["image", "extra", "idle"]
    names = json.loads(borders.record.metadata["tensor_names"])
    assert names["outputs"]["again"] == names["outputs"]["parts.0"] == "parts.0"
    assert names["outputs"]["passed"] == names["inputs"]["extra"]
    assert len({tensor.name for tensor in graph.tensors}) == len(graph.tensors)


def test_whole_number_inputs_become_32_bit(tmp_path: Path) -> None:
    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.embed = nn.Embedding(10, 4)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.embed(tokens).sum(1)
            return out

    inputs = {"tokens": np.array([[1, 2, 3], [9, 0, 4]], dtype=np.int64)}
    tokens = convert(Tokens(), inputs, tmp_path)
    assert tokens.record.iospec.inputs[0].dtype == "int32"
    np.testing.assert_allclose(_litert.host_infer(tokens, inputs)["output"], one_by_one(Tokens(), inputs)["output"], atol=1e-5)
    with pytest.raises(DataError, match="wrong type"):
        _litert.host_infer(tokens, {"tokens": np.full((1, 3), 2**40)})


def request(module: nn.Module, folder: Path, inputs: dict[str, np.ndarray], spec: IOSpec | None = None, **options: str | bool) -> ConvertRequest:
    return ConvertRequest(source=module, folder=folder, iospec=spec or spec_of(inputs), example=inputs, options=options)


def refused(error: type[Exception], match: str, asked: ConvertRequest) -> Exception:
    with pytest.raises(error, match=match) as raised:
        load("converters", "tflite-from-torch")().convert(asked)
    assert not list(asked.folder.iterdir())
    return raised.value


def test_a_dynamic_batch_is_refused_before_the_library_sees_it(tmp_path: Path) -> None:
    refused(ConversionRejected, "fixed batch", request(ConvNet(), tmp_path, TINY, batch="dynamic"))
    spec = IOSpec(inputs=spec_of(TINY).inputs, outputs=spec_of(TINY).outputs, static_binding={"batch": 4})
    refused(ConversionRejected, "batch of 1", request(ConvNet(), tmp_path, TINY, spec))


def test_every_named_axis_is_bound(tmp_path: Path) -> None:
    def spec(**binding: int) -> IOSpec:
        axes = ("batch", "steps", 4)
        return IOSpec(inputs=(TensorSpec(name="sequence", dtype="float32", shape=axes),), outputs=spec_of(sequences(1)).outputs, static_binding=dict(binding))

    (tmp_path / "no").mkdir()
    refused(DataError, "another size", request(Transformer(), tmp_path / "no", sequences(1), spec(steps=7)))
    artifact = load("converters", "tflite-from-torch")().convert(request(Transformer(), tmp_path, sequences(1), spec()))
    assert artifact.record.iospec.inputs[0].shape == (1, 5, 4)
    assert artifact.record.iospec.static_binding == {"batch": 1, "steps": 5}


def test_an_unknown_option_and_a_missing_example_are_refused(tmp_path: Path) -> None:
    refused(ConfigError, "channel_last", request(ConvNet(), tmp_path, TINY, channels_last=True))
    refused(ConfigError, "truth value", request(ConvNet(), tmp_path, TINY, channel_last="yes"))
    refused(DataError, "no input", ConvertRequest(source=ConvNet(), folder=tmp_path, iospec=spec_of(TINY), example={}))


class Decomposes(nn.Module):
    def forward(self, image: torch.Tensor) -> torch.Tensor:
        values: torch.Tensor = torch.linalg.svd(image.mean(1))[1]
        return values


class Decides(nn.Module):
    """An LSTM whose input decides where the program goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(2, 2, batch_first=True)

    def forward(self, sequence: torch.Tensor) -> torch.Tensor:
        if sequence.sum() > 0:
            sequence = -sequence
        out: torch.Tensor = self.lstm(sequence)[0]
        return out


def test_an_operator_that_cannot_be_converted_is_named_with_its_line(tmp_path: Path) -> None:
    error = refused(ConversionRejected, r"aten\._linalg_svd \(test_tflite_from_torch\.py:\d+\).*replace the operator", request(Decomposes(), tmp_path, TINY))
    assert getattr(error, "subject", "") == "aten._linalg_svd"


def test_a_long_recurrent_net_that_fails_is_told_about_its_unrolling(tmp_path: Path) -> None:
    refused(ConversionRejected, "1300 recurrent steps unroll to about 20800 operators", request(Decides(), tmp_path, {"sequence": noise(1, 1300, 2)}))
    refused(ConversionRejected, "control flow that depends on values", request(Decides(), tmp_path, {"sequence": noise(1, 3, 2)}))


def test_the_same_module_gives_the_same_bytes_in_another_process(tmp_path: Path) -> None:
    here = convert(ConvNet(), TINY, tmp_path / "here")
    code = (
        "import sys; from pathlib import Path; from tests.contracts.litert_nets import convert; from tests.contracts.tiny_models import ConvNet, noise\n"
        "made = convert(ConvNet(), {'image': noise(2, 3, 8, 8)}, Path(sys.argv[1])); print(made.record.files['model.tflite'])"
    )
    root = Path(__file__).resolve().parents[2]
    env = {**os.environ, "PYTHONPATH": str(root), "PYTHONHASHSEED": "7"}
    there = subprocess.run([sys.executable, "-c", code, str(tmp_path / "there")], capture_output=True, text=True, env=env, cwd=root, check=True, timeout=400)
    assert there.stdout.strip() == here.record.files["model.tflite"]


def test_what_is_tapped_is_every_tensor_of_the_file(made: dict[str, StoredArtifact]) -> None:
    net, inputs = NETS["batch norm"]
    tapped = _litert.host_infer(made["batch norm"], inputs, taps=("stem.0/CONV_2D", "ADD"))
    module = net().eval()
    with torch.no_grad():
        stem = module.get_submodule("stem")(torch.from_numpy(inputs["image"])).numpy()
    np.testing.assert_allclose(tapped["stem.0/CONV_2D"].transpose(0, 3, 1, 2), stem, atol=1e-5)
    assert tapped["ADD"].shape == (4, 12, 12, 8)
    with pytest.raises(DataError, match=r"stem\.0/CONV_2D \(did you mean this\?\)"):
        _litert.host_infer(made["batch norm"], inputs, taps=("stem.0/CONV2D",))


def test_a_quiet_block_keeps_what_c_and_python_say(capfd: pytest.CaptureFixture[str]) -> None:
    print("before", flush=True)
    with _litert.quiet() as noise_:
        os.write(2, b"from C\n")
        print("from Python")
        warnings.warn("from a warning", UserWarning, stacklevel=1)
    print("after")
    assert capfd.readouterr().out == "before\nafter\n"
    assert _litert.tail(noise_) == "from Python | from C | from a warning"

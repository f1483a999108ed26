"""onnx2tf in its environment: precisions, layouts, names, sequences, and what it refuses or what kills it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edgekd.artifact import StoredArtifact
from edgekd.contracts import ConvertRequest
from edgekd.conversion.environments import environment_python
from edgekd.errors import ConfigError, ConversionRejected, MissingEnvironment, WorkerFailed
from edgekd.models.onnx_artifact import import_onnx
from edgekd.records import Precision
from edgekd.testing import ConverterContract
from tests.contracts.tiny_models import TwoInputs, UNet, changed, export, exported_convnet, noise
from tests.environments.environment_kit import Sequence, convert, request, signal_to_error_db

pytestmark = [pytest.mark.environments, pytest.mark.slow, pytest.mark.torch]

IMAGE = {"image": noise(16, 3, 8, 8)}
Need = Callable[[str], dict[str, str]]


class TestTfliteFromOnnxContract(ConverterContract):
    converter_name = "tflite-from-onnx"

    @pytest.fixture(autouse=True)
    def _environment(self, need: Need) -> None:
        self.options = need("onnx2tf")

    def request(self, folder: Path) -> ConvertRequest:
        return request(exported_convnet(), IMAGE, folder, scheme="static_int8", **self.options)

    def unusable_source(self, folder: Path) -> object:
        return "not an artifact"


@pytest.fixture(scope="module")
def unet(tmp_path_factory: pytest.TempPathFactory) -> StoredArtifact:
    return export(UNet(), {"image": noise(1, 3, 16, 16)}, tmp_path_factory.mktemp("unet"))


@pytest.mark.parametrize(
    ("precision", "scheme", "at_least_db", "kept"),
    [
        ("fp32", "", 100.0, Precision.FP32),
        ("fp16", "", 50.0, Precision.FP16),
        ("", "static_int8", 25.0, Precision.INT8),
        ("", "dynamic_int8", 30.0, Precision.INT8),
    ],
)
def test_an_image_net_becomes_channel_last_in_every_precision(
    need: Need, unet: StoredArtifact, tmp_path: Path, precision: str, scheme: str, at_least_db: float, kept: Precision
) -> None:
    inputs = {"image": noise(16, 3, 16, 16)}
    options = {**need("onnx2tf"), **({"precision": precision} if precision else {})}
    made = convert("tflite-from-onnx", request(unet, inputs, tmp_path, scheme=scheme, **options))
    assert made.record.precision is kept
    (image,), (output,) = made.record.iospec.inputs, made.record.iospec.outputs
    assert (image.shape, image.layout, image.dtype) == ((1, 16, 16, 3), "NHWC", "float32")
    assert (output.shape, output.layout, output.dtype) == ((1, 16, 16, 4), "NHWC", "float32")
    assert made.record.metadata["transposes"] == "0"
    assert signal_to_error_db(unet, made, inputs)["output"] > at_least_db


def test_two_inputs_and_three_outputs_keep_their_names_and_order(need: Need, tmp_path: Path) -> None:
    inputs = {"image": noise(8, 3, 8, 8), "extra": noise(8, 5, seed=1)}
    source = export(TwoInputs(), inputs, tmp_path / "onnx")
    made = convert("tflite-from-onnx", request(source, inputs, tmp_path / "made", scheme="static_int8", **need("onnx2tf")))
    assert [tensor.name for tensor in made.record.iospec.inputs] == ["image", "extra"]
    assert [tensor.name for tensor in made.record.iospec.outputs] == ["cls.logits", "parts.0", "parts.1"]
    assert min(signal_to_error_db(source, made, inputs).values()) > 25


@pytest.fixture(scope="module")
def sequence(tmp_path_factory: pytest.TempPathFactory) -> StoredArtifact:
    return export(Sequence(), {"x": noise(1, 7, 6)}, tmp_path_factory.mktemp("sequence"))


def test_a_sequence_keeps_its_axes_and_its_numbers(need: Need, sequence: StoredArtifact, tmp_path: Path) -> None:
    inputs = {"x": noise(8, 7, 6)}
    made = convert("tflite-from-onnx", request(sequence, inputs, tmp_path, **need("onnx2tf")))
    assert made.record.iospec.inputs[0].shape == (1, 7, 6)
    assert made.record.metadata["kept_inputs"] == "x"
    assert signal_to_error_db(sequence, made, inputs)["output"] > 100


def test_a_converter_that_crashes_is_a_clear_error_and_leaves_nothing(need: Need, sequence: StoredArtifact, tmp_path: Path) -> None:
    """TensorFlow's converter dies by a signal when it calibrates the loop that onnx2tf makes of an LSTM."""
    with pytest.raises(WorkerFailed) as raised:
        convert("tflite-from-onnx", request(sequence, {"x": noise(8, 7, 6)}, tmp_path, scheme="static_int8", **need("onnx2tf")))
    assert raised.value.reason == "crash"
    assert "SIG" in str(raised.value)
    assert raised.value.log.is_file()
    assert list(tmp_path.iterdir()) == []


def test_a_converter_that_takes_too_long_or_too_much_is_ended(need: Need, tmp_path: Path) -> None:
    limits: dict[str, dict[str, Any]] = {"timeout": {"timeout_s": 1}, "memory": {"memory_mb": 100}}
    for reason, limit in limits.items():
        with pytest.raises(WorkerFailed) as raised:
            convert("tflite-from-onnx", request(exported_convnet(), IMAGE, tmp_path, **need("onnx2tf"), **limit))
        assert raised.value.reason == reason
    assert list(tmp_path.iterdir()) == []


def test_a_wrongly_kept_layout_is_found_or_harmless_but_never_silent(need: Need, tmp_path: Path) -> None:
    made = convert("tflite-from-onnx", request(exported_convnet(), IMAGE, tmp_path, keep_inputs="image", **need("onnx2tf")))
    assert made.record.iospec.inputs[0].shape == (1, 3, 8, 8)
    assert signal_to_error_db(exported_convnet(), made, IMAGE)["output"] > 100


def test_an_operator_that_onnx2tf_lacks_is_named(need: Need, tmp_path: Path) -> None:
    def edit(proto: onnx.ModelProto) -> None:
        node = next(node for node in proto.graph.node if node.op_type == "Relu")
        node.op_type, node.domain = "NoSuchOperator", "com.example"
        proto.opset_import.append(onnx.helper.make_opsetid("com.example", 1))

    source = changed(exported_convnet(), tmp_path / "odd", edit)
    with pytest.raises(WorkerFailed, match="NoSuchOperator"):
        convert("tflite-from-onnx", request(source, IMAGE, tmp_path / "made", **need("onnx2tf")))


def test_int8_of_onnx2tf_itself_gives_the_same_numbers(need: Need, home: Path | None, unet: StoredArtifact, tmp_path: Path) -> None:
    """The file equals what the command `onnx2tf -oiqt -qt per-channel` writes, run by hand, but for the names inside."""
    import subprocess

    inputs = {"image": noise(16, 3, 16, 16)}
    made = convert("tflite-from-onnx", request(unet, inputs, tmp_path / "made", scheme="static_int8", **need("onnx2tf")))
    np.save(tmp_path / "calibration.npy", np.transpose(inputs["image"], (0, 2, 3, 1)))
    np.save(tmp_path / "calibration_image_sample_data_20x128x128x3_float32.npy", np.zeros((20, 128, 128, 3), np.float32))
    (tmp_path / "m.onnx").write_bytes(unet.entry.read_bytes())
    python = environment_python("onnx2tf", purpose="a test", path=home)
    words = ["-i", "m.onnx", "-o", "out", "-osd", "-n", "-oiqt", "-qt", "per-channel", "-iqd", "int8", "-oqd", "int8"]
    words += ["-cind", "image", "calibration.npy", "0.0", "1.0"]
    variables = {"PATH": f"{python.parent}:/usr/bin:/bin", "HOME": str(tmp_path)}
    subprocess.run([str(python.parent / "onnx2tf"), *words], cwd=tmp_path, env=variables, check=True, capture_output=True, timeout=600)
    from ai_edge_litert.interpreter import Interpreter
    from edgekd.converters._litert import host_infer  # type: ignore[import-not-found]

    runner = Interpreter(str(tmp_path / "out" / "m_integer_quant.tflite"), num_threads=1)
    runner.allocate_tensors()
    sample = np.transpose(inputs["image"][:1], (0, 2, 3, 1))
    runner.set_tensor(runner.get_input_details()[0]["index"], np.ascontiguousarray(sample))
    runner.invoke()
    theirs = runner.get_tensor(runner.get_output_details()[0]["index"])
    np.testing.assert_allclose(host_infer(made, {"image": sample})["output"], theirs, atol=1e-6)


def test_a_dynamic_axis_is_refused_by_name_before_anything_starts(tmp_path: Path) -> None:
    source = import_onnx(exported_convnet("dynamic").entry, tmp_path / "in", binding={})
    with pytest.raises(ConversionRejected, match="'batch' of 'image' is dynamic") as raised:
        convert("tflite-from-onnx", request(source, IMAGE, tmp_path / "made", environments=str(tmp_path)))
    assert "binding" in str(raised.value)


def test_wrong_requests_are_refused_before_anything_starts(tmp_path: Path) -> None:
    source = exported_convnet()
    for options, words in (({"keep_inputs": "imag"}, "did you mean"), ({"precision": "int4"}, "precision"), ({"quality": "high"}, "quality")):
        with pytest.raises(ConfigError, match=words):
            convert("tflite-from-onnx", request(source, IMAGE, tmp_path, environments=str(tmp_path), **options))
    with pytest.raises(MissingEnvironment, match="edgekd env create onnx2tf"):
        convert("tflite-from-onnx", request(source, IMAGE, tmp_path, environments=str(tmp_path)))

"""onnx-tf and TensorFlow in their environments: ONNX to SavedModel, Keras to SavedModel, SavedModel to TFLite."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgekd.artifact import StoredArtifact, store_artifact
from edgekd.contracts import ConvertRequest
from edgekd.conversion.environments import environment_python
from edgekd.errors import ConversionRejected, ModelError, WorkerFailed
from edgekd.records import Format, IOSpec, Precision, TensorSpec
from edgekd.registry import load
from edgekd.testing import ConverterContract
from tests.contracts.tiny_models import ConvNet, exported_convnet, noise
from tests.environments.environment_kit import Sequence, convert, legacy_onnx, request, signal_to_error_db

pytestmark = [pytest.mark.environments, pytest.mark.slow, pytest.mark.torch]

IMAGE = {"image": noise(16, 3, 8, 8)}
Need = Callable[[str], dict[str, str]]


@pytest.fixture(scope="module")
def legacy(tmp_path_factory: pytest.TempPathFactory) -> StoredArtifact:
    return legacy_onnx(ConvNet(), IMAGE, tmp_path_factory.mktemp("legacy"), 13)


@pytest.fixture(scope="module")
def saved(legacy: StoredArtifact, need: Need, tmp_path_factory: pytest.TempPathFactory) -> StoredArtifact:
    return convert("saved-model-from-onnx", request(legacy, IMAGE, tmp_path_factory.mktemp("saved"), **need("onnx-tf")))


class TestSavedModelFromOnnxContract(ConverterContract):
    converter_name = "saved-model-from-onnx"

    @pytest.fixture(autouse=True)
    def _environment(self, need: Need, legacy: StoredArtifact) -> None:
        self.options, self.legacy = need("onnx-tf"), legacy

    def request(self, folder: Path) -> ConvertRequest:
        return request(self.legacy, IMAGE, folder, **self.options)

    def unusable_source(self, folder: Path) -> object:
        return exported_convnet()


class TestTfliteFromSavedModelContract(ConverterContract):
    converter_name = "tflite-from-saved-model"

    @pytest.fixture(autouse=True)
    def _environment(self, need: Need, saved: StoredArtifact) -> None:
        self.options, self.saved = need("tensorflow"), saved

    def request(self, folder: Path) -> ConvertRequest:
        return request(self.saved, IMAGE, folder, scheme="static_int8", **self.options)

    def unusable_source(self, folder: Path) -> object:
        return "not an artifact"


@pytest.mark.parametrize(("precision", "scheme", "at_least_db"), [("fp32", "", 100.0), ("fp16", "", 50.0), ("", "static_int8", 25.0)])
def test_the_old_road_from_onnx_to_tflite_keeps_the_numbers(
    need: Need, legacy: StoredArtifact, saved: StoredArtifact, tmp_path: Path, precision: str, scheme: str, at_least_db: float
) -> None:
    options = {**need("tensorflow"), **({"precision": precision} if precision else {})}
    made = convert("tflite-from-saved-model", request(saved, IMAGE, tmp_path, scheme=scheme, **options))
    assert made.record.iospec.inputs[0].shape == (1, 3, 8, 8)
    assert int(made.record.metadata["transposes"]) > 0
    assert signal_to_error_db(legacy, made, IMAGE)["output"] > at_least_db


def test_a_saved_model_is_all_of_its_files(saved: StoredArtifact) -> None:
    assert set(saved.record.files) == {"saved_model.pb", "variables/variables.index", "variables/variables.data-00000-of-00001"}
    assert saved.record.entry == "saved_model.pb"
    saved.verify()


def test_int8_is_refused_where_tensorflow_leaves_all_weights_in_float(need: Need, saved: StoredArtifact, tmp_path: Path) -> None:
    with pytest.raises(ConversionRejected, match="nothing in the TFLite file became int8"):
        convert("tflite-from-saved-model", request(saved, IMAGE, tmp_path, scheme="dynamic_int8", **need("tensorflow")))
    assert list(tmp_path.iterdir()) == []


def test_lstm_of_an_old_operator_set_becomes_a_saved_model_whose_tflite_is_refused(need: Need, tmp_path: Path) -> None:
    inputs = {"x": noise(2, 7, 6)}
    source = legacy_onnx(Sequence(), inputs, tmp_path, 12)
    made = convert("saved-model-from-onnx", request(source, inputs, tmp_path / "saved", **need("onnx-tf")))
    assert float(made.record.metadata["float_error"]) < 1e-5
    with pytest.raises(WorkerFailed, match=r"CONCATENATION|WHILE"):
        convert("tflite-from-saved-model", request(made, inputs, tmp_path / "tflite", **need("tensorflow")))


_KERAS = """
import sys, os
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import numpy, keras
keras.utils.set_random_seed(0)
image = keras.Input((8, 8, 3), name="image")
extra = keras.Input((5,), name="extra")
x = keras.layers.Conv2D(8, 3, activation="relu", name="conv")(image)
x = keras.layers.BatchNormalization()(x)
x = keras.layers.Concatenate()([keras.layers.GlobalAveragePooling2D()(x), extra])
model = keras.Model([image, extra], {"logits": keras.layers.Dense(4)(x), "features": x})
model.save(sys.argv[1] + "/model.keras")
feed = {name: numpy.load(sys.argv[1] + "/" + name + ".npy") for name in ("image", "extra")}
for name, value in model.predict(feed, verbose=0).items():
    numpy.save(sys.argv[1] + "/" + name + ".npy", value)
unsafe = keras.Sequential([keras.Input((4,)), keras.layers.Lambda(lambda x: x * 2)])
unsafe.save(sys.argv[1] + "/unsafe.keras")
"""


def keras_source(folder: Path, entry: str, inputs: dict[str, tuple[int, ...]], outputs: dict[str, tuple[int, ...]]) -> StoredArtifact:
    def specs(named: dict[str, tuple[int, ...]]) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(name=name, dtype="float32", shape=("batch", *shape), layout="NHWC" if len(shape) == 3 else "") for name, shape in named.items())

    return store_artifact(
        folder, entry, format=Format.KERAS, precision=Precision.FP32, iospec=IOSpec(inputs=specs(inputs), outputs=specs(outputs)), producers={"keras": "3"}
    )


@pytest.fixture(scope="module")
def keras_folder(need: Need, home: Path | None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    need("tensorflow")
    folder = tmp_path_factory.mktemp("keras")
    np.save(folder / "image.npy", noise(16, 8, 8, 3))
    np.save(folder / "extra.npy", noise(16, 5, seed=1))
    python = environment_python("tensorflow", purpose="a test", path=home)
    subprocess.run([str(python), "-c", _KERAS, str(folder)], check=True, capture_output=True, timeout=900)
    return folder


def test_a_keras_file_reaches_tflite_with_its_names_and_numbers(need: Need, keras_folder: Path, tmp_path: Path) -> None:
    source = keras_source(keras_folder, "model.keras", {"image": (8, 8, 3), "extra": (5,)}, {"logits": (4,), "features": (13,)})
    inputs = {name: np.load(keras_folder / f"{name}.npy", allow_pickle=False) for name in ("image", "extra")}
    options = need("tensorflow")
    saved = convert("saved-model-from-keras", request(source, inputs, tmp_path / "saved", **options))
    assert saved.record.format is Format.SAVED_MODEL
    from edgekd.converters._litert import host_infer  # type: ignore[import-not-found]

    for scheme, tolerance in (("", 1e-5), ("static_int8", 0.05)):
        made = convert("tflite-from-saved-model", request(saved, inputs, tmp_path / f"tflite{scheme}", scheme=scheme, **options))
        assert [tensor.name for tensor in made.record.iospec.inputs] == ["image", "extra"]
        assert made.record.iospec.inputs[0].layout == "NHWC"
        found = host_infer(made, inputs)
        for name in ("logits", "features"):
            expected = np.load(keras_folder / f"{name}.npy", allow_pickle=False)
            np.testing.assert_allclose(found[name], expected, atol=tolerance * float(np.abs(expected).max()))


def test_a_keras_file_with_code_inside_is_refused(need: Need, keras_folder: Path, tmp_path: Path) -> None:
    source = keras_source(keras_folder, "unsafe.keras", {"x": (4,)}, {"output": (4,)})
    with pytest.raises(WorkerFailed, match=r"(?i)lambda|unsafe|safe_mode"):
        convert("saved-model-from-keras", request(source, {"x": noise(2, 4)}, tmp_path, **need("tensorflow")))
    (tmp_path / "old.h5").write_bytes(b"x")
    with pytest.raises(ModelError, match=r"\.keras"):
        convert("saved-model-from-keras", request(keras_source(tmp_path, "old.h5", {"x": (4,)}, {"output": (4,)}), {"x": noise(2, 4)}, tmp_path))


@pytest.mark.parametrize(
    ("make", "operator", "advice"),
    [
        (lambda folder: exported_convnet(), "ReduceMean", "opset_version=17"),
        (lambda folder: legacy_onnx(Sequence(), {"x": noise(1, 7, 6)}, folder, 13, "sequence"), "Unsqueeze|Squeeze", "opset_version=12"),
    ],
)
def test_what_onnx_tf_lacks_is_said_before_anything_starts(make: Callable[[Path], StoredArtifact], operator: str, advice: str, tmp_path: Path) -> None:
    source = make(tmp_path)
    converter = load("converters", "saved-model-from-onnx")()
    report = converter.supports(source)
    assert not report.supported
    assert report.missing
    with pytest.raises(ConversionRejected, match=operator) as raised:
        convert("saved-model-from-onnx", request(source, {tensor.name: noise(*tensor.sizes({})) for tensor in source.record.iospec.inputs}, tmp_path / "made"))
    assert advice in str(raised.value)


def test_the_table_of_operators_is_that_of_onnx_tf(need: Need, home: Path | None) -> None:
    import json

    need("onnx-tf")
    python = environment_python("onnx-tf", purpose="a test", path=home)
    code = "import json, onnx_tf.opset_version as v; print(json.dumps({k: n for k, n in v.backend_opset_version.items() if n}))"
    env = {"PATH": "/usr/bin:/bin", "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True, timeout=900, env=env)
    shipped = Path(__file__).resolve().parents[2] / "converters" / "onnx_tf_ops.json"
    assert json.loads(done.stdout.splitlines()[-1]) == json.loads(shipped.read_text(encoding="utf-8"))

"""edgekd.convert over ONNX edges and edges of another package: artifacts, parity at every hop, refusals, files whole or not at all."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

import edgekd
from edgekd.conversion.formats import Edge, FormatGraph
from edgekd.errors import ConfigError, DataError, ModelError, ParityRejected
from edgekd.records import IOSpec, Precision, TensorSpec
from tests.core.convert_plugin import install_converters

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
converting = importlib.import_module("edgekd.conversion.convert")

DATA = np.random.default_rng(0).standard_normal((40, 6)).astype(np.float32)
SPEC = IOSpec(inputs=(TensorSpec(name="x", dtype="float32", shape=(1, 6)),), outputs=(TensorSpec(name="y", dtype="float32", shape=(1, 3)),))


@pytest.fixture
def net(tmp_path: Path) -> Path:
    """Two layers, `x (batch, 6)` to `y (batch, 3)`."""
    generator = np.random.default_rng(1)
    weights = [generator.standard_normal(shape).astype(np.float32) for shape in ((6, 8), (8, 3))]
    graph = onnx.helper.make_graph(
        [
            onnx.helper.make_node("MatMul", ["x", "w0"], ["a"]),
            onnx.helper.make_node("Relu", ["a"], ["b"]),
            onnx.helper.make_node("MatMul", ["b", "w1"], ["y"]),
        ],
        "net",
        [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["batch", 6])],
        [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["batch", 3])],
        [onnx.numpy_helper.from_array(value, f"w{position}") for position, value in enumerate(weights)],
    )
    path = tmp_path / "net.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9), str(path))
    return path


def test_int8_onnx_is_written_and_compared_on_the_given_inputs(net: Path, tmp_path: Path) -> None:
    lines: list[str] = []
    made = edgekd.convert(net, to="onnx", precision="int8", calibration={"x": DATA}, example=DATA[:20], out=tmp_path / "int8.onnx", progress=lines.append)
    assert made.route == ("qdq-from-onnx",)
    assert [(hop.hop, hop.passed, hop.samples) for hop in made.parity] == [("onnx -> onnx int8", True, 20)]
    assert 20.0 < made.parity[0].tensors[0].sqnr_db < 80.0
    assert made.inputs == "20 samples of the example"
    made.stored.verify()
    assert made.artifact.precision is Precision.INT8
    assert made.recipe is not None
    assert (made.recipe.calibration.size, made.recipe.calibration.split, made.recipe.digest()) == (40, "calibration", made.artifact.recipe)
    assert any(node.op_type == "QuantizeLinear" for node in onnx.load(str(tmp_path / "int8.onnx")).graph.node)
    assert lines[0] == "road: onnx --qdq-from-onnx--> onnx int8"
    assert edgekd.convert(tmp_path / "int8.onnx", to="onnx", out=tmp_path / "again.onnx", progress=False).artifact.precision is Precision.INT8


def test_without_inputs_the_result_says_that_they_were_random(net: Path, tmp_path: Path) -> None:
    made = edgekd.convert(net, to="onnx", precision="fp32", via=("prepare-onnx",), out=tmp_path / "p.onnx", progress=False)
    assert "random" in made.inputs
    assert made.route == ("prepare-onnx",)
    assert made.passed


def test_a_road_that_ends_or_starts_where_nothing_runs_says_so(net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_converters(tmp_path / "plugin", monkeypatch, fake_pack="Pack", fake_unpack="Unpack")
    packed = edgekd.convert(net, to="saved_model", via=("fake-pack",), example=DATA, out=tmp_path / "packed", progress=False)
    assert packed.parity == ()
    assert "no runtime" in packed.notes[0]
    back = edgekd.convert(tmp_path / "packed", to="onnx", example=DATA, out=tmp_path / "back.onnx", progress=False)
    assert back.route == ("fake-unpack",)
    assert back.parity == ()
    assert "not compared" in back.notes[0]


def test_a_source_that_nothing_runs_is_not_compared_but_what_follows_is(net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_converters(tmp_path / "plugin", monkeypatch, fake_dear="KerasDear")
    path, via = tmp_path / "model.keras", ("fake-dear", "prepare-onnx")
    path.write_bytes(net.read_bytes())
    told = edgekd.convert(path, to="onnx", iospec=SPEC, via=via, example=DATA[:4], out=tmp_path / "k.onnx", progress=False)
    assert [hop.hop for hop in told.parity] == ["onnx -> onnx"]
    assert "keras -> onnx: not compared" in told.notes[0]


def test_a_hop_that_computes_something_else_is_named_and_nothing_is_written(net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_converters(tmp_path / "plugin", monkeypatch, fake_spoil="Spoil", fake_polish="Polish")
    out = tmp_path / "spoilt.onnx"
    with pytest.raises(ParityRejected, match=r"onnx -> onnx.*allow_divergence") as caught:
        edgekd.convert(net, to="onnx", precision="fp32", via=("fake-spoil",), example=DATA, out=out, progress=False)
    assert caught.value.subject.first_bad == "y"  # type: ignore[attr-defined]
    assert not out.exists()
    made = edgekd.convert(net, to="onnx", precision="fp32", via=("fake-polish", "fake-spoil"), example=DATA, out=out, progress=False, allow_divergence=True)
    assert [hop.passed for hop in made.parity] == [True, False]
    assert not made.passed
    assert out.is_file()


def test_a_converter_that_gives_another_precision_is_refused(net: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_converters(tmp_path / "plugin", monkeypatch, fake_liar="Liar")
    with pytest.raises(ConfigError, match=r"fake-liar.*fp16"):
        edgekd.convert(net, to="onnx", precision="fp32", via=("fake-liar",), out=tmp_path / "x.onnx", progress=False)


def test_a_better_road_that_is_not_ready_is_told_with_the_line_that_makes_it() -> None:
    graph = FormatGraph(
        (Edge("best", "keras", "onnx", Precision.FP32, needs={"no_such_module_anywhere": "x86"}), Edge("other", "keras", "onnx", Precision.FP32, cost_s=99)), {}
    )
    route, passed_over = converting.choose_route("keras", "onnx", "fp32", graph=graph)
    assert route.converters == ("other",)
    assert len(passed_over) == 1
    assert 'pip install "edgekd[x86]"' in passed_over[0]
    with pytest.raises(ConfigError, match=r"pip install \"edgekd\[x86\]\""):
        converting.choose_route("keras", "onnx", "fp32", via=("best",), graph=graph)


def test_a_missing_environment_names_the_line_that_makes_it(net: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="edgekd env create onnx2tf --path"):
        edgekd.convert(net, to="tflite", via=("tflite-from-onnx",), out=tmp_path / "x.tflite", environments=tmp_path / "none", progress=False)


def test_wrong_arguments_are_refused_with_the_next_step(net: Path, tmp_path: Path) -> None:
    out = tmp_path / "x.onnx"
    with pytest.raises(ConfigError, match="calibration"):
        edgekd.convert(net, to="onnx", precision="int8", out=out, progress=False)
    with pytest.raises(ConfigError, match="example="):
        edgekd.convert(net, to="onnx", calibration=DATA, out=out, progress=False)
    with pytest.raises(DataError, match="samples"):
        edgekd.convert(net, to="onnx", precision="int8", calibration=DATA[:, :5], out=out, progress=False)
    with pytest.raises(ConfigError, match="qdq-from-onnx"):
        edgekd.convert(net, to="onnx", precision="int8", calibration=DATA, options={"tflite-from-onnx": {}}, out=out, progress=False)
    with pytest.raises(ModelError, match="ending"):
        edgekd.convert(Path(__file__), to="onnx", out=out, progress=False)
    (tmp_path / "model.keras").write_bytes(b"x")
    with pytest.raises(ConfigError, match="iospec="):
        edgekd.convert(tmp_path / "model.keras", to="tflite", out=out, progress=False)
    assert not out.exists()


def test_a_folder_gets_the_record_and_a_foreign_one_is_left_alone(net: Path, tmp_path: Path) -> None:
    made = edgekd.convert(net, to="onnx", out=tmp_path / "folder", progress=False)
    assert json.loads((tmp_path / "folder" / "artifact.json").read_text())["entry"] == "model.onnx"
    made.stored.verify()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("text")
    with pytest.raises(ConfigError, match="new folder"):
        edgekd.convert(net, to="onnx", out=tmp_path / "mine", progress=False)
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "text"


@pytest.mark.torch
def test_the_reference_is_kept_over_a_format_that_nothing_runs_up_to_int8(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    install_converters(tmp_path / "plugin", monkeypatch, fake_saved_model_from_linear="LinearToSavedModel", fake_unpack="Unpack")
    via, out = ("fake-saved-model-from-linear",), tmp_path / "m.onnx"
    made = edgekd.convert(
        torch.nn.Linear(6, 3), to="onnx", precision="int8", calibration=DATA, example=torch.from_numpy(DATA[:8]), via=via, out=out, progress=False
    )
    assert made.route == ("fake-saved-model-from-linear", "fake-unpack", "qdq-from-onnx")
    assert [hop.hop for hop in made.parity] == ["torch -> saved_model -> onnx", "onnx -> onnx int8"]
    assert made.passed
    assert made.parity[0].tensors[0].max_rel < 1e-5

"""Pre- and post-processing inside or outside the file: equal results, recorded either way, and nothing normalised twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import edgekd
from edgekd.cli.main import cli
from edgekd.errors import ConfigError, DataError
from edgekd.models.notes import read_metadata
from edgekd.parity.compare import tolerance_for
from edgekd.parity.faults import Fault, diagnose, parse_normalization
from edgekd.records import InputProcessing, OutputProcessing, Precision, Processing
from edgekd.teachers import OnnxTeacher

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
node, value, FLOAT = onnx.helper.make_node, onnx.helper.make_tensor_value_info, onnx.TensorProto.FLOAT

RAW = np.random.default_rng(0).integers(0, 256, (12, 3, 8, 8)).astype(np.float32)
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NORMAL = ((RAW / 255 - np.array(MEAN)[:, None, None]) / np.array(STD)[:, None, None]).astype(np.float32)
LIMIT = tolerance_for(Precision.FP32).value


def part(where: str, **more: Any) -> InputProcessing:
    return InputProcessing(where=where, scale=1 / 255, mean=MEAN, std=STD, **more)  # type: ignore[arg-type]


def net(path: Path, *, pads: int = 0) -> Path:
    """A convolution and a layer to four logits of images of 3x8x8."""
    random = np.random.default_rng(1)
    size = 6 + 2 * pads
    weights = {"w": random.standard_normal((4, 3, 3, 3)), "c": random.standard_normal(4), "v": random.standard_normal((4 * size * size, 4)) / size}
    graph = onnx.helper.make_graph(
        [
            node("Conv", ["image", "w", "c"], ["a"], name="conv", pads=[pads] * 4),
            node("Relu", ["a"], ["b"]),
            node("Flatten", ["b"], ["d"]),
            node("MatMul", ["d", "v"], ["logits"], name="head"),
        ],
        "net",
        [value("image", FLOAT, ["batch", 3, 8, 8])],
        [value("logits", FLOAT, ["batch", 4])],
        [onnx.numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()],
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9), str(path))
    return path


def convert(source: Any, out: Path, processing: Processing | None, example: np.ndarray, **more: Any) -> Any:
    return edgekd.convert(source, to=out.suffix[1:], processing=processing, example={"image": example}, out=out, progress=False, **more)


def softmax(logits: np.ndarray) -> np.ndarray:
    raised: np.ndarray = np.exp(logits - logits.max(1, keepdims=True))
    shares: np.ndarray = raised / raised.sum(1, keepdims=True)
    return shares


@pytest.mark.parametrize(("pads", "place"), [(0, "folded"), (1, "nodes")])
def test_inside_on_raw_pixels_equals_outside_on_normalised_ones(tmp_path: Path, pads: int, place: str) -> None:
    source = net(tmp_path / "net.onnx", pads=pads)
    outside = convert(source, tmp_path / "o.onnx", Processing(inputs={"image": part("outside")}), NORMAL)
    inside = convert(source, tmp_path / "i.onnx", Processing(inputs={"image": part("inside")}), RAW)
    expected, found = OnnxTeacher(tmp_path / "o.onnx").outputs({"image": NORMAL}), OnnxTeacher(tmp_path / "i.onnx").outputs({"image": RAW})
    assert np.abs(found["logits"] - expected["logits"]).max() <= LIMIT * np.abs(expected["logits"]).max()
    assert inside.artifact.metadata["normalisation_in"] == f"image: {place}"
    kinds = [item.op_type for item in onnx.load(str(tmp_path / "i.onnx")).graph.node]
    assert ("Mul" in kinds, "BatchNormalization" in kinds) == (place == "nodes", False)
    (taken,), (raw,) = outside.artifact.iospec.inputs, inside.artifact.iospec.inputs
    assert raw.value_range == (0.0, pytest.approx(255.0))
    assert taken.value_range == (pytest.approx(NORMAL.min(), abs=0.1), pytest.approx(NORMAL.max(), abs=0.1))
    assert parse_normalization(taken.normalization).std == pytest.approx(STD)  # type: ignore[union-attr]
    assert parse_normalization(raw.normalization).mean == pytest.approx([255 * mean for mean in MEAN])  # type: ignore[union-attr]
    assert raw.normalization.startswith("inside ")


def test_the_faults_know_what_was_normalised_twice_or_never(tmp_path: Path) -> None:
    source = net(tmp_path / "net.onnx")
    inside = convert(source, tmp_path / "i.onnx", Processing(inputs={"image": part("inside")}), RAW)
    run = OnnxTeacher(tmp_path / "i.onnx").outputs
    twice = diagnose(run, lambda fed: run({"image": (fed["image"] / 255 - _column(MEAN)) / _column(STD)}), {"image": RAW}, specs=inside.artifact.iospec.inputs)
    assert Fault.TWICE in twice.faults()
    outside = convert(source, tmp_path / "o.onnx", Processing(inputs={"image": part("outside")}), NORMAL)
    plain = OnnxTeacher(tmp_path / "o.onnx").outputs
    never = diagnose(plain, lambda fed: plain({"image": fed["image"] * _column(STD) + _column(MEAN)}), {"image": NORMAL}, specs=outside.artifact.iospec.inputs)
    assert Fault.MISSING in never.faults()


def _column(values: tuple[float, ...]) -> np.ndarray:
    return np.array(values, dtype=np.float32)[:, None, None]


def test_inputs_that_contradict_the_processing_are_refused(tmp_path: Path) -> None:
    source, out = net(tmp_path / "net.onnx"), tmp_path / "m.onnx"
    for wrong in (NORMAL, RAW / 255):
        with pytest.raises(DataError, match=r"normalised already.*raw values from 0 to 255"):
            convert(source, out, Processing(inputs={"image": part("inside")}), wrong)
    with pytest.raises(DataError, match="not normalised as the processing says"):
        convert(source, out, Processing(inputs={"image": part("outside")}), RAW)
    with pytest.raises(DataError, match="calibration of the input 'image' are normalised already"):
        convert(source, out, Processing(inputs={"image": part("inside")}), RAW, precision="int8", calibration={"image": NORMAL})
    assert not out.exists()


def test_int8_inside_is_calibrated_on_raw_pixels(tmp_path: Path) -> None:
    made = convert(
        net(tmp_path / "net.onnx", pads=1), tmp_path / "m.onnx", Processing(inputs={"image": part("inside")}), RAW,
        precision="int8", calibration={"image": RAW},
        allow_divergence=True,
    )  # fmt: skip
    expected = OnnxTeacher(net(tmp_path / "net.onnx", pads=1)).outputs({"image": NORMAL})["logits"]
    found = OnnxTeacher(tmp_path / "m.onnx").outputs({"image": RAW})["logits"]
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.97
    assert made.artifact.iospec.inputs[0].value_range == (0.0, pytest.approx(255.0))
    assert json.loads(read_metadata(tmp_path / "m.onnx")["processing"])["inputs"]["image"]["where"] == "inside"


@pytest.mark.parametrize("kind", ["softmax", "sigmoid", "argmax"])
def test_outputs_go_through_their_processing(tmp_path: Path, kind: str) -> None:
    source = net(tmp_path / "net.onnx")
    logits = OnnxTeacher(source).outputs({"image": NORMAL})["logits"]
    processing = Processing(outputs=(OutputProcessing(kind=kind, where="inside"),), labels=("a", "b", "c", "d"))  # type: ignore[arg-type]
    made = convert(source, tmp_path / "m.onnx", processing, NORMAL)
    found = OnnxTeacher(tmp_path / "m.onnx").outputs({"image": NORMAL})["logits"]
    if kind == "argmax":
        np.testing.assert_array_equal(found, logits.argmax(1))
        assert (made.artifact.iospec.outputs[0].dtype, made.artifact.iospec.outputs[0].shape) == ("int64", (1,))
    else:
        np.testing.assert_allclose(found, softmax(logits) if kind == "softmax" else 1 / (1 + np.exp(-logits)), atol=1e-6)
        assert made.artifact.iospec.outputs[0].value_range == (0.0, 1.0)
    assert json.loads(made.artifact.metadata["labels"]) == ["a", "b", "c", "d"]


def test_outside_is_recorded_and_changes_no_node(tmp_path: Path) -> None:
    source = net(tmp_path / "net.onnx")
    processing = Processing(inputs={"image": part("outside")}, outputs=(OutputProcessing(kind="softmax"), OutputProcessing(kind="nms")), labels=("x", "y"))
    made = convert(source, tmp_path / "m.onnx", processing, NORMAL)
    kinds = [[item.op_type for item in onnx.load(str(path)).graph.node] for path in (source, tmp_path / "m.onnx")]
    assert kinds[0] == kinds[1]
    told = Processing.from_json(read_metadata(tmp_path / "m.onnx")["processing"])
    assert [item.output for item in told.outputs] == ["logits", ""]
    assert made.artifact.metadata["processing"] == read_metadata(tmp_path / "m.onnx")["processing"]


def detector(path: Path, *, turned: bool) -> Path:
    """Passes boxes and scores of ten boxes and three classes."""
    scores = ["batch", 3, 10] if turned else ["batch", 10, 3]
    graph = onnx.helper.make_graph(
        [node("Relu", ["raw_boxes"], ["boxes"]), node("Relu", ["raw_scores"], ["scores"])],
        "detector",
        [value("raw_boxes", FLOAT, ["batch", 10, 4]), value("raw_scores", FLOAT, scores)],
        [value("boxes", FLOAT, ["batch", 10, 4]), value("scores", FLOAT, scores)],
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9), str(path))
    return path


def suppressed(boxes: np.ndarray, scores: np.ndarray, iou: float, least: float, most: int) -> np.ndarray:
    """Greedy suppression class by class in plain Python: `(most, 6)`."""

    def overlap(a: np.ndarray, b: np.ndarray) -> float:
        sides = np.minimum(a[2:], b[2:]) - np.maximum(a[:2], b[:2])
        common = float(np.prod(np.maximum(sides, 0)))
        return common / float(np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - common)

    rows = []
    for kind in range(scores.shape[1]):
        kept: list[int] = []
        for index in np.argsort(-scores[:, kind], kind="stable"):
            if scores[index, kind] > least and len(kept) < most and all(overlap(boxes[index], boxes[other]) <= iou for other in kept):
                kept.append(int(index))
        rows += [[*boxes[index], scores[index, kind], kind] for index in kept]
    rows = sorted(rows, key=lambda row: -row[4])[:most]
    return np.array(rows + [[0, 0, 0, 0, 0, -1]] * (most - len(rows)), dtype=np.float32)


@pytest.mark.parametrize("turned", [True, False])
@pytest.mark.parametrize("least", [0.3, 0.999])
def test_boxes_are_suppressed_in_an_onnx_file_as_in_plain_python(tmp_path: Path, turned: bool, least: float) -> None:
    random = np.random.default_rng(5)
    corners = random.uniform(0, 6, (4, 10, 2))
    boxes = np.concatenate([corners, corners + random.uniform(1, 5, (4, 10, 2))], axis=2).astype(np.float32)
    scores = random.uniform(0, 0.99, (4, 10, 3)).astype(np.float32)
    fed = {"raw_boxes": boxes, "raw_scores": scores.transpose(0, 2, 1).copy() if turned else scores}
    nms = OutputProcessing(kind="nms", where="inside", iou_threshold=0.4, score_threshold=least, max_detections=7)
    source = detector(tmp_path / "net.onnx", turned=turned)
    made = edgekd.convert(source, to="onnx", processing=Processing(outputs=(nms,)), example=fed, out=tmp_path / "m.onnx", progress=False)
    assert [(tensor.name, tensor.shape) for tensor in made.artifact.iospec.outputs] == [("detections", (1, 7, 6))]
    found = OnnxTeacher(tmp_path / "m.onnx").outputs(fed)["detections"]
    for sample in range(4):
        np.testing.assert_allclose(found[sample], suppressed(boxes[sample], scores[sample], 0.4, least, 7), atol=1e-6)
    assert (found[..., 5] == -1).all() == (least > 0.99)


def test_what_does_not_fit_is_refused_with_the_next_step(tmp_path: Path) -> None:
    source, out = net(tmp_path / "net.onnx"), tmp_path / "m.onnx"
    nms = OutputProcessing(kind="nms", where="inside")
    cases: list[tuple[Processing, str]] = [
        (Processing(inputs={"imag": part("inside")}), r"image \(did you mean this\?\)"),
        (Processing(inputs={"image": InputProcessing(mean=(0.5, 0.5), std=(1.0, 1.0))}), "2 means"),
        (Processing(inputs={"image": part("inside", layout="NHWC")}), "3 means"),
        (Processing(outputs=(OutputProcessing(kind="softmax", output="logit"),)), r"logits \(did you mean this\?\)"),
        (Processing(outputs=(OutputProcessing(kind="softmax", where="inside", axis=2),)), "no axis 2"),
        (Processing(outputs=(nms,)), "nms reads the output 'boxes'"),
    ]
    for processing, words in cases:
        with pytest.raises(ConfigError, match=words):
            convert(source, out, processing, NORMAL)
    with pytest.raises(ConfigError, match=r"suppression of boxes.*where = \"outside\""):
        convert(source, tmp_path / "m.tflite", Processing(outputs=(nms,)), NORMAL)
    for fields in ({"mean": (0.1, 0.2), "std": (1.0,)}, {"value_range": (1.0, 1.0)}):
        with pytest.raises(ConfigError):
            InputProcessing(**fields)
    with pytest.raises(ConfigError, match="0 to 1"):
        OutputProcessing(kind="nms", iou_threshold=2.0)


def test_the_command_reads_the_processing_from_a_file(tmp_path: Path) -> None:
    source, folder = net(tmp_path / "net.onnx"), tmp_path / "inputs"
    folder.mkdir()
    np.save(folder / "image.npy", RAW)
    text = f'labels = ["a", "b", "c", "d"]\n[inputs.image]\nwhere = "inside"\nscale = {1 / 255!r}\nmean = {list(MEAN)}\nstd = {list(STD)}\n'
    (tmp_path / "p.toml").write_text(f'{text}[[outputs]]\nkind = "softmax"\nwhere = "inside"\n')
    words = ["convert", str(source), "-o", str(tmp_path / "m.onnx"), "--inputs", str(folder), "--processing"]
    done = CliRunner().invoke(cli, [*words, str(tmp_path / "p.toml")])
    assert done.exit_code == 0, done.output
    assert "in the file: labels: a, b, c, d" in done.output
    expected = softmax(OnnxTeacher(source).outputs({"image": NORMAL})["logits"])
    np.testing.assert_allclose(OnnxTeacher(tmp_path / "m.onnx").outputs({"image": RAW})["logits"], expected, atol=1e-5)
    (tmp_path / "bad.toml").write_text(text.replace("scale", "scal"))
    bad = CliRunner().invoke(cli, [*words, str(tmp_path / "bad.toml")])
    assert bad.exit_code == 3
    assert "unknown field `scal`" in bad.output + bad.stderr
    (tmp_path / "p.json").write_bytes(Processing(inputs={"image": part("inside")}).to_json())
    assert CliRunner().invoke(cli, [*words, str(tmp_path / "p.json")]).exit_code == 0


@pytest.mark.torch
def test_a_module_takes_its_processing_along(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(256, 4))
    with torch.no_grad():
        expected = softmax(module(torch.from_numpy(NORMAL)).numpy())
    processing = Processing(inputs={"input": part("inside")}, outputs=(OutputProcessing(kind="softmax", where="inside"),), labels=("a", "b", "c", "d"))
    made = edgekd.convert(module, to="onnx", processing=processing, example={"input": RAW}, out=tmp_path / "m.onnx", progress=False)
    assert made.passed
    found = OnnxTeacher(tmp_path / "m.onnx").outputs({"input": RAW[:1]})["output"]
    np.testing.assert_allclose(found, expected[:1], atol=1e-5)
    assert made.artifact.iospec.inputs[0].value_range == pytest.approx((0.0, 255.0))
    assert json.loads(read_metadata(tmp_path / "m.onnx")["labels"]) == ["a", "b", "c", "d"]

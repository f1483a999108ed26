"""Processing inside an ONNX file made from an ONNX file: compared with the file before, refused where it cannot be right, notes carried on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

import edgekd
from edgekd.artifact import StoredArtifact
from edgekd.cli.main import cli
from edgekd.errors import ConfigError, ModelError, ParityRejected
from edgekd.models.notes import annotate, labels_text, read_metadata
from edgekd.models.onnx_artifact import import_onnx
from edgekd.models.onnx_processing import require_sound
from edgekd.parity.processed import suppressed
from edgekd.records import InputProcessing, OutputProcessing, Processing
from edgekd.teachers import OnnxTeacher

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
node, value, tensor = onnx.helper.make_node, onnx.helper.make_tensor_value_info, onnx.numpy_helper.from_array
FLOAT, BOOL, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.BOOL, onnx.TensorProto.INT64

RAW = np.random.default_rng(0).integers(0, 256, (6, 3, 4, 4)).astype(np.float32)
INSIDE = InputProcessing(where="inside", scale=1 / 255, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.25))
SOFTMAX = OutputProcessing(kind="softmax", where="inside", output="logits")


def save(path: Path, nodes: list[Any], inputs: list[Any], outputs: list[Any], weights: dict[str, np.ndarray], *, told: tuple[Any, ...] = ()) -> Path:
    graph = onnx.helper.make_graph(nodes, "net", inputs, outputs, [tensor(array, name) for name, array in weights.items()], value_info=list(told))
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9), str(path))
    return path


def net(path: Path, *, kind: Any = np.float32, told: tuple[Any, ...] = (), scale: float = 1.0, batch: int | str = "batch") -> Path:
    """A layer to five logits of images of 3x4x4, of any float type."""
    made = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(kind))
    weight = (scale * np.random.default_rng(1).standard_normal((48, 5))).astype(kind)
    nodes = [node("Flatten", ["image"], ["flat"]), node("MatMul", ["flat", "w"], ["logits"])]
    return save(path, nodes, [value("image", made, [batch, 3, 4, 4])], [value("logits", made, [batch, 5])], {"w": weight}, told=told)


def built(source: Any, out: Path, processing: Processing, example: dict[str, np.ndarray] | None = None, **more: Any) -> Any:
    return edgekd.convert(source, to="onnx", processing=processing, example={"image": RAW} if example is None else example, out=out, progress=False, **more)


def test_the_file_is_compared_with_the_one_before_step_by_step(tmp_path: Path) -> None:
    made = built(net(tmp_path / "net.onnx"), tmp_path / "m.onnx", Processing(inputs={"image": INSIDE}, outputs=(SOFTMAX,)))
    assert [(hop.hop, hop.passed, hop.samples) for hop in made.parity] == [("onnx -> onnx with processing", True, 6)]
    assert [row.name for row in made.parity[0].tensors] == ["logits_raw", "logits"]
    assert all(0 < row.tolerance < 1e-4 for row in made.parity[0].tensors)
    assert made.ran_on == {"onnx": "ONNX Runtime in this process"}


def test_a_normalisation_that_loses_its_digits_in_the_file_is_refused_with_numbers(tmp_path: Path) -> None:
    # x * 100 - 1e7 in float32 keeps whole numbers only, where (x - 1e5) / 0.01 runs from 0 to 100
    far = InputProcessing(where="inside", mean=(1e5,), std=(0.01,), value_range=(1e5, 1e5 + 1))
    example = {"image": (1e5 + np.random.default_rng(2).uniform(0, 1, RAW.shape)).astype(np.float32)}
    source, out = net(tmp_path / "net.onnx"), tmp_path / "m.onnx"
    with pytest.raises(ParityRejected, match=r"after onnx -> onnx with processing.*logits: the largest error is 4\.\d*e-03.*outside"):
        built(source, out, Processing(inputs={"image": far}), example)
    assert not out.exists()
    kept = built(source, out, Processing(inputs={"image": far}), example, allow_divergence=True)
    assert (kept.passed, kept.parity[0].first_bad) == (False, "logits")
    assert kept.parity[0].tensors[0].max_rel > 1e-4


def test_classes_are_compared_exactly_where_the_output_is_told_among_the_inner_tensors(tmp_path: Path) -> None:
    source = net(tmp_path / "net.onnx", told=(value("logits", FLOAT, [1, 5]),), batch=1)
    argmax = OutputProcessing(kind="argmax", where="inside", output="logits")
    made = built(source, tmp_path / "m.onnx", Processing(inputs={"image": INSIDE}, outputs=(argmax,)))
    assert [(row.name, row.tolerance) for row in made.parity[0].tensors][1] == ("logits", 0.0)
    onnx.checker.check_model(str(tmp_path / "m.onnx"), full_check=True)


def branching(path: Path, *, reads: str) -> Path:
    """Logits, and a branch of an If that reads one of the outer tensors."""
    inner = [onnx.helper.make_graph([node(kind, [reads], [f"in_{kind}"])], f"branch_{kind}", [], [value(f"in_{kind}", FLOAT, None)]) for kind in ("Neg", "Abs")]
    nodes = [
        node("Flatten", ["image"], ["flat"]),
        node("MatMul", ["flat", "w"], ["logits"]),
        node("ReduceSum", ["logits"], ["sum"], keepdims=0),
        node("Greater", ["sum", "zero"], ["yes"]),
        node("If", ["yes"], ["both"], then_branch=inner[0], else_branch=inner[1]),
        node("ReduceMax", ["both"], ["most"], keepdims=1),
    ]
    weights = {"w": np.random.default_rng(1).standard_normal((48, 5)).astype(np.float32), "zero": np.float32(0)}
    outputs = [value("logits", FLOAT, [1, 5]), value("most", FLOAT, [1] * (4 if reads == "image" else 2))]
    return save(path, nodes, [value("image", FLOAT, [1, 3, 4, 4])], outputs, {name: np.asarray(array) for name, array in weights.items()})


@pytest.mark.parametrize(("reads", "processing"), [("image", Processing(inputs={"image": INSIDE})), ("logits", Processing(outputs=(SOFTMAX,)))])
def test_a_tensor_that_an_inner_graph_reads_is_refused(tmp_path: Path, reads: str, processing: Processing) -> None:
    with pytest.raises(ModelError, match=rf"'{reads}', which the body of an If, Loop or Scan reads.*outside"):
        built(branching(tmp_path / "net.onnx", reads=reads), tmp_path / "m.onnx", processing)
    assert not (tmp_path / "m.onnx").exists()


@pytest.mark.parametrize("kind", [np.float16, np.float64])
def test_the_factors_have_the_type_of_the_input(tmp_path: Path, kind: Any) -> None:
    source = net(tmp_path / "net.onnx", kind=kind, scale=0.05)
    made = built(source, tmp_path / "m.onnx", Processing(inputs={"image": INSIDE}, outputs=(SOFTMAX,)), {"image": RAW.astype(kind)})
    assert made.passed
    normal = (RAW / 255 - np.array(INSIDE.mean)[:, None, None]) / np.array(INSIDE.std)[:, None, None]
    logits = OnnxTeacher(source).outputs({"image": normal.astype(kind)})["logits"].astype(np.float64)
    raised = np.exp(logits - logits.max(1, keepdims=True))
    found = OnnxTeacher(tmp_path / "m.onnx").outputs({"image": RAW.astype(kind)})["logits"]
    assert found.dtype == kind
    np.testing.assert_allclose(found, raised / raised.sum(1, keepdims=True), atol=1e-2 if kind is np.float16 else 1e-6)


def detector(path: Path, classes: int, *, inner: str = "a", kind: Any = FLOAT) -> Path:
    """Passes boxes and scores of four boxes, by way of a tensor `inner`."""
    nodes = [node("Relu", ["raw_boxes"], ["boxes"]), node("Neg", ["raw_scores"], [inner]), node("Neg", [inner], ["scores"])]
    inputs = [value("raw_boxes", kind, [1, 4, 4]), value("raw_scores", kind, [1, 4, classes])]
    return save(path, nodes, inputs, [value("boxes", kind, [1, 4, 4]), value("scores", kind, [1, 4, classes])], {})


def test_a_suppression_whose_name_is_taken_or_whose_axes_nothing_tells_is_refused(tmp_path: Path) -> None:
    random, nms = np.random.default_rng(3), OutputProcessing(kind="nms", where="inside")
    boxes = np.concatenate([random.uniform(0, 2, (2, 4, 2)), random.uniform(2, 5, (2, 4, 2))], axis=2).astype(np.float32)

    def run(source: Path, classes: int, *parts: OutputProcessing, kind: Any = np.float32) -> Any:
        example = {"raw_boxes": boxes.astype(kind), "raw_scores": random.uniform(0, 1, (2, 4, classes)).astype(kind)}
        return built(source, tmp_path / "m.onnx", Processing(outputs=parts), example)

    taken = detector(tmp_path / "taken.onnx", 3, inner="detections")
    with pytest.raises(ConfigError, match=r"tensor 'detections' already.*detections_nms.*output ="):
        run(taken, 3, nms)
    with pytest.raises(ConfigError, match="tensor 'boxes' already"):
        run(taken, 3, OutputProcessing(kind="nms", where="inside", output="boxes"))
    made = run(taken, 3, OutputProcessing(kind="nms", where="inside", output="found"))
    assert [row.name for row in made.parity[0].tensors] == ["boxes", "scores", "found"]
    inner = detector(tmp_path / "inner.onnx", 3, inner="detections_nms_iou")
    assert run(inner, 3, nms).passed
    with pytest.raises(ConfigError, match=r"as many boxes as classes.*boxes \[1, 4, 4\], scores \[1, 4, 4\].*outside"):
        run(detector(tmp_path / "square.onnx", 4), 4, nms)
    with pytest.raises(ConfigError, match=r"float32.*FLOAT16"):
        run(detector(tmp_path / "half.onnx", 3, kind=onnx.TensorProto.FLOAT16), 3, nms, kind=np.float16)
    sigmoid = OutputProcessing(kind="sigmoid", where="inside", output="scores")
    with pytest.raises(ConfigError, match="name it before nms"):
        run(inner, 3, nms, sigmoid)
    both = run(inner, 3, sigmoid, nms)
    assert [row.name for row in both.parity[0].tensors] == ["boxes", "scores_raw", "scores", "detections"]
    assert both.passed


@pytest.mark.parametrize("centered", [False, True])
def test_boxes_in_numpy_are_those_of_the_operator(centered: bool) -> None:
    random = np.random.default_rng(4)
    corners = random.uniform(0, 20, (1, 60, 2))
    boxes = np.concatenate([corners, random.uniform(1, 9, (1, 60, 2)) + (0 if centered else corners)], axis=2).astype(np.float32)
    if not centered:
        boxes[:, ::2] = boxes[:, ::2][..., [2, 3, 0, 1]]  # either corner may come first
    scores = random.uniform(0, 1, (1, 3, 60)).astype(np.float32)
    graph = onnx.helper.make_graph(
        [node("NonMaxSuppression", ["b", "s", "most", "iou", "least"], ["chosen"], center_point_box=int(centered))],
        "nms",
        [value("b", FLOAT, [1, 60, 4]), value("s", FLOAT, [1, 3, 60])],
        [value("chosen", INT64, ["n", 3])],
        [tensor(np.array([10]), "most"), tensor(np.array([0.3], np.float32), "iou"), tensor(np.array([0.2], np.float32), "least")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9)
    import onnxruntime as ort

    chosen = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"b": boxes, "s": scores})[0]
    wanted = sorted(([*boxes[0, at], scores[0, kind, at], kind] for _, kind, at in chosen), key=lambda row: -row[4])[:10]
    part = OutputProcessing(kind="nms", iou_threshold=0.3, score_threshold=0.2, max_detections=10, centered=centered)
    np.testing.assert_array_equal(suppressed(boxes, scores, part)[0], np.array(wanted, dtype=np.float32))


def test_a_file_that_the_checker_refuses_is_not_written(tmp_path: Path) -> None:
    wrong = net(tmp_path / "net.onnx", told=(value("flat", FLOAT, [1, 47]),), batch=1)
    with pytest.raises(ModelError, match=r"no valid ONNX model.*47"):
        built(wrong, tmp_path / "m.onnx", Processing(outputs=(SOFTMAX,)))
    assert not (tmp_path / "m.onnx").exists()
    model = onnx.load(str(net(tmp_path / "net.onnx")))
    assert require_sound(model) == ""
    assert "at most 10 bytes" in require_sound(model, limit=10)


def test_notes_go_on_and_metadata_of_the_old_graph_do_not(tmp_path: Path) -> None:
    plain = import_onnx(net(tmp_path / "net.onnx"), tmp_path / "plain", notes={"source": "0" * 64})
    of_graph = {"prepared": "yes", "tensors": "{}", "ops": "[]"}
    record = msgspec.structs.replace(plain.record, metadata={**plain.record.metadata, **of_graph, "converter": "prepare-onnx"})
    noted = annotate(StoredArtifact(record, plain.folder), tmp_path / "noted", {"labels": labels_text(("a", "b")), "owner": "somebody"})
    made = built(noted, tmp_path / "m.onnx", Processing(inputs={"image": INSIDE}))
    told = read_metadata(tmp_path / "m.onnx")
    assert (json.loads(told["labels"]), told["owner"]) == (["a", "b"], "somebody")
    assert told["source"] == made.artifact.metadata["source"] == "0" * 64
    assert not set(of_graph) & set(made.artifact.metadata)
    assert (made.artifact.metadata["converter"], made.artifact.metadata["normalisation_in"]) == ("prepare-onnx", "image: nodes")


def test_the_command_shows_the_comparison(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_bytes(Processing(outputs=(SOFTMAX,), labels=("a", "b", "c", "d", "e")).to_json())
    words = ["convert", str(net(tmp_path / "net.onnx")), "-o", str(tmp_path / "m.onnx"), "--processing", str(tmp_path / "p.json")]
    done = CliRunner().invoke(cli, words, env={"COLUMNS": "200"})
    assert done.exit_code == 0, done.output
    assert "onnx on ONNX Runtime in this process" in " ".join(done.output.split())
    assert "onnx -> onnx with processing" in done.output
    assert import_onnx(tmp_path / "m.onnx", tmp_path / "back").record.metadata["labels"] == labels_text(("a", "b", "c", "d", "e"))

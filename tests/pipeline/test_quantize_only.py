"""The first hour: one ONNX file and a folder of arrays, with labels or without, and what a wrong folder is told."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from edgekd.bundle import open_bundle
from edgekd.errors import ConfigError, DataError, InputError, ModelError
from edgekd.models.notes import read_metadata
from edgekd.options import ConvertOptions, Options
from edgekd.quantize_only import quantize_only
from edgekd.records import Budget, InputProcessing, Outcome, Precision, Processing
from edgekd.result import Result
from edgekd.target import connect
from edgekd.tasks import Classification, Regression
from edgekd.teachers import OnnxTeacher
from tests.pipeline.bundle_kit import SAMPLES, home, save_inputs


def run(tmp_path: Path, data: Path, *, model: Path | None = None, target: str = "null", overrides: tuple[str, ...] = (), **changes: Any) -> Result:
    given = {"budget": Budget(latency_share=0.95, max_drop=0.5), "options": Options(accept_simulated=True)} | changes
    with connect(target, overrides=overrides) as live:
        return quantize_only(model or home() / "net.onnx", data, target=live, run_dir=tmp_path / "run", **given)


def classes() -> np.ndarray:
    """The classes that the net itself gives."""
    outputs = OnnxTeacher(home() / "net.onnx").outputs({"x": np.load(home() / "data" / "x.npy")})
    best: np.ndarray = outputs["y"].argmax(axis=1)
    return best


def two_heads(path: Path) -> Path:
    """`x` (batch, 6) to class logits `kind` (batch, 3) and a value `size` (batch, 1)."""
    random = np.random.default_rng(3)
    shapes = {"w": (6, 64), "v": (64, 64), "k": (64, 3), "s": (64, 1)}
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["h"], name="first"),
        helper.make_node("Relu", ["h"], ["r"], name="relu"),
        helper.make_node("MatMul", ["r", "v"], ["g"], name="second"),
        helper.make_node("Relu", ["g"], ["q"], name="relu2"),
        helper.make_node("MatMul", ["q", "k"], ["kind"], name="kind"),
        helper.make_node("MatMul", ["q", "s"], ["size"], name="size"),
    ]
    graph = helper.make_graph(
        nodes,
        "heads",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n", 6])],
        [helper.make_tensor_value_info("kind", onnx.TensorProto.FLOAT, ["n", 3]), helper.make_tensor_value_info("size", onnx.TensorProto.FLOAT, ["n", 1])],
        [numpy_helper.from_array((random.standard_normal(shape) * 0.2).astype(np.float32), name) for name, shape in shapes.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


# ------------------------------------------------------------------------------------------ results


def test_file_without_labels_is_judged_against_its_own_answers(tmp_path: Path) -> None:
    result = run(tmp_path, home() / "data")
    assert (result.verdict.outcome, result.exit_code) == (Outcome.PASS, 0)
    assert result.bundle is not None
    bundle = open_bundle(result.bundle)
    assert bundle.manifest.teacher["accuracy"] == 1.0
    assert bundle.manifest.task["task"] == "classification"
    assert len(bundle.evaluation().targets) == SAMPLES - int(0.6 * SAMPLES)
    assert bundle.manifest.artifact.precision.value == "int8"
    recipe = bundle.manifest.recipe
    assert recipe is not None
    assert (recipe.calibration.size, recipe.calibration.split) == (int(0.4 * SAMPLES), "train")
    assert recipe.digest() == bundle.manifest.artifact.recipe
    (stability,) = [row for row in result.ledger.rows if row.step == "calibration stability"]
    assert stability.details["samples"] == int(0.4 * SAMPLES)
    said = " ".join(row.reason for row in result.ledger.rows if row.step == "note")
    assert "proposed: 1. u8s8" in said
    assert "measured: u8s8 is taken" in said


def test_calibration_samples_that_are_also_judged_on_are_refused(tmp_path: Path) -> None:
    data = save_inputs(tmp_path / "data")
    inputs = np.load(data / "x.npy")
    np.save(data / "x.npy", np.concatenate([inputs[: len(inputs) // 2]] * 2))
    with pytest.raises(DataError, match="data overlap"):
        run(tmp_path, data)


def test_labels_in_the_folder_are_the_truth(tmp_path: Path) -> None:
    data = save_inputs(tmp_path / "data")
    wrong = classes()
    wrong[::3] = (wrong[::3] + 1) % 4
    np.save(data / "targets.npy", wrong)
    with pytest.raises(ModelError, match="no better than always answering the commonest class"):
        run(tmp_path / "refused", data)
    result = run(tmp_path, data, options=Options(accept_simulated=True, allow_extreme=True))
    assert result.bundle is not None
    bundle = open_bundle(result.bundle)
    assert 0.5 < float(bundle.manifest.teacher["accuracy"]) < 0.8
    assert set(bundle.evaluation().targets.tolist()) <= {0, 1, 2, 3}


def test_labels_named_after_the_only_output_are_the_truth_too(tmp_path: Path) -> None:
    data = save_inputs(tmp_path / "data")
    np.save(data / "targets.y.npy", (classes() + 1) % 4)
    result = run(tmp_path, data)
    assert result.bundle is not None
    assert open_bundle(result.bundle).manifest.teacher["accuracy"] == 0.0


@pytest.mark.parametrize("task", ["regression", Regression()])
def test_task_may_be_given(task: Any, tmp_path: Path) -> None:
    data = save_inputs(tmp_path / "data")
    np.save(data / "targets.npy", OnnxTeacher(home() / "net.onnx").outputs({"x": np.load(data / "x.npy")})["y"])
    result = run(tmp_path, data, task=task)
    assert result.bundle is not None
    assert open_bundle(result.bundle).manifest.task["task"] == "regression"


def test_several_outputs_are_judged_each_by_its_kind(tmp_path: Path) -> None:
    model = two_heads(tmp_path / "heads.onnx")
    (tmp_path / "data").mkdir()
    np.save(tmp_path / "data" / "x.npy", np.random.default_rng(0).standard_normal((90, 6)).astype(np.float32))
    result = run(tmp_path, tmp_path / "data", model=model, budget=Budget(latency_share=1.0, max_drop=0.5))
    assert result.bundle is not None
    described = open_bundle(result.bundle).manifest.task
    assert (described["task"], described["kind.task"], described["size.task"]) == ("multi", "classification", "regression")
    outputs = OnnxTeacher(model).outputs({"x": np.load(tmp_path / "data" / "x.npy")})
    np.save(tmp_path / "data" / "targets.kind.npy", outputs["kind"].argmax(axis=1))
    with pytest.raises(DataError, match=r"targets\.size\.npy missing"):
        run(tmp_path / "half", tmp_path / "data", model=model)
    (tmp_path / "data" / "targets.kind.npy").rename(tmp_path / "data" / "targets.npy")
    with pytest.raises(DataError, match=r"targets\.kind\.npy"):
        run(tmp_path / "one", tmp_path / "data", model=model)


@pytest.mark.slow
def test_split_is_seeded_and_its_parts_share_no_sample(tmp_path: Path) -> None:
    items = [run(tmp_path / str(index), home() / "data", seed=seed) for index, seed in enumerate((0, 0, 1))]
    tests = [open_bundle(result.bundle).evaluation().inputs["x"] for result in items if result.bundle is not None]
    assert np.array_equal(tests[0], tests[1])
    assert not np.array_equal(tests[0], tests[2])
    assert len({row.tobytes() for row in tests[0]}) == len(tests[0])


# ------------------------------------------------------------------------------------------ budgets and disturbed devices


@pytest.mark.parametrize(
    ("budget", "text"),
    [(Budget(latency_ms=300.0), "0.3 ms, not 300 us"), (Budget(latency_ms=1e-6), "below a hundredth")],
)
def test_budget_in_the_wrong_unit_is_refused(budget: Budget, text: str, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        run(tmp_path, home() / "data", budget=budget)
    assert text in str(caught.value)
    assert "allow_extreme=True" in str(caught.value)


def test_extreme_budget_is_taken_when_it_is_meant(tmp_path: Path) -> None:
    options = Options(accept_simulated=True, allow_extreme=True)
    assert run(tmp_path, home() / "data", budget=Budget(latency_ms=300.0), options=options).verdict.outcome is Outcome.PASS


@pytest.mark.slow
def test_launches_that_grow_invalid_after_the_search_end_in_refuse_and_never_in_fail(tmp_path: Path) -> None:
    calm = run(tmp_path, home() / "data")
    assert calm.verdict.outcome is Outcome.PASS
    short = ("measure.verdict.max_reject_share=0.0", "measure.limits.spread_max=1.017", "runtime.options.noise=0.006")
    result = run(tmp_path / "busy", home() / "data", overrides=short)
    assert result.verdict.outcome is Outcome.REFUSE
    assert "invalid measurement" in result.verdict.reason
    assert "launches rejected" in result.verdict.reason


# ------------------------------------------------------------------------------------------ wrong folders


def _missing(data: Path) -> None:
    (data / "x.npy").rename(data / "images.npy")


def _shape(data: Path) -> None:
    np.save(data / "x.npy", np.zeros((40, 3, 8, 8), dtype=np.float32))


def _nan(data: Path) -> None:
    value = np.load(data / "x.npy")
    value[7, 0, 1, 1] = np.nan
    np.save(data / "x.npy", value)


def _few(data: Path) -> None:
    np.save(data / "x.npy", np.load(data / "x.npy")[:29])


def _targets(value: Any, name: str = "targets") -> Callable[[Path], None]:
    def change(data: Path) -> None:
        np.save(data / f"{name}.npy", value)

    return change


WRONG: list[tuple[Callable[[Path], None], str]] = [
    (_missing, "allowed: x.npy or inputs.npy"),
    (_shape, "allowed: ('samples', 1, 8, 8)"),
    (_nan, "NaN or infinity"),
    (_few, "at least 30"),
    (_targets(np.zeros(SAMPLES - 1, dtype=np.int64)), f"allowed: {SAMPLES}"),
    (_targets(np.int64(3)), "one entry per sample"),
    (_targets(np.full(SAMPLES, 4)), "0 to 3"),
    (_targets(np.full(SAMPLES, -1)), "0 to 3"),
    (_targets(np.full((SAMPLES, 4), np.nan)), "NaN or infinity"),
    (_targets(np.zeros(SAMPLES, dtype=np.int64), "labels"), "found: labels.npy"),
    (_targets(np.zeros(SAMPLES, dtype=np.int64), "target"), "targets.npy (did you mean this?)"),
]


@pytest.mark.parametrize(("change", "text"), WRONG)
def test_wrong_folder_is_refused_with_what_is_allowed(change: Callable[[Path], None], text: str, tmp_path: Path) -> None:
    data = save_inputs(tmp_path / "data")
    change(data)
    with pytest.raises(DataError) as caught:
        run(tmp_path, data)
    assert text in str(caught.value)


def test_float_labels_for_classes_are_refused(tmp_path: Path) -> None:
    data = save_inputs(tmp_path / "data")
    np.save(data / "targets.npy", classes().astype(np.float64))
    with pytest.raises(DataError, match="must be integers"):
        run(tmp_path, data, task="classification")
    with pytest.raises(ModelError, match="different shapes"):
        run(tmp_path / "told", data)


@pytest.mark.parametrize("task", ["clasification", "multi"])
def test_unknown_task_is_refused(task: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="classification"):
        run(tmp_path, home() / "data", task=task)


def test_given_task_needs_targets(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"targets\.npy"):
        run(tmp_path, home() / "data", task=Classification())


# ------------------------------------------------------------------------------------------ what stands in the files


def test_labels_and_normalisation_reach_the_deployed_file_the_manifest_and_the_ledger(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    np.save(data / "x.npy", np.load(home() / "data" / "x.npy"))
    np.save(data / "targets.npy", classes())
    part = InputProcessing(mean=(5.0,), std=(2.0,), value_range=(-40.0, 50.0))
    outside = ConvertOptions(processing=Processing(inputs={"x": part}))
    labels = ("cat", "dog", "owl")
    result = run(tmp_path, data, task=Classification(labels=labels), options=Options(accept_simulated=True, convert=outside))
    assert result.bundle is not None
    bundle = open_bundle(result.bundle)
    record = bundle.manifest.artifact
    told = read_metadata(bundle.artifact.entry)
    assert json.loads(told["labels"]) == json.loads(record.metadata["labels"]) == list(labels)
    assert Processing.from_json(record.metadata["processing"]).inputs["x"] == part
    assert (record.iospec.inputs[0].normalization, record.iospec.inputs[0].value_range) == ("mean=5 std=2", (-22.5, 22.5))
    assert record.precision is Precision.INT8
    assert json.loads(told["normalization"]) == {"x": "mean=5 std=2"}
    converted = next(row for row in result.ledger.rows if row.stage == "convert")
    assert (converted.details["transposes"], converted.details["layout_ops"]) == (0, 1)  # a Flatten


def test_processing_that_contradicts_the_data_or_lies_inside_is_refused(tmp_path: Path) -> None:
    pixels = ConvertOptions(processing=Processing(inputs={"x": InputProcessing(mean=(0.5,), std=(100.0,))}))
    with pytest.raises(DataError, match="not normalised as the processing says"):
        run(tmp_path, home() / "data", options=Options(accept_simulated=True, convert=pixels))
    with pytest.raises(ConfigError, match="outside"):
        ConvertOptions(processing=Processing(inputs={"x": InputProcessing(where="inside")}))


def test_a_student_with_more_transpositions_than_allowed_is_refused(tmp_path: Path) -> None:
    model = onnx.load(str(home() / "net.onnx"))
    axes = list(reversed(range(len(model.graph.input[0].type.tensor_type.shape.dim))))
    twice = [helper.make_node("Transpose", ["x"], ["x_turned"], perm=axes), helper.make_node("Transpose", ["x_turned"], ["x_back"], perm=axes)]
    for node in model.graph.node:
        node.input[:] = ["x_back" if name == "x" else name for name in node.input]
    for node in reversed(twice):
        model.graph.node.insert(0, node)
    path = tmp_path / "turned.onnx"
    onnx.save(model, str(path))
    result = run(tmp_path, home() / "data", model=path, options=Options(accept_simulated=True, convert=ConvertOptions(max_transposes=1)))
    assert result.verdict.outcome is Outcome.REFUSE
    assert "2 transpositions" in result.verdict.reason + " ".join(check.reason for check in result.verdict.checks)

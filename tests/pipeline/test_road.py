"""The whole road on the null target: every kind of network to a bundle, its account, the plan, and each kind of teacher."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from edgekd.bundle import open_bundle
from edgekd.contracts import StudentSpace
from edgekd.errors import BudgetError
from edgekd.rebuild import rebuild
from edgekd.records import Budget, Ledger, Outcome
from edgekd.result import Result, RunSummary
from edgekd.stages import STAGES
from tests.contracts.tiny_models import export
from tests.pipeline import pipeline_kit as kit

pytestmark = pytest.mark.torch

STAGE_NAMES = [stage.name for stage in STAGES]
NAMES = {
    "classification": (["image"], ["output"]),
    "regression": (["image"], ["output"]),
    "multi": (["image", "extra"], ["kind", "size"]),
}


def check_run(result: Result, kind: str) -> None:
    """What every passing run leaves, read back from disk."""
    assert result.verdict.outcome is Outcome.PASS, result.verdict.reason
    assert result.exit_code == 0
    assert result.bundle is not None
    bundle = open_bundle(result.bundle)
    spec = bundle.manifest.artifact.iospec
    inputs, outputs = NAMES[kind]
    assert [tensor.name for tensor in spec.inputs] == inputs
    assert [tensor.name for tensor in spec.outputs] == outputs
    evaluation = bundle.evaluation()
    assert set(evaluation.inputs) == set(inputs)
    assert set(evaluation.teacher) == set(outputs)
    assert result.report.is_file()
    assert "SIMULATED" in result.report.read_text(encoding="utf-8")
    assert list(dict.fromkeys(row.stage for row in result.ledger.rows)) == STAGE_NAMES
    assert all(row.simulated == "null" and row.reason for row in result.ledger.rows)
    assert Ledger.load(result.run_dir / "ledger.json") == result.ledger == Ledger.load(result.bundle / "ledger.json")
    assert {"teacher", "student"} <= {point.role for point in result.points}
    assert all(0 < point.lower_ms <= point.latency_ms <= point.upper_ms for point in result.points)
    summary = RunSummary.load(result.run_dir / "run.json")
    assert (summary.verdict, summary.bundle) == (result.verdict, "bundle")


LONGER = kit.options(train=msgspec.structs.replace(kit.OPTIONS.train, epochs=16), search=msgspec.structs.replace(kit.OPTIONS.search, rung_epochs=4))
"""Enough training for a student that is chosen on validation to pass on the test split."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", kit.KINDS)
def test_every_kind_of_network_reaches_a_bundle_with_a_pass_from_a_family(kind: str, tmp_path: Path) -> None:
    result = kit.run(kind, tmp_path / "run", student=kit.family(kind, width=[8, 16]), options=LONGER)
    check_run(result, kind)
    assert result.student is not None
    assert result.student.factory == f"tests.pipeline.pipeline_kit:{kit.FACTORIES[kind].__name__}"
    feasible = [point for point in result.points if point.label.startswith("width=")]
    assert {point.label for point in feasible} == {"width=8", "width=16"}


@pytest.mark.slow
@pytest.mark.parametrize("kind", kit.KINDS)
def test_every_kind_of_network_reaches_a_bundle_with_a_pass_as_a_fixed_student(kind: str, tmp_path: Path) -> None:
    result = kit.run(kind, tmp_path / "run", student=kit.fixed(kind))
    check_run(result, kind)
    assert result.bundle is not None
    bundle = open_bundle(result.bundle)
    assert bundle.manifest.student == result.student is not None
    module = rebuild(result.student, result.bundle / "student" / "weights.safetensors", factory=kit.FACTORIES[kind])
    evaluation = bundle.evaluation()
    with torch.no_grad():
        given = module.eval()(**{name: torch.from_numpy(value) for name, value in evaluation.inputs.items()})
    outputs = {name: value.numpy() for name, value in given.items()} if isinstance(given, dict) else {"output": given.numpy()}
    assert float(kit.make_task(kind).agreement(outputs, evaluation.teacher).mean()) > 0.9


def onnx_teacher(folder: Path) -> Path:
    model = export(kit.make_teacher("classification"), {"image": np.zeros((2, 1, 8, 8), np.float32)}, folder, batch="dynamic")
    return model.entry


def call_teacher(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    """The torch teacher behind a plain function."""
    with torch.no_grad():
        logits: np.ndarray = kit.make_teacher("classification")(torch.from_numpy(inputs["image"])).numpy()
    return logits


@pytest.mark.slow
def test_an_onnx_file_teaches_a_student(tmp_path: Path) -> None:
    result = kit.run("classification", tmp_path / "run", teacher=onnx_teacher(tmp_path / "onnx"), student=kit.fixed("classification"))
    check_run(result, "classification")
    (teacher,) = [point for point in result.points if point.label == "teacher"]
    assert teacher.precision == "fp32"
    assert teacher.accuracy == 1.0


@pytest.mark.slow
def test_a_callable_teaches_a_student_under_an_absolute_budget(tmp_path: Path) -> None:
    result = kit.run(
        "classification", tmp_path / "run", teacher=call_teacher, student=kit.fixed("classification"), budget=Budget(latency_ms=0.11, max_drop=0.3)
    )
    assert result.verdict.outcome is Outcome.PASS
    assert result.bundle is not None
    assert open_bundle(result.bundle).manifest.latency_limit_ms == 0.11
    (row,) = kit.rows_of(result, "baseline", "export the teacher")
    assert row.decision == "skipped"
    assert {point.role for point in result.points} == {"feasible", "tried", "student"}


def test_a_share_of_a_callables_latency_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match="latency_ms"):
        kit.run("classification", tmp_path / "run", teacher=call_teacher, student=kit.fixed("classification"), budget=Budget(latency_share=0.5))


@pytest.mark.parametrize("space", [kit.family("classification"), kit.fixed("classification")], ids=["family", "fixed"])
def test_a_plan_has_a_row_for_every_stage_and_does_nothing(space: StudentSpace, tmp_path: Path) -> None:
    planned = kit.plan("classification", tmp_path / "run", student=space)
    assert [row.stage for row in planned.rows] == STAGE_NAMES
    assert not any(row.finished for row in planned.rows)
    assert planned.candidates == len(space.candidates(0))
    assert planned.items == {"train": 192, "validation": 96, "test": 192}
    assert {row.stage for row in planned.rows if row.launches} == {"baseline", "search", "quantize", "validate"}
    assert all(name in planned.text() for name in STAGE_NAMES)
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.slow
def test_a_plan_calls_finished_only_what_would_be_reused(tmp_path: Path) -> None:
    kit.run("classification", tmp_path / "run", student=kit.fixed("classification"))
    same = {row.stage: row for row in kit.plan("classification", tmp_path / "run", student=kit.fixed("classification")).rows}
    assert [name for name, row in same.items() if row.finished] == ["baseline", "search"]
    assert [name for name, row in same.items() if row.done_before] == STAGE_NAMES[2:]
    other = kit.plan("classification", tmp_path / "run", student=kit.fixed("classification"), seed=9)
    assert not any(row.finished for row in other.rows)
    assert all(row.done_before for row in other.rows)
    assert "finished: reused" not in other.text()
    assert other.text().count("done before, with the same or other settings") == len(STAGE_NAMES)
    assert other.minutes == pytest.approx(sum(row.minutes for row in other.rows if row.minutes is not None))


def test_a_plan_names_trainings_only_where_there_are_some(tmp_path: Path) -> None:
    text = kit.plan("classification", tmp_path / "run", student=kit.family("classification")).text()
    assert "2 trainings of 1 epoch, " in text
    assert "1 training of 4 epochs per attempt" in text
    assert "no training" not in text
    assert "doubled" not in text

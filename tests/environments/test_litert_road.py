"""The whole road to a LiteRT artifact and to an ONNX one, from one teacher by the same stages, measured on this machine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edgekd.bundle import open_bundle
from edgekd.fleet import Fleet, compress_for
from edgekd.gating import gate
from edgekd.options import QuantizeOptions
from edgekd.records import Budget, Format, Manifest, Outcome, Precision
from edgekd.result import Result
from edgekd.target import connect
from edgekd.verdict import worst
from tests.pipeline import pipeline_kit as kit

pytestmark = [pytest.mark.torch, pytest.mark.environments]

QUICK = (
    "measure.verdict.launch.warmup_min_s=0.05",
    "measure.verdict.launch.warmup_max_s=0.1",
    "measure.verdict.launch.min_time_s=0.05",
    "measure.screen.launch.warmup_min_s=0.05",
    "measure.screen.launch.warmup_max_s=0.1",
    "measure.screen.launch.min_time_s=0.05",
    *(f"measure.limits.{name}=off" for name in ("cpu_share_min", "steal_max", "sentinel_drift_max", "spread_max", "frequency_drop_max")),
)
"""Short launches that all count: the road is tested here, and not how still this machine is."""

OPTIONS = kit.options(
    train=msgspec.structs.replace(kit.OPTIONS.train, epochs=12),
    quantize=QuantizeOptions(calibration_size=64, methods=("minmax",)),
    search=msgspec.structs.replace(kit.OPTIONS.search, measurements=2, finalists=1),
    accept_simulated=False,
)
TEACHER_WIDTH = 192
"""More than ten times the arithmetic of the widest student, so that the budget is not near."""


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    """A teacher of 8x8 images, students of two widths, under a fifth of what the teacher takes on each target."""
    folder = tmp_path_factory.mktemp("roads")
    given = kit.arguments(
        "classification",
        folder / "run",
        teacher=kit.make_teacher("classification", TEACHER_WIDTH),
        student=kit.family("classification", width=[8, 16]),
        budget=Budget(latency_share=0.2, percentile=50, max_drop=0.3),
        options=OPTIONS,
    )
    overrides = (*QUICK, f"transport.workdir={folder / 'device'}", f"runtime.options.lock={folder / 'lock'}")
    with connect("local", overrides=overrides) as onnxruntime, connect("litert-local", overrides=overrides) as litert:
        return compress_for([onnxruntime, litert], **given, progress=False)


@pytest.fixture(scope="module")
def litert(fleet: Fleet) -> Result:
    return fleet.results["litert-local"]


def test_the_road_ends_in_a_tflite_bundle_with_a_verdict(litert: Result) -> None:
    assert litert.bundle is not None
    assert litert.verdict.simulated == ""
    assert {check.name for check in litert.verdict.checks} == {"latency", "accuracy drop"}
    assert litert.verdict.outcome is Outcome.PASS, litert.verdict.reason
    bundle = open_bundle(litert.bundle)
    assert bundle.manifest.artifact.format is Format.TFLITE
    assert bundle.artifact.entry.name == "model.tflite"
    assert [(tensor.name, tensor.shape) for tensor in bundle.manifest.artifact.iospec.inputs] == [("image", (1, 1, 8, 8))]
    assert [tensor.name for tensor in bundle.manifest.artifact.iospec.outputs] == ["output"]
    assert (litert.bundle / "float" / "model.tflite").is_file()
    assert {"ai-edge-litert", "litert-torch", "ai-edge-quantizer"} <= set(bundle.manifest.versions)


def test_the_hops_are_compared_and_named_after_the_format(litert: Result) -> None:
    hops = {row.step for row in litert.ledger.rows if row.stage == "convert"}
    assert hops == {"torch -> tflite"}
    report = (litert.run_dir / "report.json").read_text(encoding="utf-8")
    assert all(hop in report for hop in ("teacher -> tflite", "teacher tflite -> int8", "torch -> tflite"))
    assert "onnx" not in " ".join(row.step + row.reason for row in litert.ledger.rows).lower()


def test_both_int8_schemes_compete_with_float_and_the_ledger_says_which_won(litert: Result) -> None:
    said = " ".join(row.step + " " + row.reason for row in litert.ledger.rows if row.stage == "quantize")
    assert "static_int8" in said
    assert "dynamic_int8" in said
    (row,) = [row for row in litert.ledger.rows if row.stage == "quantize" and row.step == "int8"]
    assert row.decision in ("kept", "rolled back")
    students = {point.precision for point in litert.points if point.role == "student"}
    assert Precision.INT8.value in students or row.decision == "rolled back"
    assert litert.bundle is not None
    manifest = Manifest.load(litert.bundle / "manifest.json")
    if manifest.artifact.precision is Precision.INT8:
        assert manifest.artifact.producers["ai-edge-quantizer"]
        assert manifest.artifact.metadata["scheme"] in ("static_int8", "dynamic_int8")


def test_the_bundle_is_gated_by_itself(litert: Result, tmp_path: Path) -> None:
    assert litert.bundle is not None
    overrides = (f"transport.workdir={tmp_path / 'device'}", f"runtime.options.lock={tmp_path / 'lock'}")
    with connect("litert-local", overrides=(*QUICK, *overrides)) as live:
        result = gate(litert.bundle, target=live)
    accuracy = next(check for check in result.verdict.checks if check.name == "accuracy drop")
    assert accuracy.outcome is Outcome.PASS
    assert result.student_accuracy == pytest.approx(open_bundle(litert.bundle).manifest.accuracy)
    assert result.verdict.outcome is not Outcome.FAIL or any(check.name == "latency" for check in result.verdict.checks)


def test_a_gate_on_a_target_for_onnx_refuses_the_tflite_bundle(litert: Result) -> None:
    assert litert.bundle is not None
    verdict = gate(litert.bundle, target="null", accept_simulated=True).verdict
    assert verdict.outcome is Outcome.REFUSE


def test_the_model_card_shows_lines_that_run_the_artifact(litert: Result) -> None:
    assert litert.bundle is not None
    text = (litert.bundle / "MODEL_CARD.md").read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0]
    done = subprocess.run([sys.executable, "-c", code], cwd=litert.bundle, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "output (1, 4)" in done.stdout


def test_the_same_teacher_ends_in_an_onnx_bundle_by_the_same_stages(fleet: Fleet) -> None:
    onnx, tflite = fleet.results["local"], fleet.results["litert-local"]
    assert onnx.bundle is not None
    assert tflite.bundle is not None
    assert open_bundle(onnx.bundle).manifest.artifact.format is Format.ONNX
    stages = [list(dict.fromkeys(row.stage for row in one.ledger.rows)) for one in (onnx, tflite)]
    assert stages[0] == stages[1]
    first, second = (open_bundle(bundle).evaluation().teacher["output"] for bundle in (onnx.bundle, tflite.bundle))
    np.testing.assert_array_equal(first, second)


def test_both_verdicts_stand_in_one_report(fleet: Fleet) -> None:
    page = fleet.report.read_text(encoding="utf-8")
    for name, result in fleet.results.items():
        assert f"<p>{name}: {result.verdict.outcome.value}: " in page
    assert "torch -&gt; onnx" in page
    assert "torch -&gt; tflite" in page
    assert fleet.outcome is worst(result.verdict.outcome for result in fleet.results.values())

"""The budget is hard: what misses it never passes, what cannot meet it ends in a certificate, and simulated numbers are refused."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner
from torch import nn

from edgekd.bundle import open_bundle
from edgekd.cli.main import cli
from edgekd.errors import BudgetError
from edgekd.options import TrainOptions
from edgekd.records import Budget, Outcome, Point
from edgekd.result import Result, RunSummary
from edgekd.spaces import Fixed
from tests.pipeline import pipeline_kit as kit
from tests.pipeline.plugin_kit import install_runtimes

pytestmark = pytest.mark.torch

FROZEN = kit.options(
    train=TrainOptions(epochs=1, batch_size=64, learning_rate=1e-7, threads=1, precision="fp32", teacher_outputs="cached", views=1, init_from_teacher="no")
)
"""A training that leaves the given weights as they are, to six digits."""


def solved(width: int) -> Fixed:
    """A student that needs no training: its head is solved for like the teacher's."""
    return Fixed(kit.make_teacher("classification", width))


def untrained(width: int) -> nn.Module:
    """A student that guesses."""
    module = kit.classifier(width)
    nn.init.zeros_(module.get_parameter("head.weight"))
    nn.init.zeros_(module.get_parameter("head.bias"))
    return module


@pytest.mark.slow
def test_a_net_whose_int8_is_slower_ships_in_float(tmp_path: Path) -> None:
    result = kit.run("classification", tmp_path / "run", student=solved(8), options=FROZEN, budget=Budget(latency_share=0.3, max_drop=0.2))
    assert result.verdict.outcome is Outcome.PASS
    (row,) = kit.rows_of(result, "quantize", "int8")
    assert row.decision == "rolled back"
    assert "not faster" in row.reason
    times = {point.precision: point.latency_ms for point in result.points if point.role in ("student", "tried")}
    assert [point.precision for point in result.points if point.role == "student"] == ["fp32"]
    assert times["int8"] > times["fp32"]
    assert result.bundle is not None
    bundle = open_bundle(result.bundle)
    assert bundle.manifest.artifact.precision.value == "fp32"
    assert not (result.bundle / "recipe.json").exists()
    verdict = bundle.manifest.verdict
    assert (verdict.simulated, verdict.accepted_simulated) == ("null", True)
    assert "Simulated (null)" in (result.bundle / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "Simulated numbers were accepted" in result.report.read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("student", [kit.fixed("classification"), kit.family("classification", width=[4, 16])], ids=["fixed", "family"])
def test_a_budget_out_of_reach_ends_with_a_certificate_and_no_bundle(student: Fixed, tmp_path: Path) -> None:
    result = kit.run("classification", tmp_path / "run", student=student, budget=Budget(latency_ms=0.03, max_drop=0.3))
    assert result.verdict.outcome is Outcome.FAIL
    assert result.exit_code == 1
    assert result.bundle is None
    assert result.student is None
    assert not (result.run_dir / "bundle").exists()
    fastest = min((point for point in result.points if point.role not in ("teacher", "student")), key=lambda point: point.latency_ms)
    (check,) = result.verdict.checks
    assert check.value == fastest.latency_ms
    assert check.lower is not None
    assert check.lower > check.limit == 0.03
    assert f"{fastest.latency_ms:.4g} ms" in result.verdict.reason
    assert "Not feasible under 0.03 ms" in result.verdict.reason
    assert "would fit" in result.verdict.reason
    assert "would fit" in result.report.read_text(encoding="utf-8")
    (row,) = kit.rows_of(result, "search", "feasibility")
    assert result.verdict.reason == f"simulated (null), accepted; latency: {row.reason}"
    assert RunSummary.load(result.run_dir / "run.json").bundle == ""


def test_a_budget_out_of_reach_on_a_simulated_target_is_a_refuse(tmp_path: Path) -> None:
    refusing = kit.options(accept_simulated=False)
    result = kit.run("classification", tmp_path / "run", student=kit.fixed("classification"), options=refusing, budget=Budget(latency_ms=0.03))
    assert (result.verdict.outcome, result.exit_code, result.bundle) == (Outcome.REFUSE, 2, None)
    assert result.verdict.reason.startswith("simulated (null); accepted it would be a fail; latency: Not feasible under 0.03 ms")
    assert [check.outcome for check in result.verdict.checks] == [Outcome.FAIL]
    assert RunSummary.load(result.run_dir / "run.json").verdict == result.verdict


@pytest.mark.slow
def test_a_share_that_is_missed_by_less_than_the_teachers_uncertainty_is_a_refuse(tmp_path: Path) -> None:
    def student(share: float, run_dir: str) -> tuple[Result, Point, Point]:
        result = kit.run("classification", tmp_path / run_dir, student=kit.fixed("classification"), budget=Budget(latency_share=share))
        by_role = {point.role: point for point in result.points if point.label == "fixed" or (point.role == "teacher" and point.precision == "fp32")}
        return result, by_role.pop("teacher"), by_role.popitem()[1]

    far, teacher, fastest = student(0.05, "far")
    assert far.verdict.outcome is Outcome.FAIL
    assert teacher.upper_ms > teacher.latency_ms * 1.02
    near, *_ = student(fastest.lower_ms / teacher.latency_ms * 0.985, "near")
    assert "Not feasible under" in near.verdict.reason
    assert (near.verdict.outcome, near.bundle) == (Outcome.REFUSE, None)
    assert "the limit is a share of the teacher's latency" in near.verdict.reason


@pytest.mark.slow
def test_students_that_all_diverge_end_in_a_refuse_that_names_each(tmp_path: Path) -> None:
    wild = kit.options(
        accept_simulated=True,
        train=TrainOptions(epochs=1, batch_size=64, learning_rate=1e30, threads=1, precision="fp32", teacher_outputs="cached", views=1, init_from_teacher="no"),
    )
    result = kit.run("classification", tmp_path / "run", student=kit.family("classification", width=[4, 8]), options=wild, budget=Budget(latency_ms=0.1))
    assert (result.verdict.outcome, result.exit_code, result.bundle) == (Outcome.REFUSE, 2, None)
    (check,) = result.verdict.checks
    assert (check.name, check.value) == ("student", None)
    for width in (4, 8):
        assert f"width={width}: the training left the finite numbers in epoch 1, step " in result.verdict.reason
    assert not (result.run_dir / "bundle").exists()


@pytest.mark.slow
def test_the_limit_that_the_certificate_names_does_fit(tmp_path: Path) -> None:
    first = kit.run("classification", tmp_path / "run", student=solved(16), options=FROZEN, budget=Budget(latency_ms=0.03, max_drop=0.2))
    would_fit_ms = float(first.verdict.reason.split("A budget of ")[1].split(" ms")[0])
    second = kit.run("classification", tmp_path / "again", student=solved(16), options=FROZEN, budget=Budget(latency_ms=would_fit_ms * 1.001, max_drop=0.2))
    assert second.verdict.outcome is Outcome.PASS


def test_implausible_budgets_are_refused_before_anything_is_trained(tmp_path: Path) -> None:
    for latency_ms in (0.29, 0.0027):
        with pytest.raises(BudgetError, match="allow_extreme"):
            kit.run("classification", tmp_path / str(latency_ms), student=kit.fixed("classification"), budget=Budget(latency_ms=latency_ms))
        assert not list((tmp_path / str(latency_ms) / "stages").glob("*"))


@pytest.mark.slow
def test_extreme_budgets_are_judged_when_they_are_allowed(tmp_path: Path) -> None:
    extreme = msgspec.structs.replace(FROZEN, allow_extreme=True)
    above = kit.run("classification", tmp_path / "above", student=solved(16), options=extreme, budget=Budget(latency_ms=5.0, max_drop=0.2))
    assert above.verdict.outcome is Outcome.PASS
    below = kit.run("classification", tmp_path / "below", student=solved(16), options=extreme, budget=Budget(latency_ms=0.001, max_drop=0.2))
    assert below.verdict.outcome is Outcome.FAIL
    assert below.bundle is None


KIND_SCREEN = '''
class KindScreen(Null):
    """Reads a fifth too little in the screen, and the truth at verdict grade."""

    def benchmark(self, request):
        launches = super().benchmark(request)
        if request.protocol != self.profile.measure.screen.launch:
            return launches
        return tuple(replace(launch, samples_ns=tuple(int(0.8 * value) for value in launch.samples_ns)) for launch in launches)
'''


@pytest.mark.slow
def test_a_student_over_the_budget_never_passes_when_the_screen_is_too_kind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_runtimes(tmp_path / "plugin", monkeypatch, KIND_SCREEN, {"kind-screen": "KindScreen"})
    result = kit.run(
        "classification",
        tmp_path / "run",
        overrides=["runtime.kind=kind-screen"],
        student=solved(16),
        options=FROZEN,
        budget=Budget(latency_ms=0.062, max_drop=0.2),
    )
    assert [point.role for point in result.points if point.label == "fixed"] == ["feasible"]
    assert result.verdict.outcome is Outcome.FAIL
    assert result.exit_code == 1
    (latency,) = [check for check in result.verdict.checks if check.name == "latency"]
    assert latency.outcome is Outcome.FAIL
    screened = next(point.latency_ms for point in result.points if point.role == "student" and point.precision == "int8")
    assert screened < latency.limit == 0.062
    assert latency.value == pytest.approx(screened / 0.8, rel=0.05)
    assert result.bundle is not None
    assert open_bundle(result.bundle).manifest.verdict.outcome is Outcome.FAIL


@pytest.mark.slow
def test_a_quantized_teacher_that_misses_its_verdict_gives_way_to_the_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_runtimes(tmp_path / "plugin", monkeypatch, KIND_SCREEN, {"kind-screen": "KindScreen"})
    result = kit.run(
        "regression",
        tmp_path / "run",
        overrides=["runtime.kind=kind-screen"],
        student=kit.fixed("regression"),
        budget=Budget(latency_ms=0.115, max_drop=0.3),
    )
    assert kit.rows_of(result, "validate", "teacher int8 against student")[0].decision == "kept"
    first, second = kit.rows_of(result, "validate", "verdict on the")
    assert (first.step, first.decision) == ("verdict on the teacher int8", "noted")
    assert "fail: simulated (null), accepted; latency" in first.reason
    assert (second.step, second.decision) == ("verdict on the student", "kept")
    assert result.verdict.outcome is Outcome.PASS
    assert result.student is not None


JOB = """
teacher = "kind_job:teacher"
target = "null"
[data]
train = "kind_job:train"
validation = "kind_job:validation"
test = "kind_job:test"
[budget]
latency_ms = 0.062
max_drop = 0.3
[student]
fixed = "kind_job:student"
[options]
accept_simulated = true
[options.train]
epochs = 2
threads = 1
precision = "fp32"
teacher_outputs = "cached"
[options.quantize]
methods = ["minmax"]
calibration_size = 32
[profile.runtime]
kind = "kind-screen"
"""
JOB_MODULE = """
from tests.pipeline.pipeline_kit import classifier, make_data, make_teacher

train, validation, test = make_data("classification")

def teacher():
    return make_teacher("classification")

def student():
    return classifier()
"""


@pytest.mark.slow
def test_the_command_exits_with_1_when_the_student_is_over_the_budget(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_runtimes(tmp_path / "plugin", monkeypatch, KIND_SCREEN, {"kind-screen": "KindScreen"})
    (tmp_path / "kind_job.py").write_text(JOB_MODULE, encoding="utf-8")
    (tmp_path / "job.toml").write_text(JOB, encoding="utf-8")
    done = CliRunner().invoke(cli, ["compress", str(tmp_path / "job.toml")])
    assert done.exit_code == 1, done.output
    assert "fail" in done.output.lower()


@pytest.mark.slow
def test_the_quantized_teacher_ships_when_it_alone_is_accurate_enough(tmp_path: Path) -> None:
    result = kit.run("classification", tmp_path / "run", student=Fixed(untrained(16)), options=FROZEN, budget=Budget(latency_share=0.6, max_drop=0.1))
    assert result.verdict.outcome is Outcome.PASS
    assert result.student is None
    assert RunSummary.load(result.run_dir / "run.json").student == "teacher int8"
    assert result.bundle is not None
    manifest = open_bundle(result.bundle).manifest
    assert manifest.student is None
    assert manifest.artifact.precision.value == "int8"
    assert not (result.bundle / "student").exists()
    assert (result.bundle / "MODEL_CARD.md").read_text(encoding="utf-8").startswith("# teacher int8\n")
    (row,) = kit.rows_of(result, "validate", "teacher int8 against student")
    assert row.decision == "kept"


@pytest.mark.slow
def test_the_quantized_teacher_ships_when_no_student_fits_the_budget(tmp_path: Path) -> None:
    result = kit.run("classification", tmp_path / "run", student=solved(48), options=FROZEN, budget=Budget(latency_share=0.5, max_drop=0.1))
    assert kit.rows_of(result, "search", "feasibility")[0].decision == "rolled back"
    assert result.verdict.outcome is Outcome.PASS
    assert RunSummary.load(result.run_dir / "run.json").student == "teacher int8"
    assert result.bundle is not None
    open_bundle(result.bundle)


@pytest.mark.slow
def test_simulated_numbers_are_refused_unless_accepted(tmp_path: Path) -> None:
    refusing = msgspec.structs.replace(FROZEN, accept_simulated=False)
    result = kit.run("classification", tmp_path / "run", student=solved(16), options=refusing)
    assert result.verdict.outcome is Outcome.REFUSE
    assert result.exit_code == 2
    assert "simulated" in result.verdict.reason
    assert all(check.outcome is Outcome.PASS for check in result.verdict.checks)
    assert result.bundle is not None
    verdict = open_bundle(result.bundle).manifest.verdict
    assert (verdict.outcome, verdict.simulated, verdict.accepted_simulated) == (Outcome.REFUSE, "null", False)
    assert "SIMULATED" in result.report.read_text(encoding="utf-8")
    card = (result.bundle / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert "Verdict: **refuse**" in card
    assert "Simulated (null)" in card

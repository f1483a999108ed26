"""What ends a run after several students were judged, or none could be made."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from torch import nn

from edgekd.options import QuantizeOptions, TrainOptions
from edgekd.records import Budget, Outcome
from edgekd.spaces import Family
from tests.pipeline import pipeline_kit as kit
from tests.pipeline.plugin_kit import install_runtimes

pytestmark = pytest.mark.torch

LIMIT_MS = 0.08
OPTIONS = kit.options(
    train=TrainOptions(epochs=1, batch_size=64, learning_rate=1e-7, threads=1, precision="fp32", teacher_outputs="cached", views=1, init_from_teacher="no")
)
"""A training that leaves the weights as they are."""


def solved(width: int) -> nn.Module:
    """A student that knows the task from the start, unless it is the narrowest."""
    module = kit.classifier(width)
    if width > 4:
        kit.solve(module, "classification")
    return module


WAVERING = f"""
class Wavering(Null):
    \"\"\"At verdict grade the first student stands exactly at the limit, which decides nothing, and every other one far above it.\"\"\"

    first = ""

    def benchmark(self, request):
        launches = super().benchmark(request)
        model = request.models.get("student")
        if model is None or request.protocol == self.profile.measure.screen.launch:
            return launches
        Wavering.first = Wavering.first or model.record.content_hash()
        seen = np.median([value for launch in launches if launch.label == "student" for value in launch.samples_ns])
        share = {LIMIT_MS} * 1e6 / seen * (1.0 if model.record.content_hash() == Wavering.first else 3.0)
        return tuple(
            replace(launch, samples_ns=tuple(int(share * value) for value in launch.samples_ns)) if launch.label == "student" else launch
            for launch in launches
        )
"""


@pytest.mark.slow
def test_the_better_of_two_attempts_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_runtimes(tmp_path / "plugin", monkeypatch, WAVERING, {"wavering": "Wavering"})
    result = kit.run(
        "classification",
        tmp_path / "run",
        overrides=["runtime.kind=wavering"],
        student=Family(solved, width=[4, 16]),
        options=OPTIONS,
        budget=Budget(latency_ms=LIMIT_MS),
    )
    outcomes = [row.reason.partition(":")[0] for row in kit.rows_of(result, "validate", "verdict on the student")]
    assert outcomes == ["refuse", "fail"]
    assert result.verdict.outcome is Outcome.REFUSE
    assert result.student is not None
    assert result.student.label() == "width=16"


@pytest.mark.slow
def test_a_profile_of_int8_only_ships_no_float_where_quantizing_fails(tmp_path: Path) -> None:
    result = kit.run(
        "classification",
        tmp_path / "run",
        overrides=['runtime.precisions=["int8"]'],
        student=kit.fixed("classification"),
        options=msgspec.structs.replace(OPTIONS, quantize=QuantizeOptions(calibration_size=64, methods=())),
        budget=Budget(latency_ms=LIMIT_MS),
    )
    assert result.verdict.outcome is Outcome.REFUSE
    assert "no calibration method was asked for" in result.verdict.reason
    assert result.bundle is None

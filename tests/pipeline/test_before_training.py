"""What a run finds out before it trains anything: files with too many transpositions, and int8 forms that the target does not run."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch
from torch import nn

from edgekd.errors import ModelError
from edgekd.options import ConvertOptions
from edgekd.records import Budget
from edgekd.spaces import Family
from edgekd.stages import Event
from tests.pipeline import pipeline_kit as kit
from tests.pipeline.plugin_kit import install_runtimes

pytestmark = [pytest.mark.torch, pytest.mark.slow]
OPTIONS = kit.options(train=msgspec.structs.replace(kit.OPTIONS.train, epochs=1), allow_extreme=True)
BUDGET = Budget(latency_ms=10.0, max_drop=0.99)


class Turning(nn.Module):
    """A classifier that turns its image around so many times, with arithmetic between that keeps the turns apart."""

    def __init__(self, width: int, turns: int) -> None:
        super().__init__()
        self.net, self.turns = kit.Plain(width, kit.CLASSES), turns

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        for turn in range(self.turns):
            image = torch.relu(image.transpose(2, 3) + float(turn)).cumsum(2)
        y: torch.Tensor = self.net(image)
        return y


def turning(width: int = 4, turns: int = 0) -> nn.Module:
    """A student."""
    return Turning(width, turns)


def test_a_student_with_too_many_transpositions_is_rejected_before_any_training(tmp_path: Path) -> None:
    heard: list[Event] = []
    options = msgspec.structs.replace(OPTIONS, convert=ConvertOptions(max_transposes=1))
    space = Family(turning, width=[4], turns=[1, 3])
    result = kit.run("classification", tmp_path / "run", student=space, options=options, budget=BUDGET, listener=heard.append)
    (row,) = [row for row in result.ledger.rows if row.step == "turns=3 width=4"]
    assert (row.stage, row.decision) == ("search", "rolled back")
    assert "in 3 transpositions" in row.reason
    assert "--max-transposes 3" in row.reason
    assert not [event for event in heard if event.stage == "distil" and "turns=3" in event.text]
    assert {point.label for point in result.points if "turns=" in point.label} == {"turns=1 width=4"}


def test_where_all_students_have_too_many_the_run_ends_in_the_search(tmp_path: Path) -> None:
    heard: list[Event] = []
    options = msgspec.structs.replace(OPTIONS, convert=ConvertOptions(max_transposes=0))
    with pytest.raises(ModelError, match=r"in 1 transpositions.*max_transposes=1"):
        kit.run("classification", tmp_path / "run", student=Family(turning, width=[4], turns=[1]), options=options, budget=BUDGET, listener=heard.append)
    assert {event.stage for event in heard} == {"baseline", "search"}


_RUNTIME = '''
from edgekd.errors import UnsupportedModel
from edgekd.records import Precision, SupportReport


class Choosy(Null):
    """A device that runs int8 of some schemes only, as its answers and its launches say."""

    name = "choosy"
    runs = ()

    def capabilities(self):
        return replace(super().capabilities(), schemes=("u8s8", "s8s8"))

    def supports(self, model):
        scheme = model.record.metadata.get("scheme", "")
        if scheme and scheme not in self.runs:
            return SupportReport(supported=False, missing={"QLinearConv": f"no kernel for {scheme}"})
        return super().supports(model)

    def benchmark(self, request):
        for model in request.models.values():
            if not self.supports(model).supported:
                raise UnsupportedModel("the model cannot be loaded", found=model.record.metadata["scheme"])
        return super().benchmark(request)


class Half(Choosy):
    """It runs one of its two."""

    name = "half"
    runs = ("s8s8",)
'''


def test_an_int8_form_that_the_target_does_not_run_is_a_rejected_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_runtimes(tmp_path / "plugin", monkeypatch, _RUNTIME, {"choosy": "Choosy", "half": "Half"})
    result = kit.run(
        "classification", tmp_path / "none", student=kit.family("classification", width=[4]), options=OPTIONS, budget=BUDGET, overrides=["runtime.kind=choosy"]
    )
    refusals = [row for row in result.ledger.rows if "no kernel for u8s8" in row.reason]
    assert [(row.stage, row.step, row.decision) for row in refusals] == [
        ("baseline", "quantize the teacher alone", "skipped"),
        ("search", "width=4", "noted"),
        ("quantize", "int8", "rolled back"),
    ]
    assert {point.precision for point in result.points} == {"fp32"}
    result = kit.run(
        "classification", tmp_path / "one", student=kit.family("classification", width=[4]), options=OPTIONS, budget=BUDGET, overrides=["runtime.kind=half"]
    )
    refusals = [row for row in result.ledger.rows if "no kernel for u8s8" in row.reason]
    assert [(row.stage, row.step, row.decision) for row in refusals] == [
        ("baseline", "teacher u8s8 minmax", "rolled back"),
        ("search", "width=4", "noted"),
        ("quantize", "u8s8 minmax", "rolled back"),
    ]
    (kept,) = kit.rows_of(result, "baseline", "quantize the teacher alone")
    assert kept.details["scheme"] == "s8s8"


def test_the_teacher_s_int8_tells_what_was_proposed_and_how_stable_its_ranges_are(tmp_path: Path) -> None:
    result = kit.run("classification", tmp_path / "run", student=kit.family("classification", width=[4]), options=OPTIONS, budget=BUDGET)
    told = {
        stage: {row.step: row for row in result.ledger.rows if row.stage == stage and row.decision == "noted" and (row.step.startswith(named) or not named)}
        for stage, named in (("baseline", "teacher "), ("quantize", ""))
    }
    steps = {"u8s8 minmax", "note", "calibration stability"}
    assert set(told["quantize"]) == steps
    assert {step.removeprefix("teacher ") for step in told["baseline"]} == steps | {"as it is"}
    assert any("; proposed: 1. u8s8: " in row.reason for row in result.ledger.rows if row.stage == "baseline" and row.step == "teacher note")
    stability = told["baseline"]["teacher calibration stability"]
    assert stability.details.keys() == told["quantize"]["calibration stability"].details.keys()
    (row,) = kit.rows_of(result, "baseline", "quantize the teacher alone")
    assert row.details["proposed"] == row.details["scheme"] == "u8s8"

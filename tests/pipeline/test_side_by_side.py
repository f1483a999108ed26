"""Latencies that are compared were measured together; and a candidate without an int8 form competes in float."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
import torch

from edgekd.errors import ConfigError
from edgekd.records import Budget, LedgerRow, Outcome
from edgekd.result import Result
from edgekd.spaces import Family, Fixed
from tests.pipeline import pipeline_kit as kit
from tests.pipeline.plugin_kit import install_runtimes

pytestmark = pytest.mark.torch

QUICK = msgspec.structs.replace(
    kit.OPTIONS, train=msgspec.structs.replace(kit.OPTIONS.train, epochs=1), search=msgspec.structs.replace(kit.OPTIONS.search, finalists=1)
)
PLUGIN = '''
from edgekd.errors import UnsupportedModel


class Tides(Null):
    """Half as slow again in every other measurement, whatever is measured."""

    turns = 0

    def benchmark(self, request):
        self.turns += request.first_index == 0
        factor = 1.5 if self.turns % 2 else 1.0
        return tuple(replace(launch, samples_ns=tuple(int(factor * value) for value in launch.samples_ns)) for launch in super().benchmark(request))


class Closed(Null):
    """Runs models, but does not give the tensors inside them, and says so only when asked."""

    def infer(self, model, inputs, taps=()):
        if taps:
            raise UnsupportedModel("this device keeps the inner tensors to itself")
        return super().infer(model, inputs, taps)


class Disturbed(Null):
    """Has a neighbour in two of three launches of everything that int8 forms are chosen by."""

    def benchmark(self, request):
        launches = super().benchmark(request)
        return tuple(replace(one, invalid="slowed: planted") if one.label in ("float", "u8s8") and one.index % 3 else one for one in launches)
'''


def ratio(row: LedgerRow) -> float:
    before, after = (None if score is None else score.latency_ms for score in (row.before, row.after))
    assert before is not None
    assert after is not None
    return after / before


@pytest.mark.slow
def test_ledger_compares_latencies_of_one_screen_when_the_device_drifts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_runtimes(tmp_path / "plugin", monkeypatch, PLUGIN, {"tides": "Tides"})

    def run(name: str, *overrides: str) -> Result:
        return kit.run(
            "classification",
            tmp_path / name,
            overrides=overrides,
            student=kit.fixed("classification"),
            options=QUICK,
            budget=Budget(latency_share=0.95, max_drop=0.5),
        )

    still, tides = run("still"), run("tides", "runtime.kind=tides")
    for stage, step in (("baseline", "quantize the teacher alone"), ("quantize", "int8"), ("validate", " against ")):
        expected, found = (ratio(kit.rows_of(result, stage, step)[-1]) for result in (still, tides))
        assert found == pytest.approx(expected, rel=0.1), (stage, step)


@pytest.mark.slow
def test_candidates_compete_in_float_when_their_int8_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_runtimes(tmp_path / "plugin", monkeypatch, PLUGIN, {"closed": "Closed"})
    result = kit.run("classification", tmp_path / "run", overrides=["runtime.kind=closed"], options=QUICK, budget=Budget(latency_share=0.9, max_drop=0.9))
    assert result.verdict.outcome is Outcome.PASS
    noted = [row for row in kit.rows_of(result, "search") if "int8 could not be made" in row.reason]
    assert {row.step for row in noted} == {"width=4", "width=8", "width=16"}
    assert all(row.decision == "noted" and "keeps the inner tensors" in row.reason for row in noted)
    assert {point.precision for point in result.points} == {"fp32"}


def test_ledger_says_that_an_int8_form_was_chosen_on_a_disturbed_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_runtimes(tmp_path / "plugin", monkeypatch, PLUGIN, {"disturbed": "Disturbed"})
    result = kit.run("classification", tmp_path / "run", overrides=["runtime.kind=disturbed"], options=QUICK, budget=Budget(latency_share=0.9, max_drop=0.9))
    noted = [row.reason for stage in ("baseline", "quantize") for row in kit.rows_of(result, stage, "note") if "not valid" in row.reason]
    assert len(noted) == 2
    assert all("launches of this screen rejected, more than 50%" in reason and "slowed" in reason for reason in noted)


class Upsampled(kit.Plain):
    """Its first convolution gives half a megabyte per image."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = super().forward(torch.nn.functional.interpolate(image, scale_factor=32.0))
        return y


def upsampled() -> torch.nn.Module:
    module = Upsampled(2, kit.CLASSES)
    module.trunk.pool = torch.nn.AvgPool2d(128)
    return module


def test_candidates_are_calibrated_within_the_memory_of_the_options(tmp_path: Path) -> None:
    """The teacher's tensors are small: what is refused is the candidate's, in the search, before anything is trained."""
    quantize = msgspec.structs.replace(kit.OPTIONS.quantize, memory_mb=1)
    options = msgspec.structs.replace(QUICK, quantize=quantize, allow_extreme=True)
    with pytest.raises(ConfigError, match=r"quantize\.memory_mb"):
        kit.run("classification", tmp_path / "run", student=Fixed(upsampled), options=options, budget=Budget(latency_ms=1000.0))
    assert not list((tmp_path / "run" / "stages").glob("distil-*"))


@pytest.mark.slow
def test_ledger_says_that_a_large_family_was_sampled(tmp_path: Path) -> None:
    student = Family(kit.classifier, max_candidates=2, width=[4, 8, 16])
    result = kit.run("classification", tmp_path / "run", student=student, options=QUICK, budget=Budget(latency_share=0.9, max_drop=0.9))
    (row,) = kit.rows_of(result, "search", "space")
    assert row.reason.startswith("2 of 3 combinations, sampled with seed 0")

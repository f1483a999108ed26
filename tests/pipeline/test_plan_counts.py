"""The plan against what a run of the same arguments really did: launches on the device and conversions, stage by stage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from edgekd import pipeline
from edgekd.planning import Plan
from edgekd.records import Budget
from edgekd.spaces import Family, Fixed
from edgekd.stages import Event
from edgekd.target import connect
from tests.operators import nets
from tests.operators.converter_kit import install_counting
from tests.pipeline import pipeline_kit as kit
from tests.pipeline.plugin_kit import install_runtimes

pytestmark = pytest.mark.torch
OPTIONS = kit.options(train=msgspec.structs.replace(kit.OPTIONS.train, epochs=1), allow_extreme=True)
GENEROUS = {"budget": Budget(latency_ms=10.0, max_drop=0.99), "options": OPTIONS}
"""Every student fits for sure, so that none is measured twice."""

_COUNTED = '''
from pathlib import Path

NOTES = Path(__file__).with_name("launches.txt")


class Counted(Null):
    """The null runtime with a line in a file for each launch; `TwoSchemes` has one scheme more."""

    name = "counted"

    def benchmark(self, request):
        with NOTES.open("a") as notes:
            notes.write("launch\\n" * len(request.schedule))
        return super().benchmark(request)


class TwoSchemes(Counted):
    name = "two-schemes"

    def capabilities(self):
        return replace(super().capabilities(), schemes=("u8s8", "s8s8"))


class Floats(Counted):
    name = "floats"

    def capabilities(self):
        return replace(super().capabilities(), schemes=())
'''


def call_teacher(inputs: dict[str, Any]) -> dict[str, Any]:
    """The teacher behind a callable, which cannot be measured."""
    import torch

    with torch.no_grad():
        return {"output": kit.make_teacher("classification")(torch.from_numpy(np.ascontiguousarray(inputs["image"]))).numpy()}


def both(folder: Path, notes: Path, runtime: str, *overrides: str, **changes: Any) -> tuple[Plan, dict[str, int]]:
    """The plan, and the lines that each stage of the run wrote."""
    lines: Callable[[], int] = lambda: len(notes.read_text().splitlines()) if notes.is_file() else 0  # noqa: E731
    done, before = dict[str, int](), 0

    def count(event: Event) -> None:
        nonlocal before
        if event.kind == "finished":
            done[event.stage], before = lines() - before, lines()

    given = kit.arguments("classification", folder / "run", **changes)
    with connect("null", overrides=(f"runtime.kind={runtime}", *overrides)) as live:
        planned = pipeline.plan(**given, target=live)
        assert lines() == 0, "a plan measures and converts nothing"
        pipeline.compress(**given, target=live, listener=count, progress=False)
    return planned, done


@pytest.mark.slow
@pytest.mark.parametrize("runtime", ["counted", "two-schemes", "floats"])
def test_launches_are_those_of_the_run(runtime: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_runtimes(tmp_path / "plugin", monkeypatch, _COUNTED, {"counted": "Counted", "two-schemes": "TwoSchemes", "floats": "Floats"})
    planned, done = both(tmp_path, tmp_path / "plugin" / "launches.txt", runtime, **GENEROUS)
    assert {row.stage: row.launches for row in planned.rows} == done
    assert done["search"] > done["quantize"] > 0


@pytest.mark.slow
def test_launches_of_a_teacher_that_cannot_be_measured_are_not_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_runtimes(tmp_path / "plugin", monkeypatch, _COUNTED, {"counted": "Counted"})
    planned, done = both(tmp_path, tmp_path / "plugin" / "launches.txt", "counted", teacher=call_teacher, student=kit.fixed("classification"), **GENEROUS)
    assert {row.stage: row.launches for row in planned.rows} == done
    assert done["baseline"] == 0


@pytest.mark.slow
def test_conversions_are_those_of_the_run_with_what_the_preflight_tries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = install_counting(tmp_path / "plugin", monkeypatch)
    search = msgspec.structs.replace(OPTIONS.search, measurements=1, finalists=1)
    for name, options, space in (
        ("all", OPTIONS, Family(nets.net, width=[4, 8], act=["good"])),
        ("one", msgspec.structs.replace(OPTIONS, search=search), Family(kit.classifier, width=[4, 8])),
        ("fixed", OPTIONS, Fixed(kit.classifier)),
    ):
        notes.unlink(missing_ok=True)
        given = {**GENEROUS, "student": space, "options": options}
        planned, done = both(tmp_path / name, notes, "keras-only", 'runtime.precisions=["fp32"]', **given)
        assert {row.stage: row.conversions for row in planned.rows} == done, name
    assert "1 conversion, " in planned.text()


def test_a_member_that_cannot_be_built_is_told(tmp_path: Path) -> None:
    planned = kit.plan("classification", tmp_path / "run", student=Family(picky, width=[4, 5]))
    assert planned.candidates == 2
    assert any(note.startswith("width=5 cannot be built: ") for note in planned.notes)
    assert next(row.conversions for row in planned.rows if row.stage == "search") == 1


def picky(width: int) -> Any:
    """A student of an even width."""
    if width % 2:
        raise ValueError("odd")
    return kit.classifier(width)

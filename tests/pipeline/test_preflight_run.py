"""The preflight as part of a run: what cannot be converted is left out before anything is measured or trained, and its conversions are used again."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from edgekd.errors import ModelError
from edgekd.operators.report import PreflightReport
from edgekd.records import Budget
from edgekd.spaces import Family, Fixed
from edgekd.stages import Event
from tests.operators import nets
from tests.operators.converter_kit import install_counting
from tests.pipeline import pipeline_kit as kit

pytestmark = [pytest.mark.torch, pytest.mark.slow]
OPTIONS = kit.options(search=msgspec.structs.replace(kit.OPTIONS.search, measurements=4), train=msgspec.structs.replace(kit.OPTIONS.train, epochs=1))
BUDGET = Budget(latency_ms=10.0, max_drop=0.9)


class Stop(Exception):
    """Ends a run from outside, as a kill does."""


def test_a_choice_that_cannot_be_converted_ends_with_the_good_members_only(tmp_path: Path) -> None:
    heard: list[Event] = []
    options = msgspec.structs.replace(OPTIONS, allow_extreme=True)
    space = Family(nets.net, width=[4, 8], act=["good", "masked"])
    result = kit.run("classification", tmp_path / "run", student=space, options=options, budget=BUDGET, listener=heard.append)
    (row,) = kit.rows_of(result, "search", "preflight")
    assert {name: row.details[name] for name in ("sets", "passed", "refused", "students refused")} == {
        "sets": 2,
        "passed": 1,
        "refused": 1,
        "students refused": 2,
    }
    assert "2 operator sets" in row.reason
    refused = [row for row in result.ledger.rows if "act=masked" in row.step]
    assert [(row.stage, row.step, row.decision) for row in refused] == [
        ("search", "act=masked width=4", "rolled back"),
        ("search", "act=masked width=8", "rolled back"),
    ]
    assert all("stages.0.act" in row.reason and "index_put" in row.reason for row in refused)
    assert {point.label for point in result.points if "act=" in point.label} == {"act=good width=4", "act=good width=8"}
    assert not [event for event in heard if event.stage != "search" and "act=masked" in event.text]  # trainings tell their label
    assert [event for event in heard if event.stage == "distil" and "act=good" in event.text]
    trained = {row.step for row in result.ledger.rows if row.stage == "distil"}
    assert trained
    assert all("act=good" in step for step in trained)


@pytest.mark.parametrize("space", [Family(nets.net, width=[4, 8], act=["branch"]), Fixed(nets.net(4, "branch"))], ids=["family", "fixed"])
def test_where_nothing_passes_the_error_is_the_diagnosis(space: Family | Fixed, tmp_path: Path) -> None:
    heard: list[Event] = []
    options = msgspec.structs.replace(OPTIONS, allow_extreme=True)
    with pytest.raises(ModelError, match="no candidate of the space") as raised:
        kit.run("classification", tmp_path / "run", student=space, options=options, budget=BUDGET, listener=heard.append)
    for part in ("stages.0.act", "null", "torch.where", "nets.py"):
        assert part in str(raised.value)
    assert raised.value.subject == "stages.0.act"
    assert {event.stage for event in heard} == {"baseline", "search"}


def test_its_conversions_are_used_again_and_a_resumed_run_does_not_repeat_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes = install_counting(tmp_path / "plugin", monkeypatch)
    space = Family(nets.net, width=[4, 8], act=["good", "branch"])
    options = msgspec.structs.replace(OPTIONS, allow_extreme=True)

    def run(until: str) -> None:
        def stop(event: Event) -> None:
            if until in (event.text.partition(":")[0], f"{event.stage} {event.kind}"):
                raise Stop

        overrides = ["runtime.kind=keras-only", 'runtime.precisions=["fp32"]']
        with pytest.raises(Stop):
            kit.run("classification", tmp_path / "run", student=space, options=options, budget=BUDGET, overrides=overrides, listener=stop)

    def students() -> list[str]:
        return [name for name in notes.read_text().split() if name == "Net"]

    run("2 operator sets, each tried by one real conversion")
    assert len(students()) == 2  # one for each set; width=4 of both
    (kept,) = (tmp_path / "run" / "work").glob("search-*/preflight.json")
    report = PreflightReport.load(kept)
    assert [item.tried for item in report.sets] == ["act=good width=4", "act=branch width=4"]
    tried = notes.read_text().split()
    assert len(tried) == report.conversions + 1  # the teacher, before all
    run("search round 1")
    assert notes.read_text().split()[len(tried) :] == ["Net"]  # act=good width=8, for its measurement

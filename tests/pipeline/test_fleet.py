"""Several targets: a run for each beneath one folder, the worst verdict as the whole, one report of all; either continues the other's."""

from __future__ import annotations

import json
import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

import edgekd
from edgekd.cli.main import cli
from edgekd.contracts import Target
from edgekd.errors import BundleError, ConfigError, InputError
from edgekd.fleet import Fleet, compress_for, plan_for, report_fleet
from edgekd.records import Budget, Outcome
from edgekd.stages import Event
from edgekd.target import connect
from tests.pipeline.pipeline_kit import arguments, fixed, run

pytestmark = pytest.mark.torch

BOARD = """name = "{name}"
description = "No device"

[transport]
kind = "local"

[runtime]
kind = "null"
threads = 1
precisions = ["int8", "fp32"]
options = {{ noise = 0.01, speed = {speed}, seed = 0 }}
"""


def given(run_dir: Path, **changes: Any) -> dict[str, Any]:
    return arguments("classification", run_dir, student=fixed("classification"), **changes)


def profiles(folder: Path, **speeds: float) -> list[str]:
    for name, speed in speeds.items():
        (folder / f"{name}.toml").write_text(BOARD.format(name=name, speed=speed))
    return [str(folder / f"{name}.toml") for name in speeds]


def opened(stack: ExitStack, names: list[str]) -> list[Target]:
    return [stack.enter_context(connect(name)) for name in names]


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    folder = tmp_path_factory.mktemp("fleet")
    with ExitStack() as stack:
        targets = opened(stack, profiles(folder, zed=1.0, second=2.0))
        return edgekd.compress_for(targets, **given(folder / "runs" / "both"), progress=False)


@pytest.mark.slow
def test_every_target_has_its_verdict_bundle_and_report(fleet: Fleet) -> None:
    assert list(fleet.results) == ["zed", "second"]
    assert (fleet.outcome, fleet.exit_code) == (Outcome.PASS, 0)
    for name, result in fleet.results.items():
        assert result.verdict.outcome is Outcome.PASS
        assert result.run_dir == fleet.run_dir / name
        assert result.bundle is not None
        assert result.report.is_file()
    assert not (fleet.run_dir / ".edgekd-cache").exists()
    assert (fleet.run_dir.parent / ".edgekd-cache").is_dir()


@pytest.mark.slow
def test_one_report_shows_every_verdict_and_has_no_id_twice(fleet: Fleet) -> None:
    page = fleet.report.read_text(encoding="utf-8")
    assert page.index("zed: pass: ") < page.index("second: pass: ")
    assert fleet.report == fleet.run_dir / "report.html"
    for name, result in fleet.results.items():
        assert f"{name}: pass: " in page
        latency = next(check for check in result.verdict.checks if check.name == "latency")
        assert latency.value is not None
        assert f"{latency.value:.4f} ms" in page
    ids = re.findall(r'\bid="([^"]+)"', page)
    assert len(ids) == len(set(ids)) > 20
    targets = re.findall(r'(?:href="#|url\(#)([^")]+)', page)
    assert targets
    assert set(targets) <= set(ids)
    assert {one for pair in re.findall(r'aria-labelledby="([^"]+)"', page) for one in pair.split()} <= set(ids)
    assert page.count("<h1>") == 1
    assert "://" not in re.sub(r"https?://(?:www\.w3\.org|purl\.org)[^\"' ]*", "", page)


@pytest.mark.slow
def test_a_report_is_written_again_from_the_records(fleet: Fleet) -> None:
    before = fleet.report.read_bytes()
    fleet.report.unlink()
    assert cli.main(args=["report", str(fleet.run_dir)], prog_name="edgekd", standalone_mode=False) == 0
    assert fleet.report.read_bytes() == before


@pytest.mark.slow
def test_a_run_on_one_target_continues_the_one_beneath(fleet: Fleet, tmp_path: Path) -> None:
    events: list[Event] = []
    (second,) = profiles(tmp_path, second=2.0)
    again = run("classification", fleet.run_dir / "second", target=second, listener=events.append, student=fixed("classification"))
    assert again.verdict.outcome is Outcome.PASS
    assert {event.kind for event in events if event.kind != "note"} == {"reused"}


@pytest.mark.slow
def test_a_gate_of_the_folder_names_its_bundles(fleet: Fleet) -> None:
    with pytest.raises(BundleError, match=r"second/bundle, .*zed/bundle"):
        edgekd.gate(fleet.run_dir)


@pytest.mark.slow
def test_the_worst_verdict_counts_and_the_other_artifact_ships(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = profiles(tmp_path, quick=1.0, slow=0.1)
    with ExitStack() as stack:
        targets = opened(stack, names)
        budget = Budget(latency_ms=_latency(targets[0], tmp_path), max_drop=0.3)
        done = compress_for(targets, **given(tmp_path / "both", budget=budget), progress=False)
    outcomes = {name: result.verdict.outcome for name, result in done.results.items()}
    assert outcomes == {"quick": Outcome.PASS, "slow": Outcome.FAIL}
    assert (done.outcome, done.exit_code) == (Outcome.FAIL, 1)
    assert done.results["quick"].bundle is not None
    assert done.results["slow"].bundle is None
    assert "FAIL: 1 pass, 0 refuse, 1 fail" in done.report.read_text(encoding="utf-8")


def _latency(target: Target, folder: Path) -> float:
    """Half of what the teacher takes on a target, in milliseconds."""
    result = run("classification", folder / "alone", target=target, student=fixed("classification"))
    teacher = next(point for point in result.points if point.role == "teacher")
    return float(0.5 * teacher.latency_ms)


@pytest.mark.slow
def test_a_run_that_stops_leaves_a_report_that_names_the_rest(tmp_path: Path) -> None:
    class Stop(Exception):
        pass

    def stop(event: Event) -> None:
        seen.append(event)
        if [one.stage for one in seen if one.kind == "started"].count("baseline") == 2:
            raise Stop

    seen: list[Event] = []
    with ExitStack() as stack:
        targets = opened(stack, profiles(tmp_path, first=1.0, second=2.0))
        with pytest.raises(Stop):
            compress_for(targets, **given(tmp_path / "both"), listener=stop, progress=False)
        page = (tmp_path / "both" / "report.html").read_text(encoding="utf-8")
        assert "NOT FINISHED: 1 pass, 0 refuse, 0 fail, 1 to come" in page
        assert "second: not finished" in page
        events: list[Event] = []
        done = compress_for(targets, **given(tmp_path / "both"), listener=events.append, progress=False)
    assert done.outcome is Outcome.PASS
    reused = [event.stage for event in events if event.kind == "reused"]
    assert reused.count("distil") == 1
    assert "NOT FINISHED" not in done.report.read_text(encoding="utf-8")


def test_arguments_are_checked_for_every_target_before_the_first_run(tmp_path: Path) -> None:
    with ExitStack() as stack:
        targets = opened(stack, profiles(tmp_path, first=1.0, second=2.0))
        with pytest.raises(ConfigError, match="two or more with names of their own"):
            compress_for(targets[:1], **given(tmp_path / "one"))
        with pytest.raises(ConfigError, match="found: first, first"):
            compress_for([targets[0], targets[0]], **given(tmp_path / "one"))
        assert not (tmp_path / "one").exists()
        wrong = given(tmp_path / "bad") | {"student": "a text"}
        with pytest.raises(ConfigError, match="the student must be a space"):
            compress_for(targets, **wrong)
        assert not (tmp_path / "bad").exists()
    with pytest.raises(InputError, match=r"fleet\.json does not exist"):
        report_fleet(tmp_path)


def test_the_plan_of_several_targets_names_each(tmp_path: Path) -> None:
    with ExitStack() as stack:
        plans = plan_for(opened(stack, profiles(tmp_path, first=1.0, second=2.0)), **given(tmp_path / "both"))
    assert [plan.target for plan in plans] == ["first", "second"]
    assert not (tmp_path / "both").exists()


@pytest.mark.slow
def test_the_command_takes_a_target_several_times(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = profiles(tmp_path, first=1.0, second=2.0)
    (tmp_path / "fleet_job_module.py").write_text(
        "from tests.pipeline.pipeline_kit import classifier, make_data, make_teacher\n\n\ndef teacher():\n    return make_teacher('classification')\n\n\n"
        "def part(name):\n    return getattr(make_data('classification'), name)\n\n\ndef train():\n    return part('train')\n\n\n"
        "def validation():\n    return part('validation')\n\n\ndef test():\n    return part('test')\n\n\nmake_net = classifier\n"
    )
    (tmp_path / "job.toml").write_text(
        'teacher = "fleet_job_module:teacher"\nrun_dir = "runs/job"\n[data]\ntrain = "fleet_job_module:train"\nvalidation = "fleet_job_module:validation"\n'
        'test = "fleet_job_module:test"\n[budget]\nlatency_share = 0.4\nmax_drop = 0.3\n[student]\nfixed = "fleet_job_module:make_net"\n'
        "[options.train]\nepochs = 4\nlearning_rate = 0.02\n[options.search]\nmeasurements = 4\nrung_epochs = 1\n"
    )
    words = ["compress", str(tmp_path / "job.toml"), *(word for name in names for word in ("--target", name)), "--accept-simulated", "--json"]
    code = cli.main(args=words, prog_name="edgekd", standalone_mode=False)
    told = json.loads(capsys.readouterr().out)
    assert code == told["exit_code"] == max((run["exit_code"] for run in told["targets"].values()), key=(0, 2, 1).index)
    assert told["outcome"] == {0: "pass", 1: "fail", 2: "refuse"}[code]
    assert list(told["targets"]) == ["first", "second"]
    assert Path(told["report"]) == tmp_path.resolve() / "runs" / "job" / "report.html"
    assert cli.main(args=["runs", str(tmp_path)], prog_name="edgekd", standalone_mode=False) == 0
    listed = capsys.readouterr().out
    assert "first" in listed
    assert "second" in listed

"""A run that is killed, or stopped by a full disk, goes on where it stopped: the same bytes at the end, nothing finished done twice, nothing measured again."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edgekd.records import Ledger, LedgerRow, Manifest
from edgekd.stages import STAGES

pytestmark = [pytest.mark.torch, pytest.mark.slow]

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
KILLED, STORAGE_ERROR = -9, 4
CHANCE = random.Random(20240607)
BORDERS = {kind: [["event", stage.name, kind] for stage in STAGES] for kind in ("started", "finished")}
"""Killed at every border of the table: each process dies at the next one."""
FULL = [["full", stage.name, 5000] for stage in STAGES]
"""From the start of a stage on, no file can grow above 5000 bytes."""
MOMENTS: dict[str, list[list[Any]]] = {
    "share a": [["share", round(CHANCE.uniform(0.05, 0.35), 3)]],
    "share b": [["share", round(CHANCE.uniform(0.35, 0.65), 3)]],
    "share c": [["share", round(CHANCE.uniform(0.65, 0.9), 3)]],
    "nth event": [["nth event", CHANCE.randint(2, 9)]],
    "steps": [
        ["step", CHANCE.randint(2, 11)],
        ["step", CHANCE.randint(12, 16)],
        ["step", CHANCE.randint(2, 5)],
    ],  # in a short training, then twice in the long one
}
HALVES: tuple[dict[str, list[list[Any]]], ...] = (
    {"finished": BORDERS["finished"], "share a": MOMENTS["share a"], "share c": MOMENTS["share c"], "steps": MOMENTS["steps"]},
    {"started": BORDERS["started"], "full": FULL, "share b": MOMENTS["share b"], "nth event": MOMENTS["nth event"]},
)
SCENARIOS = [(half, name) for half, scenarios in enumerate(HALVES) for name in scenarios]
NAMES = [name for _, name in SCENARIOS]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folders of all scenarios, in `0` and `1`: two interpreters with other hash seeds, side by side."""
    folder = tmp_path_factory.mktemp("killed")
    children = []
    for half, scenarios in enumerate(HALVES):
        listed = folder / f"scenarios-{half}.json"
        listed.write_text(json.dumps(list(scenarios.items())))
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT), "PYTHONHASHSEED": str(half + 1)}
        command = [sys.executable, str(HERE / "run_killer.py"), str(folder / str(half)), str(listed)]
        children.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    try:
        for child in children:
            said, _ = child.communicate(timeout=900)
            assert child.returncode == 0, said
        yield folder
    finally:
        for child in children:
            child.kill()


def told(folder: Path) -> list[list[list[Any]]]:
    """What each process of a scenario noted, without the times."""
    processes: list[list[list[Any]]] = []
    for line in (folder / "told.jsonl").read_text().splitlines():
        _, *what = json.loads(line)
        if what == ["process"]:
            processes.append([])
        else:
            processes[-1].append(what)
    return processes


def events(process: list[list[Any]], kind: str) -> list[str]:
    """The keys of the stages with an event of a kind, in order."""
    return [what[3] for what in process if what[0] == "event" and what[2] == kind]


def plain(row: LedgerRow) -> dict[str, Any]:
    found: dict[str, Any] = row.to_builtins()
    return found


def weights(folder: Path) -> bytes:
    return (folder / "run" / "bundle" / "student" / "weights.safetensors").read_bytes()


def test_two_uninterrupted_runs_in_two_interpreters_are_equal(killed: Path) -> None:
    first, second = killed / "0" / "whole", killed / "1" / "whole"
    assert weights(first) == weights(second)
    assert [events(process, "finished") for process in told(first)] == [events(process, "finished") for process in told(second)]
    assert json.loads((first / "ended.json").read_text()) == [0]
    assert len(events(told(first)[0], "finished")) == len(STAGES)  # one attempt that passes: every stage once


@pytest.mark.parametrize(("half", "name"), SCENARIOS, ids=NAMES)
def test_killed_run_ends_as_if_it_had_not_been_killed(killed: Path, half: int, name: str) -> None:
    whole, cut = killed / "0" / "whole", killed / str(half) / name
    expected = [STORAGE_ERROR if kill[0] == "full" else KILLED for kill in HALVES[half][name]]
    assert json.loads((cut / "ended.json").read_text()) == [*expected, 0]
    assert weights(cut) == weights(whole)
    manifests = [Manifest.load(place / "run" / "bundle" / "manifest.json") for place in (whole, cut)]
    assert manifests[0].artifact.content_hash() == manifests[1].artifact.content_hash()
    assert manifests[0].stage_keys == manifests[1].stage_keys
    assert manifests[0].verdict == manifests[1].verdict
    ledgers = [Ledger.load(place / "run" / "ledger.json") for place in (whole, cut)]
    assert [plain(row) for row in ledgers[0].rows] == [plain(row) for row in ledgers[1].rows]


@pytest.mark.parametrize(("half", "name"), SCENARIOS, ids=NAMES)
def test_resumed_run_does_nothing_finished_again(killed: Path, half: int, name: str) -> None:
    folder = killed / str(half) / name
    processes = told(folder)
    finished = Counter(key for process in processes for key in events(process, "finished"))
    assert len(finished) == len(STAGES)
    assert set(finished.values()) == {1}
    before: set[str] = set()
    for process in processes:
        assert set(events(process, "reused")) <= before
        assert not set(events(process, "started")) & before
        if process is processes[-1]:
            assert set(events(process, "reused")) == before
        before |= set(events(process, "finished"))
    journal = [json.loads(line) for line in (folder / "run" / "events.jsonl").read_text().splitlines()]
    assert [entry["key"] for entry in journal if entry["kind"] == "finished"] == [key for process in processes for key in events(process, "finished")]
    assert not (folder / "rewritten.txt").exists()  # answers of the search, artifacts, short trainings, measurements, outputs


@pytest.mark.parametrize(("half", "name"), SCENARIOS, ids=NAMES)
def test_resumed_run_repeats_at_most_one_training_step_per_kill(killed: Path, half: int, name: str) -> None:
    whole, cut = (
        Counter((what[1], what[2]) for process in told(place) for what in process if what[0] == "step")
        for place in (killed / "0" / "whole", killed / str(half) / name)
    )
    assert set(cut) == set(whole)
    assert sum(cut.values()) - sum(whole.values()) <= len(HALVES[half][name])


@pytest.mark.parametrize(("half", "name"), SCENARIOS, ids=NAMES)
def test_nothing_of_a_killed_writer_stays_behind(killed: Path, half: int, name: str) -> None:
    run = killed / str(half) / name / "run"
    assert sorted(path.name for path in run.iterdir() if path.name.startswith(".")) == [".lock"]
    assert sorted(path.name.partition("-")[0] for path in (run / "stages").iterdir()) == sorted(stage.name for stage in STAGES)
    assert list((run / "work").iterdir()) == []
    assert not list((killed / str(half) / name / "cache").glob("*/*.pending"))


def test_full_disk_is_an_error_that_says_what_is_kept(killed: Path) -> None:
    said = (killed / "1" / "full" / "storage.txt").read_text().splitlines()
    assert len(said) == len(STAGES)
    assert all("finished stages are kept" in line for line in said)

"""The store of stages: one process at a time, whole outputs or none, unfinished work kept, only what changed done again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from edgekd.errors import ConfigError, InputError, Rejected, StorageError
from edgekd.records import Record
from edgekd.stages import STAGES, Event, Stage, StageStore

ROOT = Path(__file__).resolve().parents[2]


class Out(Record, tag="edgekd.test_stage/1", frozen=True, kw_only=True):
    value: int


def work(value: int, *, size: int = 0) -> Callable[[Path, Path], Out]:
    """A stage's work: a file in its folder, a mark in its scratch."""

    def make(folder: Path, scratch: Path) -> Out:
        (scratch / "mark").write_text("here")
        (folder / "data").write_bytes(b"x" * size)
        return Out(value=value)

    return make


def never(folder: Path, scratch: Path) -> Out:
    raise AssertionError("a finished stage was done again")


def road(run_dir: Path, given: Mapping[str, Any]) -> list[str]:
    """All stages of the table with the inputs given by stage; the names of those that were done."""
    told: list[Event] = []
    with StageStore(run_dir, told.append) as store:
        for position, stage in enumerate(STAGES):
            store.run(stage.name, {"mine": given.get(stage.name, 0)}, Out, work(position))
    return [event.stage for event in told if event.kind == "finished"]


def journal(run_dir: Path) -> list[tuple[str, str]]:
    return [(entry["stage"], entry["kind"]) for entry in map(json.loads, (run_dir / "events.jsonl").read_text().splitlines())]


def in_a_process(code: str, run_dir: Path) -> subprocess.CompletedProcess[str]:
    """Python code with `run_dir`, `work` and `Out`, in another process."""
    head = "import os, resource, signal, sys\nfrom pathlib import Path\nfrom test_stages import Out, work\nfrom edgekd.stages import StageStore\n"
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join((str(ROOT), str(Path(__file__).parent)))}
    command = [sys.executable, "-c", f"{head}run_dir = Path(sys.argv[1])\n{code}", str(run_dir)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def parents_of(name: str) -> set[str]:
    """All stages that a stage rests on, by the table."""
    direct = next(stage.parents for stage in STAGES if stage.name == name)
    return set(direct).union(*(parents_of(parent) for parent in direct))


def test_table_lists_every_stage_once_after_its_parents() -> None:
    seen: list[str] = []
    for stage in STAGES:
        assert stage.name not in seen
        assert set(stage.parents) <= set(seen)
        assert stage.version >= 1
        seen.append(stage.name)


def test_second_run_does_nothing_and_gives_the_same(tmp_path: Path) -> None:
    assert road(tmp_path, {}) == [stage.name for stage in STAGES]
    with StageStore(tmp_path) as store:
        record, folder = store.run("baseline", {"mine": 0}, Out, never)
    assert record == Out(value=0)
    assert (folder / "data").is_file()
    assert road(tmp_path, {}) == []


@pytest.mark.parametrize("changed", [stage.name for stage in STAGES])
def test_changed_input_redoes_the_stage_and_those_that_rest_on_it(tmp_path: Path, changed: str) -> None:
    road(tmp_path, {})
    affected = [stage.name for stage in STAGES if stage.name == changed or changed in parents_of(stage.name)]
    assert road(tmp_path, {changed: 1}) == affected
    assert road(tmp_path, {}) == []  # what was there before is still there


def test_raised_version_redoes_the_stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    road(tmp_path, {})
    table = tuple(Stage(row.name, row.version + (row.name == "quantize"), row.parents, row.about) for row in STAGES)
    monkeypatch.setattr("edgekd.stages.STAGES", table)
    assert road(tmp_path, {}) == ["quantize", "validate", "bundle"]


def test_run_folder_is_locked_for_a_second_store(tmp_path: Path) -> None:
    with StageStore(tmp_path):
        with pytest.raises(ConfigError, match="another process works in this run folder"), StageStore(tmp_path):
            pass
        other = in_a_process("with StageStore(run_dir): pass", tmp_path)
        assert other.returncode != 0
        assert "another process works in this run folder" in other.stderr
    with StageStore(tmp_path):
        pass


@pytest.mark.parametrize("error", [Rejected("no"), RuntimeError("no"), KeyboardInterrupt()])
def test_failed_stage_leaves_its_scratch_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    def fail(folder: Path, scratch: Path) -> Out:
        (folder / "data").write_text("half")
        (scratch / "mark").write_text("here")
        raise error

    with StageStore(tmp_path) as store, pytest.raises(type(error)):
        store.run("baseline", {}, Out, fail)
    assert list((tmp_path / "stages").iterdir()) == []
    assert [path.name for path in (tmp_path / "work").rglob("*") if path.is_file()] == ["mark"]
    assert journal(tmp_path) == [("baseline", "started")]


def test_scratch_survives_a_kill_and_goes_when_the_stage_is_finished(tmp_path: Path) -> None:
    code = """
def die(folder, scratch):
    (folder / "data").write_text("half")
    (scratch / "mark").write_text("here")
    os.kill(os.getpid(), signal.SIGKILL)
with StageStore(run_dir) as store:
    store.run("baseline", {}, Out, die)
"""
    assert in_a_process(code, tmp_path).returncode == -signal.SIGKILL
    assert len(list((tmp_path / "stages").iterdir())) == 1  # what the dead process had begun

    def resumed(folder: Path, scratch: Path) -> Out:
        assert (scratch / "mark").read_text() == "here"
        assert [path.name for path in folder.parent.iterdir()] == [folder.name]
        return Out(value=7)

    with StageStore(tmp_path) as store:
        record, folder = store.run("baseline", {}, Out, resumed)
    assert record == Out(value=7)
    assert list((tmp_path / "stages").iterdir()) == [folder]
    assert list((tmp_path / "work").iterdir()) == []


def test_scratch_goes_too_when_the_process_died_just_after_the_stage_was_finished(tmp_path: Path) -> None:
    with StageStore(tmp_path) as store:
        _, folder = store.run("baseline", {}, Out, work(1))
        left = tmp_path / "work" / folder.name
        left.mkdir()
        store.run("baseline", {}, Out, never)
    assert not left.exists()


def test_leftovers_of_killed_writers_go_and_files_of_others_stay(tmp_path: Path) -> None:
    ours = [tmp_path / "stages" / ".distil-0123.abcdef", tmp_path / ".bundle.abcdef", tmp_path / ".bundle.old.abcdef"]
    theirs = [tmp_path / ".env.local", tmp_path / ".git.d", tmp_path / "bundle.old"]
    for folder in (*ours, *theirs):
        folder.mkdir(parents=True)
    (tmp_path / ".ledger.json.x1y2").write_text("{")
    with StageStore(tmp_path):
        pass
    assert not any(path.exists() for path in (*ours, tmp_path / ".ledger.json.x1y2"))
    assert all(path.exists() for path in theirs)


def test_events_are_on_disk_before_the_listener_hears_them(tmp_path: Path) -> None:
    def listen(event: Event) -> None:
        assert journal(tmp_path)[-1] == (event.stage, event.kind)

    with StageStore(tmp_path, listen) as store:
        store.run("baseline", {}, Out, work(1))
        store.tell("baseline", "note", "words")
        store.run("baseline", {}, Out, never)
    assert journal(tmp_path) == [("baseline", kind) for kind in ("started", "finished", "note", "reused")]


def test_event_cut_off_by_a_crash_is_dropped(tmp_path: Path) -> None:
    road(tmp_path, {})
    whole = journal(tmp_path)
    with (tmp_path / "events.jsonl").open("ab") as stream:
        stream.write(b'{"stage":"bund')
    with StageStore(tmp_path) as store:
        store.tell("bundle", "note", "words")
    assert journal(tmp_path) == [*whole, ("bundle", "note")]


def test_full_disk_is_a_storage_error_and_finished_stages_are_kept(tmp_path: Path) -> None:
    code = """
from edgekd.errors import StorageError
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
with StageStore(run_dir) as store:
    store.run("baseline", {}, Out, work(1))
    try:
        store.run("search", {}, Out, work(2, size=20000))
    except StorageError as error:
        print(error)
"""
    done = in_a_process(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "finished stages are kept" in done.stdout
    assert [path.name.partition("-")[0] for path in (tmp_path / "stages").iterdir()] == ["baseline"]
    with StageStore(tmp_path) as store:
        store.run("baseline", {}, Out, never)
        record, _ = store.run("search", {}, Out, work(2, size=20000))
    assert record == Out(value=2)


def test_full_disk_at_the_journal_is_a_storage_error(tmp_path: Path) -> None:
    code = """
from edgekd.errors import StorageError
with StageStore(run_dir) as store:
    resource.setrlimit(resource.RLIMIT_FSIZE, (40, 40))
    try:
        store.tell("baseline", "note", "words " * 20)
    except StorageError as error:
        print(error)
"""
    done = in_a_process(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "journal cannot be written" in done.stdout
    road(tmp_path, {})
    assert journal(tmp_path)[0] == ("baseline", "started")


def test_run_folder_that_is_a_file_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="choose another run_dir"), StageStore(tmp_path / "file"):
        pass


@pytest.mark.parametrize("damage", [b"", b'{"type":"edgekd.test_stage/1","val', b'{"type":"edgekd.other/1"}'])
def test_damaged_output_is_an_input_error_with_the_remedy(tmp_path: Path, damage: bytes) -> None:
    with StageStore(tmp_path) as store:
        _, folder = store.run("baseline", {}, Out, work(1))
        (folder / "output.json").write_bytes(damage)
        with pytest.raises(InputError, match="remove the folder") as caught:
            store.run("baseline", {}, Out, never)
        assert caught.value.subject == folder / "output.json"
        (folder / "output.json").unlink()
        assert store.run("baseline", {}, Out, work(3))[0] == Out(value=3)

"""The stage table, and the store that keeps each stage's output whole under its key, so that a killed run goes on where it stopped."""

from __future__ import annotations

import fcntl
import os
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from edgekd.errors import ConfigError, InputError, StorageError
from edgekd.identity.keys import stage_key
from edgekd.records.base import Record
from edgekd.storage import folder_atomic

R = TypeVar("R", bound=Record)

_OUTPUT = "output.json"
_JOURNAL = "events.jsonl"
_OUTPUTS = ("bundle", "evaluation", "ledger.json", "report.json", "report.html", "run.json", "demo.json")
"""What a run writes beside its stages."""


@dataclass(frozen=True)
class Stage:
    """One row of the table. `version` is raised by hand when the stage computes something else from the same input."""

    name: str
    version: int
    parents: tuple[str, ...]
    about: str


STAGES: tuple[Stage, ...] = (
    Stage("baseline", 3, (), "export and measure the teacher; does quantizing alone do?"),
    Stage("search", 3, (), "choose students that fit the budget as measured; rank them by short trainings"),
    Stage("distil", 1, ("search",), "train the student from the teacher"),
    Stage("convert", 2, ("distil",), "export the student and compare it with its source"),
    Stage("quantize", 3, ("convert",), "make int8 where it is faster and accurate enough"),
    Stage("validate", 1, ("baseline", "quantize"), "verdict-grade latency and accuracy of the artifact, on the device"),
    Stage("bundle", 3, ("validate",), "artifact, manifest, ledger and evaluation data"),
)
"""In order. `connect` and `plan` come before the first and leave nothing on disk. The parity of each hop is part of the stage that makes the hop.
The search takes two values of the baseline, the latency limit and the limits of validity; they are in its key, so that a baseline that is
done again with the same result does not repeat the search and the training."""


@dataclass(frozen=True)
class Event:
    """Something a run did: `kind` is `started`, `finished`, `reused` or `note`; told to listeners and kept in `events.jsonl`."""

    stage: str
    kind: str
    text: str
    key: str = ""
    seconds: float = 0.0


Listener = Callable[[Event], None]


class StageStore:
    """The outputs of a run's stages under `run_dir/stages`, with unfinished work under `run_dir/work`.

    Open it as a context manager: it holds the run folder's lock, so that two processes never write one run.
    """

    def __init__(self, run_dir: Path, *listeners: Listener) -> None:
        self.run_dir = run_dir
        self.keys: dict[str, str] = {}
        self.about: dict[str, str] = {}
        """What a stage does in this run, by its name, where the table's words do not fit."""
        self._listeners = listeners
        self._lock = -1

    def __enter__(self) -> StageStore:
        try:
            (self.run_dir / "stages").mkdir(parents=True, exist_ok=True)
            self._lock = os.open(self.run_dir / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise self._unwritable(error) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise ConfigError(
                "another process works in this run folder", found=str(self.run_dir), hint="wait for it, or choose another run_dir", subject=self.run_dir
            ) from error
        try:
            self._clean()
        except OSError as error:
            os.close(self._lock)
            raise self._unwritable(error) from error
        return self

    def _unwritable(self, error: OSError) -> StorageError:
        return StorageError("the run folder cannot be written", found=f"{self.run_dir}: {error.strerror}", hint="choose another run_dir", subject=self.run_dir)

    def _clean(self) -> None:
        """Remove what writers that were killed left behind, and nothing else; the lock is held, so none is at work."""
        names = [f"stages/.{stage.name}-*" for stage in STAGES] + [f".{name}.*" for name in _OUTPUTS]
        for leftover in [path for name in names for path in self.run_dir.glob(name)]:
            if leftover.is_dir():
                shutil.rmtree(leftover)
            else:
                leftover.unlink()
        journal = self.run_dir / _JOURNAL
        if journal.is_file():
            data = journal.read_bytes()
            whole = data.rfind(b"\n") + 1
            if whole < len(data):
                os.truncate(journal, whole)

    def __exit__(self, *_: object) -> None:
        os.close(self._lock)

    def tell(self, stage: str, kind: str, text: str, *, key: str = "", seconds: float = 0.0) -> None:
        """Append an event to the run's journal, durably, then tell the listeners."""
        event = Event(stage, kind, text, key, round(seconds, 3))
        line = msgspec.json.encode(event) + b"\n"
        try:
            with (self.run_dir / _JOURNAL).open("ab") as stream:
                stream.write(line)
                stream.flush()
                os.fsync(stream.fileno())
        except OSError as error:
            raise StorageError(
                "the run's journal cannot be written",
                found=error.strerror,
                hint="free some space and run the same command again: finished stages are kept",
                subject=self.run_dir,
            ) from error
        for listener in self._listeners:
            listener(event)

    def stored(self, name: str, inputs: Mapping[str, Any], output: type[R]) -> R | None:
        """What a finished stage without parents left under exactly these inputs, or `None`. Nothing is changed or told."""
        stage = next(row for row in STAGES if row.name == name)
        final = self.run_dir / "stages" / f"{name}-{stage_key(name, stage.version, {}, inputs)[:16]}"
        return _stored(output, final) if (final / _OUTPUT).is_file() else None

    def run(
        self, name: str, inputs: Mapping[str, Any], output: type[R], work: Callable[[Path, Path], R], *, parents: Mapping[str, str] | None = None
    ) -> tuple[R, Path]:
        """The stage's output record and the folder with its files: from the store if its key is there, else from `work`.

        `work(folder, scratch)` fills `folder`, which is kept whole or not at all, and may keep unfinished work in `scratch`,
        which survives a kill and is removed when the stage is finished.
        """
        stage = next(row for row in STAGES if row.name == name)
        known = parents if parents is not None else {parent: self.keys[parent] for parent in stage.parents if parent in self.keys}
        key = stage_key(name, stage.version, known, inputs)
        self.keys[name] = key
        about = self.about.get(name, stage.about)
        final = self.run_dir / "stages" / f"{name}-{key[:16]}"
        scratch = self.run_dir / "work" / f"{name}-{key[:16]}"
        if (final / _OUTPUT).is_file():
            record = _stored(output, final)
            shutil.rmtree(scratch, ignore_errors=True)  # still there if the process was killed just after the stage was finished
            self.tell(name, "reused", about, key=key)
            return record, final
        try:
            scratch.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(
                "the run folder cannot be written", found=error.strerror, hint="free some space and run the same command again", subject=scratch
            ) from error
        self.tell(name, "started", about, key=key)
        start = time.monotonic()
        with folder_atomic(final) as folder:
            record = work(folder, scratch)
            record.save(folder / _OUTPUT)
        shutil.rmtree(scratch, ignore_errors=True)
        self.tell(name, "finished", about, key=key, seconds=time.monotonic() - start)
        return record, final


def _stored(output: type[R], folder: Path) -> R:
    """The record that a finished stage left. It was written whole: what cannot be read was changed since."""
    try:
        return output.load(folder / _OUTPUT)
    except InputError as error:
        raise InputError(
            "the output of a finished stage was changed or damaged",
            found=f"{folder / _OUTPUT}: {error.found}",
            hint=f"remove the folder {folder}; the same command does this stage again",
            subject=folder / _OUTPUT,
        ) from error

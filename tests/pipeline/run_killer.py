"""Runs the pipeline in forked children, kills them (SIGKILL) where each scenario says, resumes them, and notes what every process did.

Usage: run_killer.py FOLDER SCENARIOS.json, with the checkout on the module path. A scenario is `[name, [kill, ...]]`; after its kills
it is run to the end. A kill is `["event", stage, kind]`, `["nth event", n]`, `["step", n]` (of the training steps of one process) or
`["share", s]`: a moment as far into the run as a share of the uninterrupted run's time, between two events as it falls.
`["full", stage, bytes]` kills nothing: from the stage's start no file can grow above that size, and the process ends with 4 if it
says so by a StorageError, which goes to `storage.txt`.
Each scenario leaves `FOLDER/<name>/run`, `told.jsonl` and `ended.json`; the uninterrupted run is `FOLDER/whole`.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

import lightning_fabric  # noqa: F401  (the children should not spend their lives on importing)
import msgspec
import onnxruntime.quantization.shape_inference  # noqa: F401
import onnxscript  # noqa: F401
import torch._dynamo
import torch.export
import torch.onnx._internal.exporter._compat

import edgekd.distill.setup
import edgekd.report.plots  # noqa: F401
from edgekd.errors import StorageError
from edgekd.pipeline import compress
from edgekd.records import Budget
from edgekd.stages import Event
from edgekd.target import connect
from tests.pipeline.pipeline_kit import OPTIONS, arguments, family, make_teacher

RECORDED = ("run/stages/*/output.json", "run/work/*/answers/*.json", "run/work/*/candidates/*/made.json", "run/work/*/rungs/*/record.json", "cache/*/*.json")
"""Files that say that something is finished: none of them may ever be written a second time."""

TRAIN = msgspec.structs.replace(OPTIONS.train, epochs=3, checkpoint_every_s=0.0)
RUN_OPTIONS = msgspec.structs.replace(OPTIONS, train=TRAIN)


def recorded(folder: Path) -> dict[str, int]:
    """The inode of every file that records something finished."""
    return {str(path): path.stat().st_ino for pattern in RECORDED for path in folder.glob(pattern)}


class Watcher:
    """Listener and training callback: notes events, steps and rewritten records, and dies where it is told to."""

    def __init__(self, folder: Path, kill: list[Any]) -> None:
        self.folder, self.kill = folder, kill
        self.known = recorded(folder)
        self.began = time.monotonic()
        self.events = self.steps = 0
        self.label = ""

    def note(self, kind: str, *values: Any) -> None:
        """Append to `told.jsonl`: milliseconds since the start, what, and its values."""
        self._append("told.jsonl", json.dumps([round(1e3 * (time.monotonic() - self.began)), kind, *values]))
        now = recorded(self.folder)
        for path, inode in now.items():
            if self.known.setdefault(path, inode) != inode:
                self._append("rewritten.txt", path)
        self.known |= now

    def _append(self, name: str, line: str) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))  # the limit is for the run, not for these notes
        with (self.folder / name).open("a") as stream:
            stream.write(line + "\n")
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    def die(self, *moment: Any) -> None:
        """Kill this process if this is the moment."""
        if list(moment) == self.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        if ["full", *moment[1:2], "started"] == [*self.kill[:2], *moment[2:]]:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.kill[2], resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    def event(self, event: Event) -> None:
        """The listener."""
        self.events += 1
        self.note("event", event.stage, event.kind, event.key)
        self.die("event", event.stage, event.kind)
        self.die("nth event", self.events)

    def on_start(self, label: str, epochs: int, steps_per_epoch: int) -> None:
        self.label = label

    def on_step(self, step: int, losses: Any) -> None:
        self.steps += 1
        self.note("step", self.label, step)
        self.die("step", self.steps)

    def on_epoch(self, epoch: int, metrics: Any) -> None:
        pass

    def on_end(self) -> None:
        pass


def run(folder: Path, kill: list[Any]) -> None:
    """One run in this process."""
    watcher = Watcher(folder, kill)
    watcher.note("process")
    given = arguments("classification", folder / "run", options=RUN_OPTIONS, student=family("classification", width=(8, 16)), budget=Budget(latency_share=0.4))
    with connect("null") as live:
        result = compress(**given, target=live, cache_dir=folder / "cache", listener=watcher.event, callbacks=(watcher,))
    watcher.note("done", result.verdict.outcome.value)


def lines(path: Path) -> list[Any]:
    """What was noted so far; a last line that is not whole yet is left out."""
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")] if path.exists() else []


def forked(folder: Path, kill: list[Any], whole: list[Any]) -> int:
    """The wait status of a child that ran until it was killed, or to its end."""
    before = len(lines(folder / "told.jsonl"))
    child = os.fork()
    if child == 0:
        try:
            run(folder, kill)
            os._exit(0)
        except StorageError as error:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            with (folder / "storage.txt").open("a") as stream:
                stream.write(f"{error.what} | {error.found} | {error.hint}\n")
            os._exit(4)
        finally:
            traceback.print_exc()
            sys.stderr.flush()
            os._exit(1)
    if kill[:1] == ["share"]:
        moment = kill[1] * whole[-1][0]
        passed = [line[0] for line in whole if line[0] <= moment]
        while len(lines(folder / "told.jsonl")) < before + len(passed):
            time.sleep(0.002)
        time.sleep((moment - passed[-1]) / 1e3)
        os.kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]


def main(folder: Path, scenarios: list[tuple[str, list[list[Any]]]]) -> None:
    """Run all scenarios, one after the other."""
    told: list[Any] = []
    for name, kills in [("whole", []), *scenarios]:
        place = folder / name
        place.mkdir(parents=True)
        statuses = [forked(place, kill, told) for kill in [*kills, []]]
        (place / "ended.json").write_text(json.dumps([-os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status) for status in statuses]))
        if name == "whole":
            told = lines(place / "told.jsonl")


if __name__ == "__main__":
    torch.set_num_threads(1)
    make_teacher("classification")
    main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))

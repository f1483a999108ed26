"""One teacher for several targets: a run for each, their verdicts in one report."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekd.caches import CACHE_NAME
from edgekd.contracts import Target
from edgekd.errors import ConfigError
from edgekd.pipeline import compress, make_context, plan
from edgekd.planning import Plan
from edgekd.records import Outcome, Record
from edgekd.report.data import ReportData
from edgekd.report.fleet import write_fleet_report
from edgekd.result import Result
from edgekd.stages import StageStore
from edgekd.verdict import EXIT_OF, worst

FLEET = "fleet.json"
"""The file in a folder that holds the runs of several targets."""


class FleetRecord(Record, tag="edgekd.fleet/1", frozen=True, kw_only=True):
    """The targets of a run folder, in order, each with the folder of its run in it."""

    runs: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Fleet:
    """What several targets came to, by their names and in their order. `report` shows all of them; each result has its own, too."""

    results: Mapping[str, Result]
    report: Path
    run_dir: Path

    @property
    def outcome(self) -> Outcome:
        """The worst of the verdicts: any fail is a fail; else any refuse is a refuse; else pass."""
        return worst(result.verdict.outcome for result in self.results.values())

    @property
    def exit_code(self) -> int:
        """0 for pass on every target, 1 if one fails, else 2."""
        return EXIT_OF[self.outcome]


def compress_for(
    targets: Sequence[Target], teacher: Any, *, run_dir: Path | str, cache_dir: Path | str | None = None, progress: bool = True, **arguments: Any
) -> Fleet:
    """The same teacher, data and budget on several targets that are open: for each what `edgekd.compress` gives, and one report of all.

    Each target's run lies in `run_dir/NAME` and is the one that `compress` would make there: either continues the other's. A relative
    budget is a share of what the teacher takes on that target. What does not depend on a target, such as the teacher's outputs, is
    shared through the cache, by default beside `run_dir`. Every target's arguments are checked before the first run starts.
    The remaining arguments are those of `compress`. The report is written after every run, so that an error in a later one loses nothing.

    Raises:
        ConfigError: fewer than two targets, or two of one name. What `compress` raises, for the first target that it concerns.
    """
    place = Path(run_dir)
    folders = {target.name: _folder(target.name) for target in targets}
    if len(targets) < 2 or len(set(folders.values())) < len(targets):
        raise ConfigError(
            "several targets are two or more with names of their own",
            found=", ".join(target.name for target in targets) or "none",
            hint="use edgekd.compress for one target; for one device in two ways write a profile for each",
            subject="targets",
        )
    cache = place.parent / CACHE_NAME if cache_dir is None else Path(cache_dir)
    checked = {name: value for name, value in arguments.items() if name != "listener"}
    for target in targets:
        make_context(teacher, target=target, store=StageStore(place / folders[target.name]), cache_dir=cache, **checked)
    FleetRecord(runs=tuple(folders.items())).save(place / FLEET)
    results: dict[str, Result] = {}
    for target in targets:
        results[target.name] = compress(teacher, target=target, run_dir=place / folders[target.name], cache_dir=cache, progress=progress, **arguments)
        report = report_fleet(place)
    return Fleet(results, report, place)


def plan_for(targets: Sequence[Target], teacher: Any, *, run_dir: Path | str, cache_dir: Path | str | None = None, **arguments: Any) -> tuple[Plan, ...]:
    """What `compress_for` with the same arguments would do on each target. Nothing is trained or measured."""
    place = Path(run_dir)
    cache = place.parent / CACHE_NAME if cache_dir is None else cache_dir
    return tuple(plan(teacher, target=target, run_dir=place / _folder(target.name), cache_dir=cache, **arguments) for target in targets)


def report_fleet(run_dir: Path) -> Path:
    """Write the report of all targets again from the records of their runs; those that have not ended are named as such.

    Raises:
        InputError: the folder holds no runs of several targets.
    """
    runs = dict(FleetRecord.load(run_dir / FLEET).runs)
    records = {name: run_dir / folder / "report.json" for name, folder in runs.items()}
    ended = {name: path for name, path in records.items() if path.is_file()}
    path = run_dir / "report.html"
    write_fleet_report([ReportData.load(file) for file in ended.values()], [name for name in runs if name not in ended], path)
    return path


def _folder(name: str) -> str:
    """The name as a folder's."""
    return re.sub(r"[^\w.-]+", "-", name)

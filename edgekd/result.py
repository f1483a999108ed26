"""What a run gives back, and the summary it leaves on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from edgekd.records import Ledger, Point, Record, StudentSpec, Verdict
from edgekd.verdict import EXIT_OF


class RunSummary(Record, tag="edgekd.run/1", frozen=True, kw_only=True):
    """What a run ended with; `run.json` in the run folder. Paths are relative to it."""

    created_at: str
    verdict: Verdict
    target: str
    task: str
    seed: int
    bundle: str
    report: str
    student: str


@dataclass(frozen=True)
class Result:
    """What a run gives. `bundle` is `None` when there is no artifact; trust `verdict`: only a pass is a success."""

    verdict: Verdict
    ledger: Ledger
    bundle: Path | None
    report: Path
    run_dir: Path
    points: tuple[Point, ...]
    student: StudentSpec | None

    @property
    def exit_code(self) -> int:
        """0 for pass, 1 for fail, 2 for refuse."""
        return EXIT_OF[self.verdict.outcome]

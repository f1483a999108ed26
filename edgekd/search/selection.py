"""From a ranking to the one student that ships: only a pass verdict ends it well."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from edgekd.errors import Rejected
from edgekd.records import Outcome, Record, Verdict
from edgekd.records.model import NonNegative
from edgekd.search.model import Candidate


class Attempt(Record, tag="edgekd.attempt/1", frozen=True, kw_only=True):
    """One candidate that was taken to a verdict; `rejected` says why there is none."""

    label: str
    verdict: Verdict | None
    rejected: str = ""


class Selection(Record, tag="edgekd.selection/1", frozen=True, kw_only=True):
    """`chosen` is a candidate whose verdict is a pass, or `None`; `attempts` holds everything that was tried, in order, and
    `skipped` counts the candidates passed over because they are not faster than one that missed its latency."""

    chosen: Candidate | None
    attempts: tuple[Attempt, ...]
    skipped: NonNegative = 0


def choose_passing(
    ranked: Sequence[Candidate],
    judge: Callable[[Candidate], Verdict],
    *,
    attempts: int,
    latency_ms: Mapping[str, float] | None = None,
    go_on: Callable[[Verdict], bool] = lambda verdict: True,
) -> Selection:
    """The first candidate of the ranking that passes `judge`, in at most `attempts` verdicts; nothing else is ever chosen.

    `judge` builds, trains and measures the candidate, and gives the verdict on its final artifact; if it raises `Rejected`, the next one
    is tried. After a candidate that did not pass its latency (check `latency`), only those with a smaller screened `latency_ms` are
    tried: it shows that the screen was too kind. `go_on` is asked after a verdict that is no pass whether another candidate could
    do better: not where the evidence is simulated or the device disturbed.
    """
    taken: list[Attempt] = []
    skipped = 0
    ceiling = float("inf")
    for candidate in ranked:
        if len(taken) >= attempts:
            break
        screened = latency_ms[candidate.label] if latency_ms is not None else None
        if screened is not None and screened >= ceiling:
            skipped += 1
            continue
        try:
            verdict = judge(candidate)
        except Rejected as error:
            taken.append(Attempt(label=candidate.label, verdict=None, rejected=str(error)))
            continue
        taken.append(Attempt(label=candidate.label, verdict=verdict))
        if verdict.outcome is Outcome.PASS:
            return Selection(chosen=candidate, attempts=tuple(taken), skipped=skipped)
        if not go_on(verdict):
            break
        if screened is not None and any(check.name == "latency" and check.outcome is not Outcome.PASS for check in verdict.checks):
            ceiling = screened
    return Selection(chosen=None, attempts=tuple(taken), skipped=skipped)

"""The search stage: candidates measured whole on the target at the deployed precision, finalists ranked by short trainings."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgekd.errors import ConfigError, ModelError
from edgekd.records import HopParity, LedgerRow, Point, Record, StudentSpec
from edgekd.search import Candidate, SearchOutcome, pick_finalists, rank_by_training, search
from edgekd.spaces import Family
from edgekd.steps.baseline import BaselineOut
from edgekd.steps.bench import CandidateBench, short_name
from edgekd.steps.context import Context, row
from edgekd.steps.training import train_student


class SearchOut(Record, tag="edgekd.stage_search/1", frozen=True, kw_only=True):
    """`order` lists the students to try, best first; empty when nothing fits, then `certificate` says why, and `proven` whether the
    measurements show that nothing can fit, or only that nothing surely does. It is also empty when every student that fits stopped in
    its short training, or computes something else as a file: `stopped` then maps each to its reason. `parity` holds the comparisons that failed."""

    order: tuple[StudentSpec, ...]
    points: tuple[Point, ...]
    counts: dict[str, int]
    predictor_error: float | None
    certificate: str
    proven: bool = False
    stopped: dict[str, str] = {}
    parity: tuple[HopParity, ...] = ()
    rows: tuple[LedgerRow, ...]


def run_search(context: Context, scratch: Path, baseline: BaselineOut) -> SearchOut:
    """Find students within the limit, among those whose operators the target runs.

    Raises:
        ModelError: not a single candidate can be built and run on the target; names the module, the operator and what to use instead.
    """
    specs = context.space.candidates(context.seed)
    if not specs:
        raise ConfigError("the student space is empty", hint="check its choices and its where=")
    if specs[0].kind == "fixed-onnx":
        why = row(context, "search", "candidates", "skipped", "the student is a file: there is nothing to choose")
        return SearchOut(order=specs, points=(), counts={"proposed": 1, "measured": 0, "rejected": 0}, predictor_error=None, certificate="", rows=(why,))
    bench = CandidateBench(context, scratch)
    candidates = bench.candidates()
    if not candidates:
        raise _nothing_runs(bench.unbuildable)
    report = bench.preflight(candidates)
    report.require_some(or_differing=True)
    context.note("search", report.summary())
    refused = report.refused()
    first = row(context, "search", "preflight", "noted", report.summary(), details=report.counts())
    if not any(item.passed for item in report.sets):
        left_out = {**bench.unbuildable, **refused}
        return SearchOut(
            order=(),
            points=(),
            counts={"in the space": len(specs), "proposed": 0, "measured": 0, "measurements": 0, "rejected": len(left_out)},
            predictor_error=None,
            certificate="",
            stopped=left_out,
            parity=report.parity,
            rows=(first, *(row(context, "search", label, "rolled back", reason) for label, reason in sorted(left_out.items()))),
        )
    outcome = search(
        [candidate for candidate in candidates if candidate.label not in refused],
        measure=bench.measure,
        limit_ms=baseline.limit_ms,
        options=context.options.search,
        seed=context.seed,
        progress=lambda text: context.note("search", text),
    )
    rejected = {**bench.unbuildable, **refused, **outcome.rejected}
    if len(rejected) >= len(specs):
        raise _nothing_runs(rejected)
    counts = {
        "in the space": len(specs),
        "proposed": outcome.proposed,
        "measured": outcome.measured,
        "measurements": outcome.measurements,
        "rejected": len(rejected),
    }
    rows = [
        first,
        row(context, "search", "candidates", "noted", outcome.summary(), details=dict(counts)),
    ]
    if isinstance(context.space, Family) and (note := context.space.note(context.seed)):
        rows.append(row(context, "search", "space", "noted", note))
    rows.extend(row(context, "search", label, "noted", reason) for label, reason in sorted(bench.float_only.items()))
    forms = [(f"{label} {form}", reason) for label, found in sorted(bench.refused_forms.items()) for form, reason in found.items()]
    rows.extend(row(context, "search", name, "rolled back", reason) for name, reason in forms)
    rows.extend(row(context, "search", label, "rolled back", reason) for label, reason in sorted(rejected.items()))
    context.note("search", outcome.summary())
    if outcome.certificate is not None:
        text = outcome.certificate.text()
        rows.append(row(context, "search", "feasibility", "rolled back", text))
        return SearchOut(
            order=(),
            points=outcome.points,
            counts=counts,
            predictor_error=outcome.predictor_error,
            certificate=text,
            proven=outcome.certificate.proven,
            parity=report.parity,
            rows=tuple(rows),
        )
    order, stopped = _ranked(context, scratch, outcome, rows)
    return SearchOut(
        order=order,
        points=outcome.points,
        counts=counts,
        predictor_error=outcome.predictor_error,
        certificate="",
        stopped={} if order else stopped,
        parity=report.parity,
        rows=tuple(rows),
    )


def _nothing_runs(rejected: dict[str, str]) -> ModelError:
    shown = "; ".join(f"{label}: {reason}" for label, reason in sorted(rejected.items())[:3])
    return ModelError("no candidate of the space can be built and run on the target", found=shown, hint="fix the factory, or choose another space")


def _ranked(context: Context, scratch: Path, outcome: SearchOutcome, rows: list[LedgerRow]) -> tuple[tuple[StudentSpec, ...], dict[str, str]]:
    """Finalists by short trainings, then the other feasible candidates as they were ranked by size; and why trainings stopped, by label."""
    finalists = pick_finalists(outcome, context.options.search.finalists)
    validation = context.validation.all()

    def train(candidate: Candidate, epochs: int) -> NDArray[np.float64]:
        from edgekd.teachers import TorchTeacher

        place = scratch / "rungs" / f"{short_name(candidate.spec)}-{epochs}"
        place.mkdir(parents=True, exist_ok=True)
        result = train_student(context, candidate.spec, place, label=f"{candidate.label} ({epochs} epochs)", epochs=epochs)
        return context.task.scores(TorchTeacher(result.module).outputs(validation.inputs), validation.targets)

    points = {point.label: point for point in outcome.points}
    halving = rank_by_training(finalists, train, points=points, rung_epochs=context.options.search.rung_epochs, binary=context.task.binary)
    for rung in halving.rungs:
        details: dict[str, float | int | str | bool] = {} if rung.accuracy is None else {"accuracy": rung.accuracy}
        rows.append(row(context, "search", f"{rung.label} after {rung.epochs} epochs", "kept" if rung.kept else "rolled back", rung.reason, details=details))
    by_label = {candidate.label: candidate.spec for candidate in outcome.feasible}
    trained = [by_label[label] for label in halving.order]
    rest = [candidate.spec for candidate in outcome.feasible if candidate.label not in halving.order and candidate.label not in halving.rejected]
    return (*trained, *rest), dict(halving.rejected)

"""The stages of one run in order: which student is tried next, what is bundled, and what a run without an artifact says."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from edgekd.artifact import StoredArtifact
from edgekd.caches import trim_cache
from edgekd.errors import Rejected
from edgekd.measuring.launching import utc_now
from edgekd.records import Check, HopParity, Ledger, LedgerRow, Outcome, Point, StudentSpec, Verdict
from edgekd.report.data import ReportData
from edgekd.report.render import write_report
from edgekd.result import Result, RunSummary
from edgekd.search import Candidate, choose_passing
from edgekd.steps.baseline import BaselineOut, load_outputs, run_baseline
from edgekd.steps.bundle import BundleOut, run_bundle
from edgekd.steps.context import Context, row
from edgekd.steps.convert import ConvertOut, run_convert
from edgekd.steps.distil import DistilOut, run_distil
from edgekd.steps.inputs import baseline_inputs, convert_inputs, quantize_inputs, run_facts, search_inputs, validate_inputs
from edgekd.steps.quantize import QuantizeOut, run_quantize
from edgekd.steps.reporting import mark_chosen, report_data
from edgekd.steps.search import SearchOut, run_search
from edgekd.steps.validate import ValidateOut, run_validate
from edgekd.storage import copy_folder
from edgekd.target import hardware_text
from edgekd.verdict import combine, outcome_of

_WORTH = {Outcome.PASS: 2, Outcome.REFUSE: 1, Outcome.FAIL: 0}
_ATTEMPT_STAGES = ("distil", "convert", "quantize", "validate")


@dataclass(frozen=True)
class _Attempt:
    """One student through the road, with what each stage left."""

    spec: StudentSpec
    distilled: DistilOut
    converted: ConvertOut
    quantized: QuantizeOut
    validated: ValidateOut
    folders: Mapping[str, Path]
    keys: Mapping[str, str]


class Road:
    """One run: `run` takes it from the first stage to the last, and keeps the account."""

    def __init__(self, context: Context) -> None:
        self.context = context
        self.rows: list[LedgerRow] = []
        self.points: list[Point] = []
        self.parity: list[HopParity] = []
        self.done: list[DistilOut | ConvertOut | QuantizeOut] = []
        """The stages that the attempt at hand has behind it."""
        self.teacher_missed = False
        """The quantized teacher was judged and missed the budget: it competes no more."""

    def run(self) -> Result:
        context = self.context
        facts = run_facts(context)
        baseline, baseline_dir = context.store.run(
            "baseline", baseline_inputs(context, facts), BaselineOut, lambda folder, scratch: run_baseline(context, folder, scratch)
        )
        context.limits = baseline.limits
        context.task.check(load_outputs(baseline_dir / "teacher_validation"), context.validation.all().targets, "validation")  # a task may learn its form
        if not context.target.capabilities.proven_on_hardware:
            self._add([row(context, "baseline", "hardware", "noted", hardware_text(context.target.profile, context.target))])
        self._add(baseline.rows, baseline.points, baseline.parity)
        found, _ = context.store.run("search", search_inputs(context, facts, baseline), SearchOut, lambda _, scratch: run_search(context, scratch, baseline))
        self._add(found.rows, found.points, found.parity)
        teacher_int8 = None if baseline.teacher_int8 is None else StoredArtifact(baseline.teacher_int8, baseline_dir / "teacher-int8")
        if not found.order:
            alone = self._teacher_alone(baseline, baseline_dir, teacher_int8, found)
            return alone or (self._no_student(baseline, found, found.stopped) if found.stopped else self._infeasible(baseline, found))
        attempts: dict[str, _Attempt] = {}
        stopped: dict[str, tuple[str, list[DistilOut | ConvertOut | QuantizeOut], object]] = {}

        def judge(candidate: Candidate) -> Verdict:
            self.done = []
            try:
                attempts[candidate.label] = attempt = self._attempt(candidate.spec, baseline, baseline_dir, teacher_int8)
            except Rejected as error:
                stopped[candidate.label] = (_ATTEMPT_STAGES[len(self.done)], self.done, error.subject)
                raise
            return attempt.validated.verdict

        selection = choose_passing(
            [Candidate(spec=spec, capacity=1.0, features={}) for spec in found.order],
            judge,
            attempts=context.options.search.attempts,
            latency_ms={point.label: point.latency_ms for point in found.points} or None,
            go_on=_another_may_do_better,
        )
        for position, tried in enumerate(selection.attempts):
            last = position == len(selection.attempts) - 1
            if tried.verdict is None:
                stage, done, subject = stopped[tried.label]
                for out in done:
                    self._add(out.rows, getattr(out, "points", ()), getattr(out, "parity", ()))
                self._add([row(context, stage, tried.label, "rolled back", tried.rejected)], (), [subject] if isinstance(subject, HopParity) else ())
                continue
            self._account(attempts[tried.label])
            if not last:
                self.rows.append(
                    row(context, "validate", tried.label, "rolled back", f"the verdict is {tried.verdict.outcome.value}: on to the next candidate")
                )
        ended = [tried.label for tried in selection.attempts if tried.verdict is not None]
        if not ended:
            rejected = {tried.label: tried.rejected for tried in selection.attempts}
            return self._teacher_alone(baseline, baseline_dir, teacher_int8, found) or self._no_student(baseline, found, rejected)
        judged = sorted((attempts[label] for label in ended), key=lambda one: _WORTH[outcome_of(one.validated.verdict.checks)])[-1]  # the latest among equals
        return self._finish(judged.validated, judged.folders["validate"], judged, baseline, baseline_dir, found)

    def _add(self, rows: Sequence[LedgerRow], points: Sequence[Point] = (), parity: Sequence[HopParity] = ()) -> None:
        self.rows.extend(rows)
        self.points.extend(points)
        self.parity.extend(parity)

    def _account(self, attempt: _Attempt) -> None:
        self._add(attempt.distilled.rows)
        self._add(attempt.converted.rows, (), attempt.converted.parity)
        self._add(attempt.quantized.rows, attempt.quantized.points, attempt.quantized.parity)
        self._add(attempt.validated.rows, (), attempt.validated.parity)

    def _attempt(self, spec: StudentSpec, baseline: BaselineOut, baseline_dir: Path, teacher_int8: StoredArtifact | None) -> _Attempt:
        context = self.context
        store = context.store
        distilled, distil_dir = store.run("distil", {"spec": spec}, DistilOut, lambda folder, scratch: run_distil(context, folder, scratch, baseline, spec))
        self.done.append(distilled)
        weights = distil_dir / "weights.safetensors"
        converted, convert_dir = store.run(
            "convert", convert_inputs(context), ConvertOut, lambda folder, _: run_convert(context, folder, distilled.spec, weights)
        )
        self.done.append(converted)
        source = StoredArtifact(converted.artifact, convert_dir / "float")
        teacher_validation = load_outputs(baseline_dir / "teacher_validation")
        teacher_scores = context.task.scores(teacher_validation, context.validation.all().targets)
        quantized, quantize_dir = store.run(
            "quantize",
            quantize_inputs(context),
            QuantizeOut,
            lambda folder, scratch: run_quantize(context, folder, scratch, baseline, source, teacher_scores),
        )
        self.done.append(quantized)
        student = StoredArtifact(quantized.artifact, quantize_dir / "chosen")
        validated, validate_dir = self._validate(student, baseline, baseline_dir, None if self.teacher_missed else teacher_int8)
        if validated.chosen != "student" and _another_may_do_better(validated.verdict):
            self.teacher_missed, missed = True, validated
            validated, validate_dir = self._validate(student, baseline, baseline_dir, None)
            validated = msgspec.structs.replace(validated, rows=(*missed.rows, *validated.rows), parity=(*missed.parity, *validated.parity))
        folders = {"distil": distil_dir, "convert": convert_dir, "quantize": quantize_dir, "validate": validate_dir}
        return _Attempt(distilled.spec, distilled, converted, quantized, validated, folders, dict(store.keys))

    def _validate(
        self, student: StoredArtifact | None, baseline: BaselineOut, baseline_dir: Path, teacher_int8: StoredArtifact | None
    ) -> tuple[ValidateOut, Path]:
        def validate(folder: Path, scratch: Path) -> ValidateOut:
            return run_validate(
                self.context,
                folder,
                baseline,
                student=student,
                teacher=None if baseline.teacher is None else StoredArtifact(baseline.teacher, baseline_dir / "teacher"),
                teacher_int8=teacher_int8,
                teacher_validation=load_outputs(baseline_dir / "teacher_validation"),
                teacher_test=load_outputs(baseline_dir / "teacher_test"),
                scratch=scratch,
            )

        subjects = [name for name, model in (("student", student), ("teacher int8", teacher_int8)) if model is not None]
        inputs = validate_inputs(self.context, " or ".join(subjects))
        return self.context.store.run("validate", inputs, ValidateOut, validate)

    def _teacher_alone(self, baseline: BaselineOut, baseline_dir: Path, teacher_int8: StoredArtifact | None, found: SearchOut) -> Result | None:
        """Where no student came through: the quantized teacher, if it meets the budget by itself and none of its checks is a fail."""
        if teacher_int8 is None or not baseline.teacher_int8_fits:
            return None
        validated, folder = self._validate(None, baseline, baseline_dir, teacher_int8)
        self._add(validated.rows, (), validated.parity)
        return None if outcome_of(validated.verdict.checks) is Outcome.FAIL else self._finish(validated, folder, None, baseline, baseline_dir, found)

    def _finish(
        self, validated: ValidateOut, validate_dir: Path, attempt: _Attempt | None, baseline: BaselineOut, baseline_dir: Path, found: SearchOut
    ) -> Result:
        """Bundle and report what was judged. Of `attempt` nothing is bundled where the quantized teacher was chosen."""
        context = self.context
        own = attempt if validated.chosen == "student" else None
        self.points = mark_chosen(self.points, validated)
        distilled = None if attempt is None else attempt.distilled
        report = report_data(context, self.rows, self.points, self.parity, found, distilled, validated, paths={"bundle": "bundle"})

        def make(folder: Path, _: Path) -> BundleOut:
            return run_bundle(
                context,
                folder,
                validated,
                validate_dir / "deployed",
                float_artifact=StoredArtifact(own.converted.artifact, own.folders["convert"] / "float")
                if own
                else StoredArtifact(_present(baseline), baseline_dir / "teacher"),
                spec=own.spec if own else None,
                weights=own.folders["distil"] / "weights.safetensors" if own else None,
                recipe=own.quantized.recipe if own else baseline.teacher_recipe,
                teacher_test=load_outputs(baseline_dir / "teacher_test"),
                ledger=Ledger(rows=tuple(self.rows)),
                report=report,
            )

        if attempt is not None:
            context.store.keys.update(attempt.keys)  # a later attempt may have ended without an artifact
        inputs = {"ledger": Ledger(rows=tuple(self.rows)).digest(), "data": context.options.bundle_data_mb}
        bundled, bundle_dir = context.store.run("bundle", inputs, BundleOut, make)
        self._add(bundled.rows)
        bundle = context.store.run_dir / "bundle"
        copy_folder(bundle_dir / "bundle", bundle)
        if bundled.manifest.data_capped:
            copy_folder(bundle_dir / "evaluation", context.store.run_dir / "evaluation")
        return self._close(
            validated.verdict,
            bundle,
            msgspec.structs.replace(report, ledger=Ledger(rows=tuple(self.rows)), paths={"bundle": str(bundle)}),
            own.spec if own else None,
            validated.chosen,
        )

    def _close(self, verdict: Verdict, bundle: Path | None, report: ReportData, spec: StudentSpec | None, chosen: str) -> Result:
        context = self.context
        run_dir = context.store.run_dir
        ledger = Ledger(rows=tuple(self.rows))
        if bundle is None:  # what an earlier run with another budget left must not be taken for this one's
            for name in ("bundle", "evaluation"):
                if (run_dir / name).is_dir():
                    shutil.rmtree(run_dir / name)
        ledger.save(run_dir / "ledger.json")
        report.save(run_dir / "report.json")
        write_report(report, run_dir / "report.html")
        RunSummary(
            created_at=utc_now(),
            verdict=verdict,
            target=context.target.name,
            task=context.task.name,
            seed=context.seed,
            bundle="" if bundle is None else str(bundle.relative_to(run_dir)),
            report="report.html",
            student=chosen if spec is None else spec.label(),
        ).save(run_dir / "run.json")
        removed = trim_cache(context.cache_dir, context.options.cache_mb)
        if removed:
            context.note("bundle", f"the cache was over {context.options.cache_mb:g} MB: its {len(removed)} oldest entries were removed")
        return Result(verdict, ledger, bundle, run_dir / "report.html", run_dir, tuple(self.points), spec)

    def _no_artifact(self, baseline: BaselineOut, found: SearchOut, check: Check) -> Result:
        context = self.context
        verdict = combine((check,), context.simulated, context.options.accept_simulated)
        report = report_data(context, self.rows, self.points, self.parity, found, None, None, paths={}, verdict=verdict, limit_ms=baseline.limit_ms)
        return self._close(verdict, None, report, None, "")

    def _infeasible(self, baseline: BaselineOut, found: SearchOut) -> Result:
        """A fail where the measurements show that nothing can fit; else a refuse: noise is never called a failure.

        A share of the teacher's latency is missed for sure only above the share of the upper bound of what the teacher took.
        """
        fastest = min(found.points, key=lambda seen: seen.latency_ms, default=None)
        outcome, reason, share = Outcome.FAIL if found.proven else Outcome.REFUSE, found.certificate, self.context.budget.latency_share
        if found.proven and share is not None and fastest is not None:
            highest_ms = share * next(seen.upper_ms for seen in baseline.points if seen.label == "teacher")
            if fastest.lower_ms <= highest_ms:
                outcome, reason = Outcome.REFUSE, f"{reason} But the limit is a share of the teacher's latency and may be up to {highest_ms:.4g} ms."
        check = Check(
            name="latency",
            outcome=outcome,
            value=None if fastest is None else fastest.latency_ms,
            limit=baseline.limit_ms,
            unit="ms",
            lower=None if fastest is None else fastest.lower_ms,
            upper=None if fastest is None else fastest.upper_ms,
            n=found.counts["measured"],
            reason=reason,
        )
        return self._no_artifact(baseline, found, check)

    def _no_student(self, baseline: BaselineOut, found: SearchOut, rejected: Mapping[str, str]) -> Result:
        """A refuse: no student was held against a line of the budget. `rejected` says by label why."""
        reason = "no student came through: " + "; ".join(f"{label}: {why}" for label, why in rejected.items())
        return self._no_artifact(baseline, found, Check(name="student", outcome=Outcome.REFUSE, value=None, limit=1.0, unit="students", reason=reason))


def _another_may_do_better(verdict: Verdict) -> bool:
    """Whether the next candidate is tried: where the latency, the size or the memory is missed, or a valid latency lies too near its limit.

    Not where the accuracy alone is missed: trying students until one passes on the test split would be choosing on it.
    """
    cost = [check for check in verdict.checks if not check.name.startswith("accuracy")]
    if any(check.outcome is Outcome.FAIL for check in cost):
        return True
    near = any(check.name == "latency" and check.outcome is Outcome.REFUSE and check.lower is not None and check.lower <= check.limit for check in cost)
    return near and verdict.outcome is Outcome.REFUSE


def _present(baseline: BaselineOut) -> Any:
    assert baseline.teacher is not None  # only an exported teacher can have been quantized and chosen
    return baseline.teacher

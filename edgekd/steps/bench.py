"""Candidates on the bench: built, exported, quantized and screened whole; what was made or measured survives a kill."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from edgekd.artifact import StoredArtifact
from edgekd.errors import ConversionRejected, Rejected, UnsupportedModel
from edgekd.measuring.measure import Screened
from edgekd.operators.hop import Hop
from edgekd.operators.preflight import SAMPLES, Watched, examine_sets
from edgekd.operators.report import PreflightReport
from edgekd.quantize.calibrate import calibration_set
from edgekd.quantize.proposals import Proposal, int8_proposals, timed_proposals
from edgekd.quantize.workshop import Workshop
from edgekd.records import Artifact, Precision, Record, StudentSpec
from edgekd.search import Candidate, Seen, describe_candidates
from edgekd.steps.context import Context
from edgekd.storage import folder_atomic
from edgekd.target import require_support

if TYPE_CHECKING:
    import torch

_TIMING_SAMPLES = 4


class _Made(Record, tag="edgekd.candidate_artifact/1", frozen=True, kw_only=True):
    """A candidate's artifact; its files lie beside this record."""

    artifact: Artifact


class _Answers(Record, tag="edgekd.search_answers/1", frozen=True, kw_only=True):
    """One call of the search, in the journal: a resumed search asks the same and gets the same answer without measuring."""

    labels: tuple[str, ...]
    seen: dict[str, Seen]
    float_only: dict[str, str] = {}
    refused_forms: dict[str, dict[str, str]] = {}

    @classmethod
    def of(cls, labels: tuple[str, ...], seen: dict[str, Seen], bench: CandidateBench) -> _Answers:
        """The answers for these labels, with what the bench learnt of them."""
        return cls(
            labels=labels,
            seen=seen,
            float_only={label: bench.float_only[label] for label in labels if label in bench.float_only},
            refused_forms={label: bench.refused_forms[label] for label in labels if label in bench.refused_forms},
        )


def short_name(spec: StudentSpec) -> str:
    """A file name for a candidate."""
    return hashlib.sha256(spec.label().encode()).hexdigest()[:12]


class CandidateBench:
    """Measures candidates for the search at the fastest precision that the profile allows; untrained weights suffice for timing."""

    def __init__(self, context: Context, scratch: Path) -> None:
        self.context = context
        self.scratch = scratch
        self.unbuildable: dict[str, str] = {}
        self.float_only: dict[str, str] = {}
        """Candidates that compete in float alone, each with the reason why its int8 could not be made."""
        self.refused_forms: dict[str, dict[str, str]] = {}
        """Of candidates that are timed in int8: the forms that are left out, each with the reason."""
        self._refusals: dict[tuple[str, str], UnsupportedModel | None] = {}
        self._sets: dict[str, str] = {}
        self._calls = 0
        self._measured: set[str] = set()
        self._watched = Watched()

    def candidates(self) -> tuple[Candidate, ...]:
        """Every member of the space that can be built, with its size; the others are named in `unbuildable`."""
        example = self.context.validation.all(1).inputs
        candidates, self.unbuildable = describe_candidates(self.context.space, example, self.context.seed, self._watched)
        return candidates

    def preflight(self, candidates: Sequence[Candidate]) -> PreflightReport:
        """Which operator sets of these candidates the target runs: one real conversion for each, kept for the measurements; a resumed search has the answer."""
        sets = self._watched.sets(candidates)
        self._sets = {label: item.key for item in sets for label in item.members}
        path = self.scratch / "preflight.json"
        if path.is_file():
            report = PreflightReport.load(path)
            if [(item.key, item.members) for item in report.sets] == [(item.key, item.members) for item in sets]:
                return report
        context = self.context
        report = examine_sets(
            sets,
            {candidate.label: candidate.spec for candidate in candidates},
            build=lambda spec: context.space.build(spec, context.seed),
            keep=lambda spec, module, _: self._float(spec, module, anew=True),
            hop=Hop(context.target, context.toolchain),
            inputs=context.validation.all(SAMPLES).inputs,
        )
        report.save(path)
        return report

    def measure(self, batch: Sequence[Candidate]) -> Mapping[str, Seen]:
        """What each candidate took; asked again, it is measured again."""
        labels = tuple(candidate.label for candidate in batch)
        path = self.scratch / "answers" / f"{self._calls:04d}.json"
        self._calls += 1
        if path.is_file():
            answers = _Answers.load(path)
            if answers.labels == labels:
                self._measured.update(labels)
                self.float_only |= answers.float_only
                self.refused_forms |= answers.refused_forms
                return answers.seen
        seen = self._measure(batch)
        self._measured.update(labels)
        _Answers.of(labels, seen, self).save(path)
        return seen

    def _measure(self, batch: Sequence[Candidate]) -> dict[str, Seen]:
        seen: dict[str, Seen] = {}
        models: dict[str, StoredArtifact] = {}
        forms: dict[str, dict[str, Precision]] = {}
        for candidate in batch:
            try:
                made = self._artifacts(candidate.spec)
            except Rejected as error:
                seen[candidate.label] = Seen(valid=False, rejected=str(error))
                continue
            models |= {f"{candidate.label} {form}": model for form, model in made.items()}
            forms[candidate.label] = {form: model.record.precision for form, model in made.items()}
        again = any(candidate.label in self._measured for candidate in batch)
        screened = self.context.screen(models, fresh=self._calls if again else 0) if models else {}
        for label, precisions in forms.items():
            mine = {form: screened[f"{label} {form}"] for form in precisions}
            for form, item in mine.items():
                if not item.measurement.valid:
                    self.context.note("search", f"{label} {form} could not be measured: {item.measurement.reason}")
            if mine:
                seen[label] = _fastest(mine, precisions)
        return seen

    def _artifacts(self, spec: StudentSpec) -> dict[str, StoredArtifact]:
        """What a candidate is timed as: `fp32`, `int8` as it is proposed first, and `int8` with the proposal's label for the others.

        Raises:
            Rejected: the candidate cannot be converted, its file holds too many transpositions, or it cannot be made int8 where nothing else is wanted.
        """
        model = self._float(spec, None)
        self.context.hold_transposes(model, lambda: self.context.space.build(spec, self.context.seed))
        out = {Precision.FP32.value: model} if self.context.wants(Precision.FP32) else {}
        if self.context.wants(Precision.INT8) and spec.label() not in self.float_only:
            try:
                out |= self._quantized(model, spec)
            except Rejected as error:
                if not out:
                    raise
                self.float_only[spec.label()] = f"int8 could not be made: {error}"
        return out

    def _float(self, spec: StudentSpec, module: torch.nn.Module | None, *, anew: bool = False) -> StoredArtifact:
        """A candidate's float file; `module` is the candidate, where it is built already.

        `anew` replaces what a killed search left: a factory may draw weights from a generator that no seed governs, and the file is compared with `module`.
        """

        def make(place: Path) -> StoredArtifact:
            return self.context.export(self.context.space.build(spec, self.context.seed) if module is None else module, place)

        name = f"{short_name(spec)}-fp32"
        if anew:
            shutil.rmtree(self.scratch / "candidates" / name, ignore_errors=True)
        return self._kept(name, make)

    def _kept(self, name: str, make: Callable[[Path], StoredArtifact]) -> StoredArtifact:
        final = self.scratch / "candidates" / name
        if not (final / "made.json").is_file():
            with folder_atomic(final) as place:
                _Made(artifact=make(place).record).save(place / "made.json")
        return StoredArtifact(_Made.load(final / "made.json").artifact, final)

    def _quantized(self, source: StoredArtifact, spec: StudentSpec) -> dict[str, StoredArtifact]:
        """The candidate in the target's int8 schemes that the quantizer takes it in and the target runs; the others are named in `refused_forms`.

        Raises:
            ConversionRejected, UnsupportedModel: it is refused in all of them, or the target has none.
        """
        made: dict[str, StoredArtifact] = {}
        refused: dict[str, Rejected] = {}
        workshops: list[Workshop] = []

        def quantized(proposal: Proposal, place: Path) -> StoredArtifact:
            if not workshops:
                workshops.append(self._workshop(source, Path(work)))
            return workshops[0].make(proposal.scheme, "minmax", op_rules=dict(proposal.op_rules)).artifact.copy_to(place)

        with tempfile.TemporaryDirectory(prefix="edgekd.bench.") as work:
            for position, proposal in enumerate(timed_proposals(int8_proposals(source, self.context.target.capabilities))):
                form = f"{Precision.INT8.value} {proposal.label}" if position else Precision.INT8.value
                try:
                    model = self._kept(f"{short_name(spec)}-{form.replace(' ', '-')}", partial(quantized, proposal))
                    self._require_support(spec, proposal.label, model)
                except (ConversionRejected, UnsupportedModel) as error:
                    refused[proposal.label] = error
                else:
                    made[form] = model
        if not made:
            raise next(iter(refused.values()))
        if refused:
            self.refused_forms[spec.label()] = {form: str(error) for form, error in refused.items()}
        return made

    def _require_support(self, spec: StudentSpec, form: str, model: StoredArtifact) -> None:
        """Ask the target whether it runs an int8 form; the answer serves all candidates of the operator set.

        Raises:
            UnsupportedModel: it does not.
        """
        key = (self._sets.get(spec.label(), spec.label()), form)
        if key not in self._refusals:
            try:
                require_support(self.context.target, model, form)
                self._refusals[key] = None
            except UnsupportedModel as error:
                self._refusals[key] = error
        refusal = self._refusals[key]
        if refusal is not None:
            raise refusal

    def _workshop(self, source: StoredArtifact, folder: Path) -> Workshop:
        toolchain = self.context.toolchain
        return Workshop(
            source,
            prepare=toolchain.converter("prepare"),
            converter=toolchain.converter("quantizer"),
            infer=self.context.target.runtime.infer,
            calibration=calibration_set(self.context.validation.all(_TIMING_SAMPLES).inputs, split="validation (timing only)"),
            options=self.context.options.quantize,
            folder=folder,
        )


def _fastest(screened: Mapping[str, Screened], precisions: Mapping[str, Precision]) -> Seen:
    valid = {form: item for form, item in screened.items() if item.measurement.valid}
    if len(valid) < len(screened):
        return Seen(valid=False)
    form, item = min(valid.items(), key=lambda pair: pair[1].latency_ms)
    return Seen(latency_ms=item.latency_ms, lower_ms=item.lower_ms, upper_ms=item.upper_ms, precision=precisions[form].value)

"""A shipped bundle against its own budget: the same verdict function, measured anew on the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from edgekd.bundle import Bundle, open_bundle
from edgekd.contracts import Target
from edgekd.errors import BundleError
from edgekd.measure import Subject, calibrate_limits, measure_verdict
from edgekd.records import Manifest, Measurement, Outcome, Verdict
from edgekd.target import connect
from edgekd.tasks import task_from
from edgekd.verdict import is_undecided, judge, require_samples


@dataclass(frozen=True)
class GateResult:
    """A verdict on a bundle with its evidence; `measurement` is absent when the device is not the bundle's."""

    verdict: Verdict
    manifest: Manifest
    measurement: Measurement | None
    student_accuracy: float | None
    teacher_accuracy: float | None
    agreement: float | None
    target: str


def validate(
    bundle: Path | str,
    *,
    target: Target | str | None = None,
    data: Path | str | None = None,
    accept_simulated: bool = False,
    overrides: Sequence[str] = (),
    progress: Callable[[str, int, int], None] | None = None,
) -> Verdict:
    """The verdict on a bundle, measured now; see `gate`."""
    return gate(bundle, target=target, data=data, accept_simulated=accept_simulated, overrides=overrides, progress=progress).verdict


def gate(
    bundle: Path | str,
    *,
    target: Target | str | None = None,
    data: Path | str | None = None,
    accept_simulated: bool = False,
    overrides: Sequence[str] = (),
    progress: Callable[[str, int, int], None] | None = None,
) -> GateResult:
    """The verdict on a bundle with its evidence. Nothing is taken from a cache, and no user code runs.

    `target` is a live target or a profile's name (default: the bundle's own profile); `data` is a folder of evaluation data where
    the bundle has none. A device whose identity differs from the manifest's gives refuse.

    Raises:
        BundleError: the bundle is incomplete or was changed.
        InputError: the target's launches are too short for the budget's percentile.
        DeviceError: the device failed.
    """
    opened = open_bundle(Path(bundle))
    if target is None and (Path(opened.manifest.profile).name != opened.manifest.profile or opened.manifest.profile.endswith(".toml")):
        raise BundleError(
            "a bundle may name a profile, not bring one", found=opened.manifest.profile, hint="give the target yourself: --target NAME", subject=opened.folder
        )
    if target is None or isinstance(target, str):
        with connect(target or opened.manifest.profile, overrides=overrides) as live:
            return _gate(opened, live, None if data is None else Path(data), accept_simulated, progress)
    return _gate(opened, target, None if data is None else Path(data), accept_simulated, progress)


def _gate(bundle: Bundle, target: Target, data: Path | None, accept_simulated: bool, progress: Callable[[str, int, int], None] | None) -> GateResult:
    manifest = bundle.manifest
    require_samples(target.profile.measure.verdict.launch, manifest.budget.percentile)
    differing = target.fingerprint.differing(manifest.fingerprint, manifest.identity)
    if differing:
        text = ", ".join(f"{name} is {now} and was {then}" for name, (now, then) in sorted(differing.items()))
        verdict = Verdict(outcome=Outcome.REFUSE, checks=(), reason=f"other device than the bundle was validated on: {text}", simulated=target.simulated)
        return GateResult(verdict, manifest, None, None, None, None, target.name)
    evaluation = bundle.evaluation(data)
    task = task_from(manifest.task)
    outputs = target.runtime.infer(bundle.artifact, evaluation.inputs)
    task.check(outputs, evaluation.targets)
    task.check(evaluation.teacher, evaluation.targets)
    scores = task.scores(outputs, evaluation.targets)
    teacher_scores = task.scores(evaluation.teacher, evaluation.targets)
    rotation = target.profile.measure.verdict.launch.rotation
    subject = Subject("student", bundle.artifact, {name: value[:rotation] for name, value in evaluation.inputs.items()})
    limits = calibrate_limits(target, subject, cache_dir=None, seed=manifest.seed)
    budget = msgspec.structs.replace(manifest.budget, latency_ms=manifest.latency_limit_ms, latency_share=None)

    def decide(seen: Mapping[str, Measurement]) -> Verdict:
        return judge(
            budget=budget,
            limit_ms=manifest.latency_limit_ms,
            measurement=seen["student"],
            plan=target.profile.measure.verdict,
            student_scores=scores,
            teacher_scores=teacher_scores,
            binary=task.binary,
            size_bytes=manifest.artifact.size_bytes,
            accept_simulated=accept_simulated,
        )

    measured = measure_verdict(
        target,
        [subject],
        limits=limits,
        seed=manifest.seed,
        undecided=lambda seen: is_undecided(decide(seen)),
        progress=progress,
    )
    return GateResult(
        decide(measured),
        manifest,
        measured["student"],
        float(scores.mean()),
        float(teacher_scores.mean()),
        float(task.agreement(outputs, evaluation.teacher).mean()),
        target.name,
    )

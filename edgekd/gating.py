"""A shipped bundle against its own budget: the same verdict function, measured anew on the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec

from edgekd.bundle import Bundle, open_bundle
from edgekd.contracts import Target, Task
from edgekd.errors import ConfigError
from edgekd.measuring.launching import new_nonce
from edgekd.measuring.measure import Subject, calibrate_limits, measure_verdict
from edgekd.records import Manifest, Measurement, Outcome, Verdict
from edgekd.target import connect
from edgekd.tasks import has_bounded_scores
from edgekd.terms import differences, profile_here, profile_of, task_of
from edgekd.verdict import Limit, is_undecided, judge, require_samples, same_outputs


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
    judged_by: str = ""
    """Which profile judged, in words."""
    differences: tuple[str, ...] = ()
    """What the profile of this name sets here and now, or the one that the caller named, otherwise than the bundle's own."""
    task: str = ""
    """Whose task judged: edgekd's or the caller's own, by name."""


def validate(
    bundle: Path | str,
    *,
    target: Target | str | None = None,
    data: Path | str | None = None,
    accept_simulated: bool = False,
    overrides: Sequence[str] = (),
    task: Task | str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Verdict:
    """The verdict on a bundle, measured now; see `gate`."""
    return gate(bundle, target=target, data=data, accept_simulated=accept_simulated, overrides=overrides, task=task, progress=progress).verdict


def gate(
    bundle: Path | str,
    *,
    target: Target | str | None = None,
    data: Path | str | None = None,
    accept_simulated: bool = False,
    overrides: Sequence[str] = (),
    task: Task | str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> GateResult:
    """The verdict on a bundle with its evidence. Nothing comes from a cache or from the job of an earlier call, and no code runs that a bundle names.

    `target` is a live target, or a profile's name or path; the default is the profile that lies in the bundle. `overrides` change fields of
    either profile. `data` is a folder of evaluation data where the bundle has none. `task` is the user's own task, or its `module:name`, where
    the bundle was judged by one. A device whose identity differs from the manifest's gives refuse.

    Raises:
        BundleError: the bundle is incomplete or was changed, its profile reaches another machine, or it needs another `task`.
        ConfigError: overrides are given with a live target, whose profile is fixed.
        InputError: the target's launches are too short for the budget's percentile.
        DeviceError: the device failed.
    """
    opened = open_bundle(Path(bundle))
    meaning = task_of(opened.manifest, task, opened.folder)
    own = opened.manifest.profile
    place = None if data is None else Path(data)
    changed = f", with {', '.join(overrides)}" if overrides else ""
    if target is None:
        with connect(profile_of(opened.manifest), overrides=overrides) as live:
            today = profile_here(own.name)
            result = _gate(opened, live, meaning, place, accept_simulated, progress)
            judged_by, other = f"the bundle's own profile {own.name!r}{changed}", own if today is None else today
    elif isinstance(target, str):
        with connect(target, overrides=overrides) as live:
            result = _gate(opened, live, meaning, place, accept_simulated, progress)
            judged_by, other = f"the profile {target!r} named in the call{changed}", live.profile
    elif overrides:
        raise ConfigError("a live target's profile is fixed", found=list(overrides), hint="give the overrides to edgekd.connect", subject=target.name)
    else:
        result = _gate(opened, target, meaning, place, accept_simulated, progress)
        judged_by, other = f"the profile {target.name!r} of the live target in the call", target.profile
    return replace(result, judged_by=judged_by, differences=differences(own, other))


def _gate(
    bundle: Bundle, target: Target, task: Task, data: Path | None, accept_simulated: bool, progress: Callable[[str, int, int], None] | None
) -> GateResult:
    manifest = bundle.manifest
    require_samples(target.profile.measure.verdict.launch, manifest.budget.percentile)
    whose = f"{manifest.task_code}, given in the call" if manifest.task_code else f"edgekd's {task.name}"
    differing = target.fingerprint.differing(manifest.fingerprint, manifest.profile.identity)
    if differing:
        text = ", ".join(f"{name} is {now} and was {then}" for name, (now, then) in sorted(differing.items()))
        verdict = Verdict(outcome=Outcome.REFUSE, checks=(), reason=f"other device than the bundle was validated on: {text}", simulated=target.simulated)
        return GateResult(verdict, manifest, None, None, None, None, target.name, task=whose)
    evaluation = bundle.evaluation(data)
    outputs = target.runtime.infer(bundle.artifact, evaluation.inputs)
    task.check(outputs, evaluation.targets, "test")
    task.check(evaluation.teacher, evaluation.targets, "test")
    scores = task.scores(outputs, evaluation.targets)
    teacher_scores = task.scores(evaluation.teacher, evaluation.targets)
    rotation = target.profile.measure.verdict.launch.rotation
    subject = Subject("student", bundle.artifact, {name: value[:rotation] for name, value in evaluation.inputs.items()})
    nonce = new_nonce()
    limits = calibrate_limits(target, subject, cache_dir=None, seed=manifest.seed, nonce=nonce)
    budget = msgspec.structs.replace(manifest.budget, latency_ms=manifest.latency_limit_ms, latency_share=None)
    identical = same_outputs(outputs, evaluation.teacher)

    def decide(seen: Mapping[str, Measurement]) -> Verdict:
        return judge(
            budget=budget,
            limit_ms=Limit(manifest.latency_limit_ms, manifest.latency_limit_upper_ms),
            measurement=seen["student"],
            plan=target.profile.measure.verdict,
            student_scores=scores,
            teacher_scores=teacher_scores,
            binary=task.binary,
            bounded=has_bounded_scores(task),
            identical=identical,
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
        nonce=nonce,
    )
    return GateResult(
        decide(measured),
        manifest,
        measured["student"],
        float(scores.mean()),
        float(teacher_scores.mean()),
        float(task.agreement(outputs, evaluation.teacher).mean()),
        target.name,
        task=whose,
    )

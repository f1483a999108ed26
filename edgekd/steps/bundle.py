"""The bundle stage: everything that a gate and a reader need, sealed by hashes."""

from __future__ import annotations

from pathlib import Path

import msgspec

from edgekd import __version__
from edgekd.artifact import StoredArtifact
from edgekd.bundle import file_hashes, model_card, save_evaluation, seal, versions, write_text
from edgekd.contracts import Tensors
from edgekd.measuring.launching import utc_now
from edgekd.records import Ledger, LedgerRow, Manifest, Measurement, QuantRecipe, Record, StudentSpec
from edgekd.report.data import ReportData
from edgekd.report.render import write_report
from edgekd.report.words import artifact_words, budget_text
from edgekd.steps.context import Context, row
from edgekd.steps.validate import ValidateOut
from edgekd.storage import copy_file, copy_folder
from edgekd.target import hardware_text
from edgekd.terms import own_task_text, portable


class Evidence(Record, tag="edgekd.evidence/1", frozen=True, kw_only=True):
    """The verdict-grade measurements behind a bundle's verdict, raw samples included."""

    measurements: tuple[Measurement, ...]


class BundleOut(Record, tag="edgekd.stage_bundle/1", frozen=True, kw_only=True):
    """The sealed bundle lies in the stage's folder `bundle`."""

    manifest: Manifest
    rows: tuple[LedgerRow, ...]


def run_bundle(
    context: Context,
    folder: Path,
    validated: ValidateOut,
    deployed: Path,
    *,
    float_artifact: StoredArtifact,
    spec: StudentSpec | None,
    weights: Path | None,
    recipe: QuantRecipe | None,
    teacher_test: Tensors,
    ledger: Ledger,
    report: ReportData,
) -> BundleOut:
    """Write and seal the bundle."""
    place = folder / "bundle"
    StoredArtifact(validated.artifact, deployed).copy_to(place / "artifact")
    float_artifact.copy_to(place / "float")
    if spec is not None:
        spec.save(place / "student" / "spec.json")
    if weights is not None and weights.is_file():
        copy_file(weights, place / "student" / "weights.safetensors")
    if recipe is not None:
        recipe.save(place / "recipe.json")
    test = context.test.all()
    evaluation = folder / "evaluation"
    size = save_evaluation(evaluation, test.inputs, test.targets, teacher_test)
    capped = size > context.options.bundle_data_mb * 1e6
    if not capped:
        copy_folder(evaluation, place / "evaluation")
    Evidence(measurements=validated.measurements).save(place / "evidence.json")
    items = len(next(iter(test.inputs.values())))
    held = f"{items} items, {size / 1e6:.1f} MB: a gate needs nothing else"
    over = f"{size / 1e6:.1f} MB is over the cap of {context.options.bundle_data_mb:g} MB: not in the bundle, a gate needs --data"
    profile, behind = portable(context.target.profile)
    task_code, task_hash = context.own_task
    rows = (row(context, "bundle", "evaluation data", "noted" if capped else "kept", over if capped else held), *_gate_needs(context, behind))
    msgspec.structs.replace(ledger, rows=(*ledger.rows, *rows)).save(place / "ledger.json")
    write_report(report, place / "report.html")
    manifest = Manifest(
        edgekd=__version__,
        created_at=utc_now(),
        artifact=validated.artifact,
        student=spec,
        budget=context.budget,
        latency_limit_ms=validated.limit_ms,
        latency_limit_upper_ms=validated.limit_upper_ms,
        verdict=validated.verdict,
        fingerprint=context.target.fingerprint,
        profile=profile,
        task=context.task.describe(),
        files={},
        versions=versions(),
        teacher={"name": context.teacher.name, "accuracy": validated.teacher_accuracy, "weights": context.teacher.weights_hash()[:16]},
        seed=context.seed,
        data_capped=capped,
        evaluation=file_hashes(evaluation) if capped else {},
        proven_on_hardware=context.target.capabilities.proven_on_hardware,
        stage_keys=dict(context.store.keys),
        accuracy=validated.student_accuracy,
        metric=context.task.metric,
        task_code=task_code,
        task_hash=task_hash,
        recipe=recipe,
    )
    name = validated.chosen if spec is None else f"{validated.chosen} ({spec.label()})"
    fields = context.target.fingerprint.fields
    summary = {
        "budget": budget_text(context.budget, validated.limit_ms),
        "latency": artifact_words(manifest).get("latency", "not measured"),
        f"{context.task.metric} of the artifact": f"{validated.student_accuracy:.4f}",
        f"{context.task.metric} of the teacher": f"{validated.teacher_accuracy:.4f}",
        "agreement": f"{validated.agreement:.4f}",
        "precision": validated.artifact.precision.value,
        "size": f"{validated.artifact.size_bytes / 1e6:.3f} MB",
        "file to load": f"artifact/{validated.artifact.entry}",
        "target": context.target.name,
        "device": fields.get("cpu_model", fields.get("device", "not told by the target")),
        "runtime": f"{fields.get('runtime', context.target.runtime.name)} {fields.get('runtime_version', '(version not told)')}",
        "threads": fields.get("threads", str(context.target.profile.runtime.threads)),
        "ran on hardware": hardware_text(context.target.profile, context.target),
        "made with": f"edgekd {__version__}, seed {context.seed}",
    }
    write_text(place / "MODEL_CARD.md", model_card(manifest, student=name, summary=summary))
    return BundleOut(manifest=seal(place, manifest), rows=rows)


def _gate_needs(context: Context, behind: tuple[str, ...]) -> tuple[LedgerRow, ...]:
    """Rows on what a gate of this bundle cannot do by itself; they are told at once too."""
    needs = {"task": own_task_text(context.task)}
    if behind:
        needs["profile"] = f"not in the bundle: {', '.join(behind)} (paths, hosts and texts do not travel); where a gate needs them, it needs --target or --set"
    for text in filter(None, needs.values()):
        context.note("bundle", text)
    return tuple(row(context, "bundle", f"{name} of a gate", "noted", text) for name, text in needs.items() if text)

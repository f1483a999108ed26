"""What a run would do, before it does it: stages, measurements, minutes and disk."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from edgekd.errors import UnsupportedModel
from edgekd.measuring.aa import BLOCKS
from edgekd.measuring.screening import launches_each
from edgekd.operators.preflight import Watched
from edgekd.quantize.module_structure import module_structure
from edgekd.quantize.proposals import Proposal, int8_proposals_for, timed_proposals
from edgekd.quantize.structure import Structure
from edgekd.records import Format, Precision, Record
from edgekd.search import describe_candidates
from edgekd.stages import STAGES
from edgekd.steps.baseline import BaselineOut
from edgekd.steps.context import Context
from edgekd.steps.inputs import baseline_inputs, run_facts, search_inputs
from edgekd.steps.search import SearchOut
from edgekd.teachers import OnnxTeacher

if TYPE_CHECKING:
    import torch

_START_S = 0.6
_EXPORT_S = {Format.ONNX: 3.0, Format.TFLITE: 8.0}
"""Seconds that a small network takes to become a file; the first one takes some more, for the libraries to load."""
_MEGABYTE = 1e6


class PlanRow(Record, tag="edgekd.plan_row/1", frozen=True, kw_only=True):
    """One stage: launches on the device, networks converted to float files, trainings, and minutes where they follow from the protocol.

    `finished`: the run folder holds its output for exactly these inputs. `done_before`: it holds outputs of this stage, for the same
    inputs or others; which, is known only when the stages before it are done.
    """

    stage: str
    about: str
    launches: int
    conversions: int = 0
    trainings: str
    minutes: float | None
    finished: bool
    done_before: bool = False


class Plan(Record, tag="edgekd.plan/1", frozen=True, kw_only=True):
    """The stages of a run. `minutes` is measuring and converting only: how long training takes is not known before it starts."""

    target: str
    simulated: str
    candidates: int
    items: dict[str, int]
    rows: tuple[PlanRow, ...]
    minutes: float
    disk_mb: float
    notes: tuple[str, ...]

    def text(self) -> str:
        """The plan as plain text."""
        lines = [f"target {self.target}" + (f" (simulated: {self.simulated})" if self.simulated else "") + f", {self.candidates} candidates"]
        lines.append("items: " + ", ".join(f"{name} {count if count >= 0 else 'stream'}" for name, count in self.items.items()))
        for row in self.rows:
            took = "finished: reused" if row.finished else "training time unknown" if row.minutes is None else f"about {row.minutes:.1f} min"
            converted = f"{row.conversions} conversion{'' if row.conversions == 1 else 's'}" if row.conversions else ""
            parts = [f"{row.launches} launches" if row.launches else "", converted, row.trainings, took]
            before = "; done before, with the same or other settings" if row.done_before else ""
            lines.append(f"{row.stage}: {', '.join(part for part in parts if part)}{before} ({row.about})")
        lines.append(f"measuring and converting: about {self.minutes:.1f} min; disk: about {self.disk_mb:.0f} MB")
        return "\n".join([*lines, *self.notes])


@dataclass(frozen=True)
class _Members:
    """The space as the search will meet it: candidates that can be built, operator sets, the forms that each candidate is timed in (most first), the
    most int8 proposals that a student has, and why members cannot be built."""

    built: int
    sets: int
    forms: tuple[int, ...]
    proposals: int
    unbuildable: Mapping[str, str]


@dataclass(frozen=True)
class _Work:
    """What a stage does: launches in screens and for a verdict, networks converted to float files, whether a file is made int8, and trainings."""

    screens: int = 0
    verdicts: int = 0
    conversions: int = 0
    quantized: bool = False
    trainings: str = ""


def make_plan(context: Context) -> Plan:
    """The plan of a run. Every student is built once, as the search does it, and thrown away; nothing is trained, converted or measured.

    Launches are those of an undisturbed device and of one attempt; a verdict that stays undecided takes up to three times as many. The search
    is counted as if it measured as many candidates as it may, each once; it often stops before, and measures doubtful ones again.
    What is not known before: conversions that look for the culprit of a refused operator set, and the screens of operators that return to float.
    """
    measure, options, specs = context.target.profile.measure, context.options, context.space.candidates(context.seed)
    from_file = specs[0].kind == "fixed-onnx"
    members = _Members(1, 0, (), len(_proposals(context, None)), {}) if from_file else _members(context)
    exported = context.teacher.module is not None or isinstance(context.teacher, OnnxTeacher)
    teacher_int8 = 0 if from_file or not exported else len(_proposals(context, context.teacher.module))
    searched = min(members.built, options.search.measurements)
    rungs = 0 if len(specs) == 1 else min(options.search.finalists, len(specs))
    longer = ", then fewer and longer" if rungs > 2 else ""
    screen_s = measure.screen.launch.warmup_min_s + measure.screen.launch.min_time_s + _START_S
    verdict_s = measure.verdict.launch.warmup_min_s + measure.verdict.launch.min_time_s + measure.verdict.launch.gap_s + _START_S
    export_s = _EXPORT_S.get(context.toolchain.format, max(_EXPORT_S.values()))

    def screened(subjects: int) -> int:
        return launches_each(measure.screen, subjects) * subjects if subjects else 0

    work = {
        "baseline": _Work(
            screens=4 * BLOCKS + screened(1) + (screened(1 + teacher_int8) if teacher_int8 else 0) if exported else 0,
            conversions=int(context.teacher.module is not None),
            quantized=teacher_int8 > 0,
        ),
        "search": _Work(
            screens=screened(sum(members.forms[:searched])),
            conversions=0 if from_file else min(members.built, searched + members.sets - 1),  # the smallest is tried and measured
            trainings=f"{rungs} trainings of {_epochs(options.search.rung_epochs)}{longer}" if rungs > 1 else "",
        ),
        "distil": _Work(trainings="" if from_file else f"1 training of {_epochs(options.train.epochs)} per attempt"),
        "convert": _Work(conversions=int(not from_file)),
        "quantize": _Work(screens=screened(1 + members.proposals), quantized=members.proposals > 0),
        "validate": _Work(screens=screened(2) if teacher_int8 else 0, verdicts=measure.verdict.launches * (1 + exported)),
        "bundle": _Work(),
    }
    finished = _finished(context)
    done = {path.name.partition("-")[0] for path in (context.store.run_dir / "stages").glob("*-*")}
    out = []
    for stage in STAGES:
        does = work[stage.name]
        measuring_s = 0.0 if context.simulated == "null" else does.screens * screen_s + does.verdicts * verdict_s
        seconds = measuring_s + export_s * (does.conversions + does.quantized)
        out.append(
            PlanRow(
                stage=stage.name,
                about=context.store.about.get(stage.name, stage.about),
                launches=does.screens + does.verdicts,
                conversions=does.conversions,
                trainings=does.trainings,
                minutes=None if stage.name == "distil" and does.trainings else seconds / 60.0,
                finished=stage.name in finished,
                done_before=stage.name in done - finished,
            )
        )
    batch = context.test.all(1)
    item = sum(value.nbytes for value in batch.inputs.values())
    splits = {"train": context.train, "validation": context.validation, "test": context.test}
    items = {name: len(split) if split.indexed else -1 for name, split in splits.items()}
    disk = max(items["test"], 0) * item + (max(items["train"], 0) * options.train.views * 4096 if options.train.teacher_outputs != "online" else 0)
    notes = ["a stage that was done before is reused only if its inputs, options and device are still the same"] if done - finished else []
    notes.extend(f"{label} cannot be built: {reason}" for label, reason in sorted(members.unbuildable.items()))
    return Plan(
        target=context.target.name,
        simulated=context.simulated,
        candidates=len(specs),
        items=items,
        rows=tuple(out),
        minutes=math.fsum(row.minutes for row in out if row.minutes is not None and not row.finished),
        disk_mb=disk / _MEGABYTE + 10.0,
        notes=tuple(notes),
    )


def _members(context: Context) -> _Members:
    """The students of the run's space; the smallest of an operator set stands for the structure of all of them."""
    watched = Watched()
    example = context.validation.all(1).inputs
    candidates, unbuildable = describe_candidates(context.space, example, context.seed, watched)
    sets = watched.sets(candidates)
    specs = {candidate.label: candidate.spec for candidate in candidates}
    forms: list[int] = []
    most = 0
    for item in sets:
        proposals = _proposals(context, context.space.build(specs[item.tried], context.seed))
        most = max(most, len(proposals))
        timed = len(timed_proposals(proposals)) if proposals else 0
        forms += [int(context.wants(Precision.FP32)) + timed] * len(item.members)
    return _Members(len(candidates), len(sets), tuple(sorted(forms, reverse=True)), most, unbuildable)


def _proposals(context: Context, module: torch.nn.Module | None) -> tuple[Proposal, ...]:
    """How a network is quantized here; none where the profile wants no int8 or the target cannot make it. Only in TFLite does it depend on the module."""
    if not (context.wants(Precision.INT8) and context.target.capabilities.taps):
        return ()
    format = context.toolchain.format
    structure = Structure()
    if format is Format.TFLITE and module is not None:
        structure = module_structure(module, context.validation.all(1).inputs)
    try:
        return int8_proposals_for(format, structure, context.target.capabilities)
    except UnsupportedModel:
        return ()  # the run goes on in float, and its ledger says why


def _epochs(count: int) -> str:
    return f"{count} epoch{'' if count == 1 else 's'}"


def _finished(context: Context) -> set[str]:
    """The stages whose stored output surely serves: the baseline, and the search, whose inputs follow from it."""
    facts = run_facts(context)
    baseline = context.store.stored("baseline", baseline_inputs(context, facts), BaselineOut)
    if baseline is None:
        return set()
    found = context.store.stored("search", search_inputs(context, facts, baseline), SearchOut)
    return {"baseline"} if found is None else {"baseline", "search"}

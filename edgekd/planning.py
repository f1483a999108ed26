"""What a run would do, before it does it: stages, measurements, minutes and disk."""

from __future__ import annotations

import math

from edgekd.measuring.screening import launches_each
from edgekd.quantize.recipes import candidate_schemes, timed_schemes
from edgekd.records import Format, Precision, Record
from edgekd.stages import STAGES
from edgekd.steps.baseline import BaselineOut
from edgekd.steps.context import Context
from edgekd.steps.inputs import baseline_inputs, run_facts, search_inputs
from edgekd.steps.search import SearchOut

_START_S = 0.6
_EXPORT_S = {Format.ONNX: 3.0, Format.TFLITE: 8.0}
"""Seconds that a small network takes to become a file; the first one takes some more, for the libraries to load."""
_MEGABYTE = 1e6


class PlanRow(Record, tag="edgekd.plan_row/1", frozen=True, kw_only=True):
    """One stage: launches on the device, trainings on the host, and minutes where they follow from the protocol.

    `finished`: the run folder holds its output for exactly these inputs. `done_before`: it holds outputs of this stage, for the same
    inputs or others; which, is known only when the stages before it are done.
    """

    stage: str
    about: str
    launches: int
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
            parts = [f"{row.launches} launches" if row.launches else "", row.trainings, took]
            before = "; done before, with the same or other settings" if row.done_before else ""
            lines.append(f"{row.stage}: {', '.join(part for part in parts if part)}{before} ({row.about})")
        lines.append(f"measuring and converting: about {self.minutes:.1f} min; disk: about {self.disk_mb:.0f} MB")
        return "\n".join([*lines, *self.notes])


def make_plan(context: Context) -> Plan:
    """The plan of a run. Launches are those of an undisturbed device; a verdict that stays undecided takes up to three times as many."""
    measure = context.target.profile.measure
    options = context.options
    capabilities, wants_int8 = context.target.capabilities, context.wants(Precision.INT8)
    forms = int(context.wants(Precision.FP32)) + (len(timed_schemes(capabilities)) if wants_int8 else 0)
    export_s = _EXPORT_S.get(context.toolchain.format, max(_EXPORT_S.values()))
    specs = context.space.candidates(context.seed)
    from_file = specs[0].kind == "fixed-onnx"
    searched = 0 if from_file else min(len(specs), options.search.measurements)
    finalists = min(options.search.finalists, len(specs))
    rungs = 0 if len(specs) == 1 else finalists
    screen_s = measure.screen.launch.warmup_min_s + measure.screen.launch.min_time_s + _START_S
    verdict_s = measure.verdict.launch.warmup_min_s + measure.verdict.launch.min_time_s + measure.verdict.launch.gap_s + _START_S
    verdicts = measure.verdict.launches
    int8 = 1 + len(candidate_schemes(capabilities)) if wants_int8 else 0
    alone, quantizing, pair = (launches_each(measure.screen, count) * count for count in (1, int8 or 1, 2))
    searching = launches_each(measure.screen, max(1, forms * searched))
    trained = "" if from_file else f"1 training of {_epochs(options.train.epochs)} per attempt"
    longer = ", then fewer and longer" if rungs > 2 else ""
    short = f"{rungs} trainings of {_epochs(options.search.rung_epochs)}{longer}" if rungs > 1 else ""
    rows = {
        "baseline": (8 + alone + (quantizing if int8 and not from_file else 0), "", screen_s, 2 * export_s),
        "search": (searching * forms * searched, short, screen_s, export_s * searched),
        "distil": (0, trained, 0.0, 0.0),
        "convert": (0, "", 0.0, export_s),
        "quantize": (quantizing + pair if int8 else alone, "", screen_s, export_s),
        "validate": (2 * verdicts, "", verdict_s, 0.0),
        "bundle": (0, "", 0.0, export_s),
    }
    finished = _finished(context)
    done = {path.name.partition("-")[0] for path in (context.store.run_dir / "stages").glob("*-*")}
    simulated = context.simulated == "null"
    out = []
    for stage in STAGES:
        launches, trainings, each_s, extra_s = rows[stage.name]
        seconds = (0.0 if simulated else launches * each_s) + extra_s
        out.append(
            PlanRow(
                stage=stage.name,
                about=context.store.about.get(stage.name, stage.about),
                launches=launches,
                trainings=trainings,
                minutes=None if stage.name == "distil" and trainings else seconds / 60.0,
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

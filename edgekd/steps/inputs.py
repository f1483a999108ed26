"""What the stages' keys are made of: each stage has the facts of the run, and only those options that it uses."""

from __future__ import annotations

from typing import Any

import msgspec

from edgekd.contracts import Task
from edgekd.keys import array_hash
from edgekd.provenance import code_hash
from edgekd.steps.baseline import BaselineOut
from edgekd.steps.context import Context
from edgekd.teachers import CallableTeacher

_ANSWERED = 8


def run_facts(context: Context) -> dict[str, Any]:
    """What every stage depends on: teacher, data, task, budget, target and seed; no options."""
    return {
        "teacher": context.teacher.weights_hash(),
        "teacher answers": _answers(context),
        "train": context.train.fingerprint(),
        "validation": context.validation.fingerprint(),
        "test": context.test.fingerprint(),
        "augment": code_hash(context.train.augment) if context.train.augment else "",
        "task": context.task.describe(),
        "task code": _own_code(context.task),
        "budget": context.budget,
        "profile": context.target.profile,
        "device": context.target.fingerprint,
        "seed": context.seed,
    }


def _answers(context: Context) -> str:
    """The hash of the teacher's outputs on a few items, where its weights cannot be hashed: a callable may hide them anywhere."""
    if not isinstance(context.teacher, CallableTeacher):
        return ""
    return array_hash(context.teacher.outputs(context.validation.all(_ANSWERED).inputs))


def baseline_inputs(context: Context, facts: dict[str, Any]) -> dict[str, Any]:
    """For the baseline: it quantizes the teacher, unless the student is a file, whose quantization is the road itself."""
    options = context.options
    from_file = getattr(context.space, "onnx", None) is not None
    return {**facts, "quantize": options.quantize, "parity": options.parity_samples, "extreme": options.allow_extreme, "file": from_file}


def search_inputs(context: Context, facts: dict[str, Any], baseline: BaselineOut) -> dict[str, Any]:
    """For the search, and through it for the training: with the two values that the search takes from the baseline.

    Threads and the time between checkpoints may change between a kill and the resumption.
    """
    options = context.options
    return {
        **facts,
        "limit_ms": baseline.limit_ms,
        "limits": baseline.limits,
        "space": context.space.source_hash(),
        "options": msgspec.structs.replace(options.search, attempts=1),
        "training": msgspec.structs.replace(options.train, threads=0, checkpoint_every_s=0.0),
    }


def convert_inputs(context: Context) -> dict[str, Any]:
    """For the convert stage."""
    return {"parity": context.options.parity_samples}


def quantize_inputs(context: Context) -> dict[str, Any]:
    """For the quantize stage."""
    return {"parity": context.options.parity_samples, "quantize": context.options.quantize}


def validate_inputs(context: Context, subject: str) -> dict[str, Any]:
    """For the validate stage of the student, or of the quantized teacher alone."""
    return {"subject": subject, "parity": context.options.parity_samples, "accept": context.options.accept_simulated}


def _own_code(task: Task) -> str:
    """The source hash of a task that the user wrote; empty for edgekd's own."""
    return "" if type(task).__module__.partition(".")[0] == "edgekd" else code_hash(type(task))

"""What the stages' keys are made of: each stage has the facts of the run, and only those options that it uses."""

from __future__ import annotations

from typing import Any

import msgspec

from edgekd.identity.provenance import built_hash, code_hash
from edgekd.steps.baseline import BaselineOut
from edgekd.steps.context import Context
from edgekd.teachers import AnsweringTeacher

_ANSWERED = 8


def run_facts(context: Context) -> dict[str, Any]:
    """What every stage depends on: teacher, data, task, budget, target and seed; no options."""
    teacher, items = context.teacher, context.validation.all(_ANSWERED).inputs
    if isinstance(teacher, AnsweringTeacher):
        teacher.answer(items)
    return {
        "teacher": teacher.weights_hash(),
        "train": context.train.fingerprint(),
        "validation": context.validation.fingerprint(),
        "test": context.test.fingerprint(),
        "task": context.task.describe(),
        "task code": code_hash(context.task),
        "budget": context.budget,
        "profile": context.target.profile,
        "device": context.target.fingerprint,
        "toolchain": context.toolchain,
        "seed": context.seed,
    }


def baseline_inputs(context: Context, facts: dict[str, Any]) -> dict[str, Any]:
    """For the baseline: it quantizes the teacher, unless the student is a file, whose quantization is the road itself."""
    options = context.options
    from_file = getattr(context.space, "onnx", None) is not None
    return {
        **facts,
        "processing": options.convert.processing,
        "quantize": options.quantize,
        "parity": options.parity_samples,
        "extreme": options.allow_extreme,
        "file": from_file,
    }


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
        "networks": built_hash(context.space, context.seed),
        "options": msgspec.structs.replace(options.search, attempts=1),
        "max_transposes": options.convert.max_transposes,
        "training": msgspec.structs.replace(options.train, threads=0, checkpoint_every_s=0.0),
    }


def convert_inputs(context: Context) -> dict[str, Any]:
    """For the convert stage."""
    return {"parity": context.options.parity_samples, "convert": context.options.convert}


def quantize_inputs(context: Context) -> dict[str, Any]:
    """For the quantize stage."""
    return {"parity": context.options.parity_samples, "quantize": context.options.quantize}


def validate_inputs(context: Context, subject: str) -> dict[str, Any]:
    """For the validate stage of the student, or of the quantized teacher alone."""
    return {"subject": subject, "parity": context.options.parity_samples, "accept": context.options.accept_simulated}

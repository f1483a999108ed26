"""What every stage is handed: the live target, data, task, budget and options of one run, and the few helpers they share."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgekd.artifact import StoredArtifact
from edgekd.contracts import Array, Callback, ConvertRequest, StudentSpace, Target, Task, Teacher, Tensors
from edgekd.conversion.bounds import asked_bound, module_bound, require_bound
from edgekd.conversion.processing import checked_processing, described, file_notes, require_range
from edgekd.conversion.toolchain import Toolchain, toolchain_of
from edgekd.data import Split
from edgekd.errors import ModelError
from edgekd.measuring.measure import Screened, Subject, screen
from edgekd.models.notes import annotate, labels_text
from edgekd.models.onnx_artifact import import_onnx
from edgekd.operators.hop import spec_of
from edgekd.options import Options
from edgekd.parity.compare import BASE_DEPTH, compare_hop
from edgekd.parity.graph import depth_told, output_ranges
from edgekd.records import Budget, Format, HopParity, IOSpec, LedgerRow, Limits, Point, Precision, Score
from edgekd.stages import StageStore
from edgekd.terms import own_code

if TYPE_CHECKING:
    import torch


@dataclass
class Context:
    """One run. `limits` is set by the baseline stage, everything else before the first stage.

    `own_task` is `terms.own_code` of the task before it is used: what a task of the user's own learns in its `check` is no part of it.
    """

    target: Target
    task: Task
    teacher: Teacher
    space: StudentSpace
    train: Split
    validation: Split
    test: Split
    budget: Budget
    options: Options
    seed: int
    store: StageStore
    cache_dir: Path
    callbacks: Sequence[Callback] = ()
    limits: Limits = field(default_factory=Limits)
    own_task: tuple[str, str] = field(init=False)
    toolchain: Toolchain = field(init=False)

    def __post_init__(self) -> None:
        self.own_task = own_code(self.task)
        self.toolchain = toolchain_of(self.target.capabilities)

    def note(self, stage: str, text: str) -> None:
        """Tell the listener, and the journal."""
        self.store.tell(stage, "note", text)

    def probe_inputs(self) -> dict[str, Array]:
        """A few plain validation items that timed inferences rotate over."""
        rotation = self.target.profile.measure.verdict.launch.rotation
        return self.validation.all(rotation).inputs

    def screen(self, models: Mapping[str, StoredArtifact], *, fresh: int = 0) -> dict[str, Screened]:
        """Screen-grade latency of some artifacts, interleaved; cached beside the run, unless `fresh` numbers a new measurement."""
        inputs = self.probe_inputs()
        subjects = [Subject(label, model, inputs) for label, model in models.items()]
        return screen(
            self.target, subjects, percentile=self.budget.percentile, limits=self.limits, seed=self.seed + fresh, cache_dir=None if fresh else self.cache_dir
        )

    def device_outputs(self, model: StoredArtifact, inputs: Tensors) -> dict[str, Array]:
        """The artifact's outputs for all samples, computed on the target."""
        return self.target.runtime.infer(model, inputs)

    def iospec(self) -> IOSpec:
        """The inputs that the data have, with the batch bound to 1; outputs are filled in by the converter."""
        return self._processed(spec_of(self.validation.all(1).inputs))

    def _processed(self, spec: IOSpec) -> IOSpec:
        """The description with normalization and value ranges, where the options say how the data were made."""
        processing = self.options.convert.processing
        if processing is None:
            return spec
        checked = checked_processing(msgspec.structs.replace(processing, outputs=()), spec, (self.toolchain.name,))
        require_range(self.validation.all(self.options.parity_samples).inputs, checked, "validation data")
        return described(spec, checked)

    def file_notes(self) -> dict[str, str]:
        """What is known here and goes into every file: the processing outside it, and the labels of the classes, where the task or that has them."""
        labels, processing = self.task.describe().get("labels", ""), self.options.convert.processing
        notes = {} if processing is None else file_notes(processing)
        return {**notes, "labels": labels_text(labels.split("\n"))} if labels else notes

    def export(self, source: Any, folder: Path) -> StoredArtifact:
        """A torch module as a float artifact in the target's format, with batch 1."""
        request = ConvertRequest(source=source, folder=folder, iospec=self.iospec(), example=self.validation.all(1).inputs, notes=self.file_notes())
        return self.toolchain.converter("exporter").convert(request)

    def hold_transposes(self, model: StoredArtifact, built: Callable[[], torch.nn.Module] | None) -> None:
        """Refuse a float file with more transpositions than the options allow or, without a number there, a TFLite file with more than its module asks for.

        `built` gives what the file was made from, where it is asked for; nothing for a file that was taken as it is.

        Raises:
            ConversionRejected: names the count, the operators and what removes them.
        """
        asked = self.options.convert.max_transposes
        if asked is not None:
            bound = asked_bound(asked)
        elif built is not None and self.toolchain.format is Format.TFLITE:
            bound = module_bound(built(), self.validation.all(1).inputs, self.iospec())
        else:
            return
        require_bound(model, bound, self.toolchain.exporter)

    def take_onnx(self, path: Path, folder: Path) -> StoredArtifact:
        """A user's ONNX file as an artifact with the notes of this run, with batch 1."""
        like = None if self.options.convert.processing is None else self.iospec()
        with tempfile.TemporaryDirectory(prefix="edgekd-") as work:
            return annotate(import_onnx(path, Path(work), like=like), folder, self.file_notes())

    def hop(self, name: str, reference: Tensors, outputs: Tensors, precision: Precision, model: StoredArtifact | None = None) -> HopParity:
        """One hop compared on every output, with the task's agreement where outputs have the names and shapes of the reference.

        `model` made `outputs`: its int8 ranges say what saturates, and its depth widens the tolerance beyond that of 50 operators.
        """
        limits = output_ranges(model) if model is not None and precision is Precision.INT8 else None
        depth = BASE_DEPTH if model is None else max(BASE_DEPTH, depth_told(model, BASE_DEPTH))
        comparable = all(key in outputs and outputs[key].shape == value.shape for key, value in reference.items())
        agreement = float(self.task.agreement(outputs, reference).mean()) if comparable else None
        return compare_hop(name, reference, outputs, precision=precision, depth=depth, agreement=agreement, limits=limits)

    def wants(self, precision: Precision) -> bool:
        """Whether the profile asks for a precision and the target has it."""
        return precision in self.target.profile.runtime.precisions and precision in self.target.capabilities.precisions

    @property
    def simulated(self) -> str:
        """Empty on a real device."""
        return self.target.simulated


def point(screened: Screened, *, precision: Precision, role: str, accuracy: float | None = None, capacity: float | None = None) -> Point:
    """A measured candidate for the plot."""
    return Point(
        label=screened.label,
        precision=precision.value,
        latency_ms=screened.latency_ms,
        lower_ms=screened.lower_ms,
        upper_ms=screened.upper_ms,
        accuracy=accuracy,
        capacity=capacity,
        role=role,
    )


def score(screened: Screened | None, model: StoredArtifact | None, scores: NDArray[np.float64] | None) -> Score:
    """Where an artifact stands, for a ledger row."""
    return Score(
        latency_ms=None if screened is None else screened.latency_ms,
        latency_error_ms=None if screened is None else (screened.upper_ms - screened.lower_ms) / 2,
        accuracy=None if scores is None else float(scores.mean()),
        size_bytes=None if model is None else model.record.size_bytes,
        precision="" if model is None else model.record.precision.value,
    )


def row(
    context: Context,
    stage: str,
    step: str,
    decision: str,
    reason: str,
    before: Score | None = None,
    after: Score | None = None,
    *,
    details: Mapping[str, float | int | str | bool] | None = None,
) -> LedgerRow:
    """A ledger row, marked when the target is simulated."""
    return LedgerRow(
        stage=stage, step=step, decision=decision, reason=reason, before=before, after=after, simulated=context.simulated, details=dict(details or {})
    )


def checked_outputs(context: Context, split: Split, *, what: str) -> dict[str, Array]:
    """The teacher's outputs on a whole split, checked against the task.

    Raises:
        DataError, ModelError: outputs and targets do not fit, or an output is not finite.
    """
    batch = split.all()
    outputs = context.teacher.outputs(batch.inputs)
    for name, value in outputs.items():
        if np.issubdtype(value.dtype, np.floating) and not np.isfinite(value).all():
            raise ModelError(
                f"the teacher's output {name!r} on the {what} data is not finite", found="NaN or infinity", hint="check the teacher's weights", subject=name
            )
    context.task.check(outputs, batch.targets, what)
    return outputs

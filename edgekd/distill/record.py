"""What a training leaves behind, as records that the report and the ledger read without torch."""

from __future__ import annotations

from edgekd.records.base import Record
from edgekd.records.model import NonNegative


class EpochRow(Record, tag="edgekd.epoch/1", frozen=True, kw_only=True):
    """One epoch, counted from 1. `train_loss` and `parts` are means over the epoch's items; parts are before their weights.

    `validation` is in the task's metric, `learning_rate` is that of the last step, `seconds` is wall time (of the last
    process only, if the epoch was interrupted).
    """

    epoch: NonNegative
    train_loss: float
    parts: dict[str, float] = {}
    validation: float
    learning_rate: float
    seconds: float


class TrainPlan(Record, tag="edgekd.train_plan/1", frozen=True, kw_only=True):
    """What was decided by timing at the start, and is kept when the training resumes. Times are milliseconds per step or batch."""

    identity: str
    precision: str
    precision_reason: str
    channels_last: bool
    probe_ms: dict[str, float] = {}
    teacher_outputs: str
    teacher_outputs_reason: str


class TrainRecord(Record, tag="edgekd.train/1", frozen=True, kw_only=True):
    """A finished training. `precision` is `fp32` or `bf16`; `teacher_outputs` is `cached`, `online` or `none`.

    `best_epoch` has the best validation metric, counted from 1; `selected` tells which weights were kept: `last`, `best`,
    `last (ema)` or `best (ema)`. `validation` is their metric. `identity` names what was trained on what.
    """

    label: str
    identity: str
    metric: str
    epochs_planned: NonNegative
    epochs: tuple[EpochRow, ...]
    steps: NonNegative
    validation: float
    best_epoch: NonNegative
    selected: str
    stopped_early: bool = False
    loss: str
    weight_task: float
    weight_soft: float
    precision: str
    precision_reason: str
    channels_last: bool = False
    teacher_outputs: str
    teacher_outputs_reason: str
    device: str
    parameters: NonNegative
    seconds: float
    weights_sha256: str
    notes: tuple[str, ...] = ()


class TrainState(Record, tag="edgekd.train_state/1", frozen=True, kw_only=True):
    """Where a checkpoint stands: `position` batches of epoch `epoch` (from 0) are done; `sums` are over `items` of that epoch."""

    identity: str
    epoch: NonNegative = 0
    position: NonNegative = 0
    step: NonNegative = 0
    items: NonNegative = 0
    sums: dict[str, float] = {}
    rows: tuple[EpochRow, ...] = ()
    best: float | None = None
    best_epoch: NonNegative = 0
    waited: NonNegative = 0
    seconds: float = 0.0
    teacher_outputs: str = ""
    teacher_outputs_reason: str = ""
    notes: tuple[str, ...] = ()
    optimizer_groups: tuple[dict[str, float | int | bool | str | None], ...] = ()
    optimizer_scalars: dict[str, float | int | bool] = {}


class InitReport(Record, tag="edgekd.init/1", frozen=True, kw_only=True):
    """What a student took over: `copied` maps its tensors to the teacher's names, `left` maps the others to the reason.

    `share` is the part of the student's values that were copied, in [0, 1].
    """

    copied: dict[str, str]
    left: dict[str, str]
    share: float

    def text(self) -> str:
        """One sentence for the ledger."""
        return f"{len(self.copied)} of {len(self.copied) + len(self.left)} tensors were taken from the teacher ({self.share:.0%} of the values)"

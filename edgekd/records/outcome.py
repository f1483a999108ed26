"""Records about results: the budget, each check against it, the verdict, the ledger and the manifest."""

from __future__ import annotations

import math
from enum import Enum

import msgspec

from edgekd.errors import BudgetError
from edgekd.records.base import Record
from edgekd.records.measure import Clock, Fingerprint, NonNegativeFloat
from edgekd.records.model import Artifact, NonNegative, QuantRecipe, StudentSpec
from edgekd.records.profile import Profile


class Outcome(str, Enum):
    """A verdict's three values; a refuse means that the evidence does not decide."""

    PASS = "pass"
    FAIL = "fail"
    REFUSE = "refuse"


class Budget(Record, tag="edgekd.budget/1", frozen=True, kw_only=True):
    """What the student may cost. Give `latency_ms`, or `latency_share` of the teacher's latency on the same target.

    `percentile` is of the inferences within a launch, in (0, 100). `max_drop` and `accuracy_floor` are in the task's metric
    (0.02 is two points). `size_mb` is in 10^6 bytes, `memory_mb` the peak resident memory of the process that runs the model,
    `first_inference_ms` and `init_ms` are judged at the same confidence as the latency.
    """

    latency_ms: float | None = None
    latency_share: float | None = None
    percentile: float = 50.0
    clock: Clock = Clock.END_TO_END
    max_drop: float | None = None
    accuracy_floor: float | None = None
    size_mb: float | None = None
    memory_mb: float | None = None
    first_inference_ms: float | None = None
    init_ms: float | None = None

    def __post_init__(self) -> None:
        for name, value in ((name, getattr(self, name)) for name in self.__struct_fields__):
            if type(value) is int:  # 50 and 50.0 are one budget: they must have one JSON
                msgspec.structs.force_setattr(self, name, float(value))
        for name in ("latency_ms", "latency_share", "size_mb", "memory_mb", "first_inference_ms", "init_ms"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                raise BudgetError(
                    f"the budget's {name} must be a positive number", found=value, hint="latencies are in milliseconds, sizes in megabytes (10^6 bytes)"
                )
        if (self.latency_ms is None) == (self.latency_share is None):
            raise BudgetError(
                "a budget has exactly one latency",
                found=f"latency_ms={self.latency_ms}, latency_share={self.latency_share}",
                hint="give latency_ms=0.30, or latency_share=0.5 for half the teacher's",
            )
        if self.latency_share is not None and self.latency_share > 1.0:
            raise BudgetError("latency_share is a share of the teacher's latency", found=self.latency_share, allowed="(0, 1]")
        for name in ("max_drop", "accuracy_floor"):
            value = getattr(self, name)
            if value is not None and value >= 1.0:
                raise BudgetError(
                    f"{name} is a fraction of the metric, not a percentage",
                    found=value,
                    allowed="below 1",
                    hint=f"did you mean {name}={value / 100:g}?",
                    subject=name,
                )
        if not 0.0 < self.percentile < 100.0:
            raise BudgetError(
                "the budget's percentile is out of range", found=self.percentile, allowed="above 0 and below 100", hint="use 50 for the median, 90 for p90"
            )
        if self.max_drop is not None and not self.max_drop >= 0.0:
            raise BudgetError("max_drop must not be negative", found=self.max_drop, hint="0.02 allows two points less than the teacher")


class Check(Record, tag="edgekd.check/1", frozen=True, kw_only=True):
    """One budget line against its evidence: `value` (`None`: nothing could be measured) with its confidence limits `lower` and
    `upper`, in `unit`."""

    name: str
    outcome: Outcome
    value: float | None
    limit: float
    unit: str
    lower: float | None = None
    upper: float | None = None
    confidence: float | None = None
    n: NonNegative = 0
    reason: str = ""
    undecided: bool = False


class Verdict(Record, tag="edgekd.verdict/1", frozen=True, kw_only=True):
    """Pass, fail or refuse, with every check. `simulated` names the kind of simulation the numbers come from, if any."""

    outcome: Outcome
    checks: tuple[Check, ...]
    reason: str
    simulated: str = ""
    accepted_simulated: bool = False


class Score(Record, tag="edgekd.score/1", frozen=True, kw_only=True):
    """Where an artifact stands when a ledger row is written. Latencies carry the half width of their interval."""

    latency_ms: NonNegativeFloat | None = None
    latency_error_ms: NonNegativeFloat | None = None
    accuracy: float | None = None
    size_bytes: NonNegative | None = None
    precision: str = ""


class LedgerRow(Record, tag="edgekd.ledger_row/1", frozen=True, kw_only=True):
    """One step: what it did to what, before and after, whether it was kept. `decision` is `kept`, `rolled back`, `skipped` or `noted`."""

    stage: str
    step: str
    decision: str
    reason: str
    before: Score | None = None
    after: Score | None = None
    simulated: str = ""
    details: dict[str, float | int | str | bool] = {}


class Ledger(Record, tag="edgekd.ledger/1", frozen=True, kw_only=True):
    """The account of every step of a run, in order."""

    rows: tuple[LedgerRow, ...] = ()


class TensorParity(Record, tag="edgekd.tensor_parity/1", frozen=True, kw_only=True):
    """How one output tensor of a hop compares with its source. `sqnr_db` is signal to error in decibel.

    `tolerance_kind` says what `tolerance` is: `relative`, a share of the reference's largest magnitude, or `sqnr`, decibel. `top1` is the
    share of samples whose largest value lies at the same index, `None` where the output holds no classes. `saturation` is the share of
    values at an end of the int8 range, `None` for values that are on no such grid. `layout` names the permutation after which a failed
    output agrees, for example `NHWC -> NCHW`.
    """

    name: str
    max_abs: float
    max_rel: float
    sqnr_db: float
    cosine: float
    tolerance: float
    passed: bool
    nonfinite: NonNegative = 0
    constant: bool = False
    reason: str = ""
    tolerance_kind: str = ""
    top1: float | None = None
    saturation: float | None = None
    layout: str = ""


class HopParity(Record, tag="edgekd.hop_parity/1", frozen=True, kw_only=True):
    """One hop of the road, for example `torch -> onnx`, on `samples` real inputs; `agreement` is the task's.

    `findings` names the faults that explain a failed hop, as `parity_faults.diagnose` found them.
    """

    hop: str
    passed: bool
    samples: NonNegative
    tensors: tuple[TensorParity, ...]
    agreement: float | None = None
    first_bad: str = ""
    findings: tuple[str, ...] = ()


class Point(Record, tag="edgekd.point/1", frozen=True, kw_only=True):
    """One measured candidate for the plot: latency in milliseconds with its limits, accuracy if it was trained."""

    label: str
    precision: str
    latency_ms: float
    lower_ms: float
    upper_ms: float
    accuracy: float | None = None
    capacity: float | None = None
    role: str = "candidate"


class Manifest(Record, tag="edgekd.manifest/2", frozen=True, kw_only=True):
    """What a bundle holds and claims; `files` maps every file of the bundle but the manifest to its SHA-256.

    A pass must stay below `latency_limit_ms`. A fail must exceed it too or, where the limit is a share of the teacher's measured latency,
    `latency_limit_upper_ms`.

    `evaluation` does so for evaluation data that were over the cap and lie elsewhere. `accuracy` is the artifact's on the
    test split, in `metric`. `seal` is the digest of the manifest without it.

    `recipe` is how an artifact in int8 was quantized, with the size and the split of its calibration.

    `profile` is the one that judged, overrides applied, without what may travel in no bundle (`terms.portable`). `task_code` is the
    `module:qualname` of a task that is not edgekd's own, `task_hash` the `code_hash` of the whole task; nothing imports them from here.
    """

    edgekd: str
    created_at: str
    artifact: Artifact
    student: StudentSpec | None
    budget: Budget
    latency_limit_ms: float
    verdict: Verdict
    fingerprint: Fingerprint
    profile: Profile
    task: dict[str, str]
    files: dict[str, str]
    versions: dict[str, str]
    teacher: dict[str, float | int | str]
    seed: int
    data_capped: bool = False
    proven_on_hardware: bool = False
    stage_keys: dict[str, str] = {}
    evaluation: dict[str, str] = {}
    accuracy: float | None = None
    metric: str = ""
    task_code: str = ""
    task_hash: str = ""
    latency_limit_upper_ms: float | None = None
    recipe: QuantRecipe | None = None
    seal: str = ""

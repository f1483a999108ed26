"""The second tier of configuration: everything that most users never touch, with its defaults, as frozen records."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from edgekd.errors import ConfigError
from edgekd.records.base import Record
from edgekd.records.measure import NonNegativeFloat, PositiveFloat, Share
from edgekd.records.model import NonNegative, Positive
from edgekd.records.processing import Processing

Probability = Annotated[float, Meta(ge=0.0, lt=1.0)]


class FeaturePair(Record, tag="edgekd.feature_pair/1", frozen=True, kw_only=True):
    """A feature loss between two modules, by their names in `named_modules()`; `kind` is `hint` or `attention`."""

    student: str
    teacher: str
    kind: Literal["hint", "attention"] = "hint"
    weight: PositiveFloat | None = None


class TrainOptions(Record, tag="edgekd.train_options/1", frozen=True, kw_only=True):
    """How the student is trained. `loss="auto"` takes logit standardization (LSKD) above four classes, Hinton KD below, and
    MSE for regression. `teacher_outputs="auto"` caches them per view when that is faster, measured at the start.
    Weights of `None` take the defaults of the loss. `threads=0` takes all of torch's threads or one, whichever a
    probe at the start finds faster; runs are equal to the byte only with `threads=1`.
    """

    epochs: Positive = 60
    batch_size: Positive = 64
    optimizer: Literal["sgd", "adamw"] = "sgd"
    learning_rate: PositiveFloat = 0.05
    momentum: Probability = 0.9
    weight_decay: NonNegativeFloat = 5e-4
    warmup_share: Share = 0.05
    clip_norm: NonNegativeFloat = 5.0
    ema: Probability = 0.0
    patience: NonNegative = 0
    loss: Literal["auto", "kd", "lskd", "mse", "none"] = "auto"
    temperature: PositiveFloat | None = None
    weight_task: NonNegativeFloat | None = None
    weight_soft: NonNegativeFloat | None = None
    features: tuple[FeaturePair, ...] = ()
    views: Positive = 8
    teacher_outputs: Literal["auto", "cached", "online"] = "auto"
    cache_features: bool = False
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    threads: NonNegative = 0
    checkpoint_every_s: NonNegativeFloat = 20.0
    init_from_teacher: Literal["auto", "no"] = "auto"


class SearchOptions(Record, tag="edgekd.search_options/1", frozen=True, kw_only=True):
    """How a space is searched. `measurements` bounds the candidates measured, `headroom` is the share of the budget that a
    screened candidate leaves free, `finalists` are distilled shortly (`rung_epochs`, doubled each round, half dropped)."""

    measurements: Positive = 40
    headroom: Share = 0.05
    finalists: Positive = 3
    rung_epochs: Positive = 4
    attempts: Positive = 2


class QuantizeOptions(Record, tag="edgekd.quantize_options/1", frozen=True, kw_only=True):
    """How int8 is made. Calibration inputs come from the training split; `memory_mb` bounds what calibration holds at once."""

    calibration_size: Positive = 256
    methods: tuple[Literal["minmax", "percentile", "entropy", "mse"], ...] = ("minmax", "percentile", "entropy", "mse")
    percentile: PositiveFloat = 99.99
    memory_mb: Positive = 512
    sensitivity_samples: Positive = 128
    max_float_ops: NonNegative = 8


class ConvertOptions(Record, tag="edgekd.convert_options/1", frozen=True, kw_only=True):
    """How the student becomes a file. `max_transposes` bounds the operators that move a whole tensor; without it a TFLite file may hold as
    many as the student itself asks for, and those at the borders (`docs/graphs.md`). `processing` is recorded in the files and in the manifest;
    in a run it lies outside, since the data are what the student takes."""

    max_transposes: NonNegative | None = None
    processing: Processing | None = None

    def __post_init__(self) -> None:
        if self.processing is not None and self.processing.inside:
            raise ConfigError(
                "in a run pre- and post-processing lie outside the file",
                found="where = inside",
                allowed='where = "outside"',
                hint="wrap the networks, so that the data are raw; or build it in afterwards with edgekd.convert",
                subject="processing",
            )


class Options(Record, tag="edgekd.options/1", frozen=True, kw_only=True):
    """Everything beside the arguments of `edgekd.compress`.

    `parity_samples` real inputs are compared at each hop. `bundle_data_mb` caps the evaluation data in the bundle, `cache_mb` the
    shared cache: the oldest entries go at the end of a run.
    `allow_extreme` accepts a budget above the teacher's latency or below a hundredth of it.
    """

    train: TrainOptions = TrainOptions()
    search: SearchOptions = SearchOptions()
    quantize: QuantizeOptions = QuantizeOptions()
    convert: ConvertOptions = ConvertOptions()
    parity_samples: Positive = 32
    bundle_data_mb: PositiveFloat = 256.0
    cache_mb: PositiveFloat = 4096.0
    allow_extreme: bool = False
    accept_simulated: bool = False

    def __post_init__(self) -> None:
        if self.search.headroom >= 0.9:
            raise ConfigError("search.headroom leaves nothing of the budget", found=self.search.headroom, allowed="0 to 0.9")

"""Records about what happens before and behind a network: normalisation, softmax, suppression of boxes, and whether the file does it."""

from __future__ import annotations

import math
from typing import Literal

from edgekd.errors import ConfigError
from edgekd.records.base import Record
from edgekd.records.measure import PositiveFloat
from edgekd.records.model import Positive

Where = Literal["inside", "outside"]


class InputProcessing(Record, tag="edgekd.input_processing/1", frozen=True, kw_only=True):
    """What raw values go through: `(x * scale - mean) / std`, one mean and deviation for all channels or one for each.

    `where`: `inside` the file, which then takes raw values, or `outside`, by whoever feeds it. `layout` says which axis holds the channels
    (`NCHW`, `NHWC`; by default the layout of the input, else axis 1). `value_range` is that of the raw values, by default 0 to 1 / `scale`.
    """

    where: Where = "outside"
    scale: PositiveFloat = 1.0
    mean: tuple[float, ...] = (0.0,)
    std: tuple[PositiveFloat, ...] = (1.0,)
    layout: str = ""
    value_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not self.mean or len(self.mean) != len(self.std):
            raise ConfigError("a normalisation has as many deviations as means, one or more", found=f"mean {self.mean}, std {self.std}", subject="std")
        if not all(map(math.isfinite, (self.scale, *self.mean, *self.std))):
            raise ConfigError("a normalisation holds finite numbers", found=f"scale {self.scale}, mean {self.mean}, std {self.std}", subject="mean")
        if self.value_range is not None and not self.value_range[0] < self.value_range[1]:
            raise ConfigError("a range of values goes from the lowest to the highest", found=self.value_range, subject="value_range")

    @property
    def raw_range(self) -> tuple[float, float]:
        """The lowest and the highest raw value."""
        return self.value_range or (0.0, 1.0 / self.scale)

    @property
    def normal_range(self) -> tuple[float, float]:
        """The lowest and the highest value behind the normalisation, over all channels."""
        ends = [(end * self.scale - mean) / std for end in self.raw_range for mean, std in zip(self.mean, self.std, strict=True)]
        return min(ends), max(ends)

    def text(self) -> str:
        """As `TensorSpec.normalization` has it: mean and deviation of what the file is fed from. Inside, in units of the raw values."""
        factor = self.scale if self.where == "inside" else 1.0
        mean, std = (",".join(f"{value / factor:.9g}" for value in values) for values in (self.mean, self.std))
        return f"{'inside ' if self.where == 'inside' else ''}mean={mean} std={std}"


class OutputProcessing(Record, tag="edgekd.output_processing/1", frozen=True, kw_only=True):
    """What an output goes through: `softmax` or `argmax` over `axis`, `sigmoid`, or `nms`.

    `nms` takes the outputs `boxes` (1, boxes, 4) and `scores` (1, boxes, classes) or (1, classes, boxes) and gives `output`, by default
    `detections` (1, max_detections, 6): four coordinates, score and class of each, best first; rows of no box have score 0 and class -1.
    `boxes` are two opposite corners, or with `centered` the centre with width and height. At most `max_detections` of each class are looked at.
    For the others `output` may be left out where the network has one output.
    """

    kind: Literal["softmax", "sigmoid", "argmax", "nms"]
    where: Where = "outside"
    output: str = ""
    axis: int = 1
    boxes: str = "boxes"
    scores: str = "scores"
    iou_threshold: float = 0.5
    score_threshold: float = 0.25
    max_detections: Positive = 100
    centered: bool = False

    def __post_init__(self) -> None:
        for name in ("iou_threshold", "score_threshold"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ConfigError(f"{name} is out of range", found=getattr(self, name), allowed="0 to 1", subject=name)


class Processing(Record, tag="edgekd.processing/1", frozen=True, kw_only=True):
    """What lies before and behind a network, part by part inside or outside its file; `inputs` by their names. `labels` are the classes'."""

    inputs: dict[str, InputProcessing] = {}
    outputs: tuple[OutputProcessing, ...] = ()
    labels: tuple[str, ...] = ()

    @property
    def inside(self) -> bool:
        """Whether the file does a part of it."""
        return "inside" in {*(part.where for part in self.inputs.values()), *(part.where for part in self.outputs)}

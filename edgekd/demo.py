"""The demo: handwritten digits, a trained teacher, and a student under half its latency, end to end on the target at hand."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from edgekd.contracts import Target
from edgekd.data import make_split
from edgekd.distill.progress import ProgressBar
from edgekd.errors import MissingDependency
from edgekd.options import Options, QuantizeOptions, SearchOptions, TrainOptions
from edgekd.pipeline import compress
from edgekd.progress import print_event
from edgekd.records import Budget, Record
from edgekd.result import Result
from edgekd.spaces import Family
from edgekd.stages import Event
from edgekd.target import connect
from edgekd.tasks import Classification

if TYPE_CHECKING:
    import torch

TEACHER_MS = 1.0
"""The teacher's least latency in float32, as measured on the target."""

_MARGIN = 1.1
_BLOCKS = (14, 20, 28, 40, 56)
_TEACHER_WIDTH = 64
_PROTOCOL = tuple(f"measure.verdict.launch.{text}" for text in ("warmup_min_s=0.3", "min_samples=64", "min_time_s=0.2", "max_time_s=10.0"))
"""Shorter launches than the profile's, so that the demo ends in minutes; their number and the statistics are the same."""
_TEACHER = TrainOptions(epochs=12, batch_size=64, learning_rate=0.05, loss="none")
_STUDENT = Options(
    train=TrainOptions(epochs=16, batch_size=32, learning_rate=0.05, views=8),
    search=SearchOptions(measurements=8, finalists=2, rung_epochs=3, attempts=2),
    quantize=QuantizeOptions(calibration_size=128, methods=("minmax", "percentile")),
)


class DemoChoice(Record, tag="edgekd.demo/1", frozen=True, kw_only=True):
    """The teacher's depth that was chosen by measuring, kept so that a resumed demo goes on with the same teacher."""

    blocks: int
    latency_ms: float


def digits() -> tuple[tuple[np.ndarray, np.ndarray], ...]:
    """scikit-learn's handwritten digits as train, validation and test: images `(items, 1, 8, 8)` float32 in [0, 1] and labels 0 to 9.

    40 % are the test split, 10 % validation; stratified by class, always the same items.

    Raises:
        MissingDependency: scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise MissingDependency("scikit-learn", "demo", purpose="the demo's data") from error
    raw = load_digits()
    images = (raw.images / 16.0).astype(np.float32)[:, None]
    labels = raw.target.astype(np.int64)
    rest, test_x, rest_y, test_y = train_test_split(images, labels, test_size=0.4, random_state=0, stratify=labels)
    train_x, validation_x, train_y, validation_y = train_test_split(rest, rest_y, test_size=1 / 6, random_state=0, stratify=rest_y)
    return (train_x, train_y), (validation_x, validation_y), (test_x, test_y)


def shift(image: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """The image `(1, 8, 8)` moved by up to one pixel in each direction, zeros moving in."""
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1)))
    down, right = generator.integers(0, 3, size=2)
    return padded[:, down : down + image.shape[1], right : right + image.shape[2]]


def make_net(width: int = 64, blocks: int = 14) -> torch.nn.Module:
    """A small residual network for 8x8 images: a stem and `blocks` residual blocks of two 3x3 convolutions of `width` channels."""
    from edgekd.demo_net import DigitsNet

    return DigitsNet(width, blocks)


def _measured_teacher(target: Target, run_dir: Path, say: Callable[[str], None]) -> int:
    """The smallest depth whose untrained network takes a tenth more than `TEACHER_MS` on the target."""
    from edgekd.contracts import ConvertRequest
    from edgekd.conversion.toolchain import toolchain_of
    from edgekd.measuring.measure import Subject, screen
    from edgekd.records import IOSpec, TensorSpec

    path = run_dir / "demo.json"
    if path.is_file():
        return DemoChoice.load(path).blocks
    example = {"input": np.zeros((8, 1, 8, 8), dtype=np.float32) + np.linspace(0, 1, 8, dtype=np.float32)[:, None, None, None]}
    spec = IOSpec(inputs=(TensorSpec(name="input", dtype="float32", shape=(1, 1, 8, 8)),), outputs=(TensorSpec(name="output", dtype="float32", shape=()),))
    latency_ms = 0.0
    blocks = _BLOCKS[0]
    for blocks in _BLOCKS:
        with tempfile.TemporaryDirectory(prefix="edgekd-demo-") as name:
            request = ConvertRequest(source=make_net(_TEACHER_WIDTH, blocks), folder=Path(name), iospec=spec, example={"input": example["input"][:1]})
            model = toolchain_of(target.capabilities).converter("exporter").convert(request)
            seen = screen(target, [Subject("teacher", model, example)], percentile=50.0, limits=target.profile.measure.limits, seed=0)["teacher"]
        latency_ms = seen.latency_ms if seen.measurement.valid else 0.0
        say(
            f"a teacher of {blocks} blocks takes {seen.latency_ms:.3g} ms in float32"
            + ("" if seen.measurement.valid else f" (not valid: {seen.measurement.reason})")
        )
        if not seen.measurement.valid or latency_ms >= _MARGIN * TEACHER_MS:
            break
    DemoChoice(blocks=blocks, latency_ms=latency_ms).save(path)
    return blocks


def run_demo(
    run_dir: Path | str,
    *,
    seed: int = 0,
    target: str = "local",
    overrides: Sequence[str] = (),
    progress: bool = True,
    accept_simulated: bool = False,
) -> Result:
    """The whole pipeline on the digits: a teacher of at least 1 ms, a student under half its latency at the median, at most 0.03 less accurate.

    Raises:
        MissingDependency: a package of the extras `x86`, `distill` or `demo` is missing.
        DeviceError: the target failed.
    """
    from edgekd.distill.run import distil

    place = Path(run_dir)
    place.mkdir(parents=True, exist_ok=True)

    def say(text: str) -> None:
        if progress:
            print_event(Event("teacher", "note", text))

    train, validation, test = digits()
    task = Classification(labels=[str(digit) for digit in range(10)])
    with connect(target, overrides=(*_PROTOCOL, *overrides)) as live:
        blocks = _measured_teacher(live, place, say)
        say(f"training the teacher: {_TEACHER_WIDTH} channels, {blocks} blocks, {_TEACHER.epochs} epochs")
        trained = distil(
            _seeded(seed, blocks),
            teacher=None,
            train=make_split(train, task, name="train", augment=shift, seed=seed),
            validation=make_split(validation, task, name="validation"),
            task=task,
            options=_TEACHER,
            seed=seed,
            folder=place / "teacher",
            label="teacher",
            callbacks=(ProgressBar(),) if progress else (),
        )
        say(f"the teacher reaches {trained.record.validation:.4f} {task.metric} on validation")
        return compress(
            trained.module,
            task=task,
            train=train,
            validation=validation,
            test=test,
            target=live,
            budget=Budget(latency_share=0.5, percentile=50, max_drop=0.03),
            student=Family(make_net, width=[16, 32, 48, 64], blocks=[1, 2, 4]),
            run_dir=place,
            seed=seed,
            options=_accepting(_STUDENT, accept_simulated),
            augment=shift,
            progress=progress,
        )


def _accepting(options: Options, accept_simulated: bool) -> Options:
    import msgspec

    return msgspec.structs.replace(options, accept_simulated=accept_simulated)


def _seeded(seed: int, blocks: int) -> Any:
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make_net(_TEACHER_WIDTH, blocks)

"""One model file on one target: latency by named clocks, with its conditions; no budget, no verdict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
import numpy as np

from edgekd.artifact import StoredArtifact
from edgekd.contracts import Array, Target
from edgekd.errors import InputError
from edgekd.measuring.latency import launches_for
from edgekd.measuring.launching import new_nonce
from edgekd.measuring.measure import Subject, calibrate_limits, measure_verdict, screen
from edgekd.models.model_file import import_model
from edgekd.models.notes import artifact_notes, shown_notes
from edgekd.npy import load_inputs
from edgekd.records import Capabilities, Clock, IOSpec, Measurement, OpTime, Precision
from edgekd.stats import percentile_of
from edgekd.target import require_support


@dataclass(frozen=True)
class BenchResult:
    """`summary` holds milliseconds: `p50`, `p90`, `p99` of all valid samples, `init` and `first` as medians over launches.

    `note` is what the runtime says of the model, for example which operators its delegate leaves out; `file_notes` is what stands in the file
    beside its graph, as its maker left it (`edgekd.models.notes.shown_notes`).
    """

    measurement: Measurement
    summary: dict[str, float]
    op_times: tuple[OpTime, ...]
    iospec: IOSpec
    capabilities: Capabilities
    precision: Precision
    note: str = ""
    file_notes: dict[str, str] = field(default_factory=dict)


def random_inputs(iospec: IOSpec, *, samples: int, seed: int) -> dict[str, Array]:
    """Seeded inputs of the right shapes, good for timing only: floats standard normal, or even over their value range where it is known; integers 0."""
    generator = np.random.default_rng(seed)
    out: dict[str, Array] = {}
    for spec in iospec.inputs:
        sizes = [1 if isinstance(axis, str) else axis for axis in spec.shape[1:]]
        kind = np.dtype(spec.dtype)
        if kind.kind != "f":
            out[spec.name] = np.zeros((samples, *sizes), dtype=kind)
        elif spec.value_range is None:
            out[spec.name] = generator.standard_normal((samples, *sizes)).astype(kind)
        else:
            out[spec.name] = generator.uniform(*spec.value_range, (samples, *sizes)).astype(kind)
    return out


def step_spec(iospec: IOSpec) -> IOSpec:
    """What has to be given at every step: the model without its state."""
    if not iospec.state:
        return iospec
    fed = iospec.step_inputs
    return msgspec.structs.replace(iospec, inputs=tuple(tensor for tensor in iospec.inputs if tensor.name in fed), state=())


def bench(
    model: Path | str,
    *,
    target: Target,
    percentile: float = 50.0,
    inputs: Path | str | None = None,
    seed: int = 0,
    verdict_grade: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> BenchResult:
    """How long a model takes on a target now, with everything needed to trust the number. `inputs` is a folder of `.npy` arrays.

    `model` is a file, or a folder with `artifact.json`. One with state is measured step by step, its state fed back from zero.

    Raises:
        ModelError, DataError: the file or the inputs cannot be used.
        InputError: the percentile is not between 0 and 100.
        UnsupportedModel: the target cannot run it; the message names the operator.
    """
    import tempfile

    if not 0.0 < percentile < 100.0:
        raise InputError("the percentile is out of range", found=percentile, allowed="above 0 and below 100", hint="use 50 for the median, 90 for p90")
    with tempfile.TemporaryDirectory(prefix="edgekd-bench-") as name:
        artifact = import_model(Path(model), Path(name))
        iospec = artifact.record.iospec
        rotation = target.profile.measure.verdict.launch.rotation
        given = step_spec(iospec)
        samples = random_inputs(given, samples=rotation, seed=seed) if inputs is None else load_inputs(Path(inputs), given)
        support = require_support(target, artifact, str(model))
        subject = Subject(Path(model).stem, artifact, {key: value[:rotation] for key, value in samples.items()})
        nonce = new_nonce()
        limits = calibrate_limits(target, subject, cache_dir=None, seed=seed, nonce=nonce)
        if verdict_grade:
            verdict = measure_verdict(target, [subject], limits=limits, seed=seed, undecided=lambda _: False, progress=progress, nonce=nonce)
            measurement = verdict[subject.label]
        else:
            measurement = screen(target, [subject], percentile=percentile, limits=limits, seed=seed, nonce=nonce)[subject.label].measurement
        op_times = target.runtime.op_times(artifact, subject.inputs) if target.capabilities.op_times else ()
        summary, precision = summarize(measurement, percentile), artifact.record.precision
        return BenchResult(measurement, summary, op_times, iospec, target.capabilities, precision, support.note, _shown(Path(model), artifact))


def _shown(model: Path, artifact: StoredArtifact) -> dict[str, str]:
    """The notes of the caller's own file; the copy that is measured is noted anew."""
    return artifact_notes(artifact) if model.is_dir() else shown_notes(model)


def summarize(measurement: Measurement, percentile: float = 50.0) -> dict[str, float]:
    """Milliseconds by name over the valid launches; empty when there is none."""
    samples = np.array([value for launch in measurement.launches for value in launch.samples_ns], dtype=np.float64) / 1e6
    if not measurement.launches or not samples.size:
        return {}
    wanted = sorted({50.0, 90.0, 99.0, percentile})
    summary = {f"p{q:g}": float(percentile_of(samples, q)) for q in wanted}
    if begun_calm := launches_for(measurement, Clock.INIT):
        summary["init"] = float(np.median([launch.init_ns for launch in begun_calm])) / 1e6
        summary["first"] = float(np.median([launch.first_ns for launch in begun_calm])) / 1e6
    return summary

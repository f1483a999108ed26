"""The best int8 form of a float artifact on one target: schemes by latency, methods by accuracy, fragile operators back in float."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.artifact import StoredArtifact
from edgekd.contracts import CalibrationSet, Converter, Target, Task, Tensors
from edgekd.conversion.toolchain import toolchain_of
from edgekd.errors import ConversionRejected, UnsupportedModel
from edgekd.options import QuantizeOptions
from edgekd.quantize.recipes import candidate_schemes
from edgekd.quantize.sensitivity import TimeMs, measure_sensitivity
from edgekd.quantize.workshop import Made, Workshop
from edgekd.records import QuantRecipe


@dataclass(frozen=True)
class Tried:
    """One thing that was tried. `accuracy` is the task's mean score on validation from the target's outputs, `drop` what it lost;
    `latency_ms` is screen grade, and stands only where it was measured for this row."""

    scheme: str
    method: str
    float_ops: tuple[str, ...]
    accuracy: float | None
    drop: float | None
    latency_ms: float | None
    reason: str


@dataclass(frozen=True)
class QuantizeResult:
    """The artifact that loses least, whether or not it is within the allowance or faster than float: that is the caller's to judge.

    `scores` are per validation item. `float_ms` and `latency_ms` were screened side by side.
    """

    artifact: StoredArtifact
    recipe: QuantRecipe
    scores: NDArray[np.float64]
    tried: tuple[Tried, ...]
    notes: tuple[str, ...]
    float_ms: float
    latency_ms: float


def quantize(
    source: StoredArtifact,
    *,
    target: Target,
    calibration: CalibrationSet,
    validation_inputs: Tensors,
    validation_targets: Any,
    task: Task,
    reference_scores: NDArray[np.float64],
    options: QuantizeOptions,
    allowed_drop: float,
    time_ms: TimeMs,
    folder: Path,
    seed: int,
    converter: Converter | None = None,
    prepare: Converter | None = None,
) -> QuantizeResult:
    """The source in int8, judged by the target's outputs on the validation inputs against `reference_scores` (one per item).

    Every scheme of the target is timed once, next to the source, since a calibration method does not change speed. From the fastest scheme
    on, calibration methods are compared on accuracy; the first scheme that stays within `allowed_drop` is taken. Schemes that are not
    faster than the source come only after those that are, and not at all if one is. If none is within the allowance, operators of the
    fastest return to float in the order of gain per millisecond (`sensitivity`) until it is, at most `options.max_float_ops`; those
    that prove superfluous go back to int8.

    Raises:
        UnsupportedModel: the target has no int8 scheme, or cannot give the tensors inside a model.
        ConversionRejected: the model cannot be quantized.
        DataError: calibration or activations are not finite.
    """
    schemes = candidate_schemes(target.capabilities)
    if not options.methods:
        raise ConversionRejected("no calibration method was asked for", allowed="minmax, percentile, entropy", hint="set quantize.methods")
    if not target.capabilities.taps:
        raise UnsupportedModel(
            "int8 needs the ranges of the tensors inside the model, which this runtime does not give", hint="calibrate on another target", subject=target.name
        )
    toolchain = toolchain_of(target.capabilities)
    workshop = Workshop(
        source,
        prepare=prepare or toolchain.converter("prepare"),
        converter=converter or toolchain.converter("quantizer"),
        infer=target.runtime.infer,
        calibration=calibration,
        options=options,
        folder=folder,
    )
    run = _Run(workshop, validation_inputs, validation_targets, task, reference_scores, options, allowed_drop, time_ms, seed)
    return run.result(source, schemes)


class _Run:
    """The state of one `quantize` call: what was tried, and the notes."""

    def __init__(
        self,
        workshop: Workshop,
        inputs: Tensors,
        targets: Any,
        task: Task,
        reference_scores: NDArray[np.float64],
        options: QuantizeOptions,
        allowed_drop: float,
        time_ms: TimeMs,
        seed: int,
    ) -> None:
        self.workshop, self.inputs, self.targets, self.task = workshop, inputs, targets, task
        self.reference = float(np.mean(reference_scores))
        self.options, self.allowed_drop, self.time_ms, self.seed = options, allowed_drop, time_ms, seed
        self.tried: list[Tried] = []
        self.notes: list[str] = []
        self._scores: dict[str, NDArray[np.float64]] = {}
        metadata = workshop.prepared.record.metadata
        if metadata.get("prepared") not in (None, "symbolic"):
            self.notes.append(f"pre-processing before quantization: {metadata['prepared']} ({metadata.get('prepared_reason', '')})")

    def scores(self, made: Made) -> NDArray[np.float64]:
        key = made.recipe.digest()
        if key not in self._scores:
            self._scores[key] = self.workshop.scores(made, self.inputs, self.targets, self.task)
        return self._scores[key]

    def drop(self, made: Made) -> float:
        return self.reference - float(self.scores(made).mean())

    def note_try(self, made: Made, latency_ms: float | None, reason: str) -> None:
        recipe = made.recipe
        accuracy, drop = float(self.scores(made).mean()), self.drop(made)
        self.tried.append(Tried(recipe.scheme, recipe.calibration.method, recipe.float_ops, accuracy, drop, latency_ms, reason))

    def result(self, source: StoredArtifact, schemes: Sequence[str]) -> QuantizeResult:
        first_method = self.options.methods[0]
        plain = self.plain(schemes, first_method)
        times = self.time_ms({"float": source} | {scheme: made.artifact for scheme, made in plain.items()})
        float_ms = times["float"]
        order = sorted(plain, key=lambda scheme: times[scheme])
        faster = [scheme for scheme in order if times[scheme] < float_ms]
        for scheme in order:
            if scheme not in (faster or order[:1]):
                reason = f"not taken: {times[scheme]:.4g} ms is not faster than float ({float_ms:.4g} ms)"
                self.tried.append(Tried(scheme, first_method, (), None, None, times[scheme], reason))
        if not faster:
            self.notes.append(f"no int8 scheme is faster than float ({float_ms:.4g} ms) in the screen; the fastest takes {times[order[0]]:.4g} ms")
        best: dict[str, Made] = {}
        chosen, latency_ms = None, times[order[0]]
        for scheme in faster or order[:1]:
            best[scheme] = self.best_method(scheme, times[scheme])
            if self.drop(best[scheme]) <= self.allowed_drop:
                chosen, latency_ms = best[scheme], times[scheme]
                break
        if chosen is None:
            chosen = best[order[0]]
            if faster:
                chosen, float_ms, latency_ms = self.restore(source, chosen, float_ms, latency_ms)
        return QuantizeResult(chosen.artifact, chosen.recipe, self.scores(chosen), tuple(self.tried), tuple(self.notes), float_ms, latency_ms)

    def plain(self, schemes: Sequence[str], method: str) -> dict[str, Made]:
        """The model in every scheme that the quantizer takes it in; the first refusal is raised where there is none."""
        made: dict[str, Made] = {}
        refused: list[ConversionRejected] = []
        for scheme in schemes:
            try:
                made[scheme] = self.workshop.make(scheme, method)
            except ConversionRejected as error:
                refused.append(error)
                self.notes.append(f"scheme {scheme} is refused: {error}")
        if not made:
            raise refused[0]
        return made

    def best_method(self, scheme: str, latency_ms: float) -> Made:
        """The calibration method with the highest accuracy; the earlier one in the options where two are equal."""
        made = {method: self.workshop.make(scheme, method) for method in self.options.methods}
        for method, one in made.items():
            self.note_try(one, latency_ms if method == self.options.methods[0] else None, f"drop {self.drop(one):.4g}, allowed {self.allowed_drop:.4g}")
        return max(made.values(), key=lambda one: float(self.scores(one).mean()))

    def restore(self, source: StoredArtifact, start: Made, float_ms: float, latency_ms: float) -> tuple[Made, float, float]:
        """The start with as few operators in float as bring the drop within the allowance, and the latencies of source and result from one screen."""
        scheme, method = start.recipe.scheme, start.recipe.calibration.method
        total = len(next(iter(self.inputs.values())))
        picks = np.sort(np.random.default_rng(self.seed).choice(total, size=min(total, self.options.sensitivity_samples), replace=False))
        probe = {name: array[picks] for name, array in self.inputs.items()}
        kept: list[str] = []
        while self.drop(self.workshop.make(scheme, method, kept)) > self.allowed_drop and len(kept) < self.options.max_float_ops:
            ranked = measure_sensitivity(self.workshop, scheme, method, probe, kept=kept, time_ms=self.time_ms)
            if not ranked:
                self.notes.append("no further operator lowers the output error when it returns to float")
                break
            for item in ranked:
                cost = item.cost_ms or 0.0
                self.notes.append(f"{item.op.name} in float: output error {item.base_error:.3g} falls by {item.gain:.3g} for {cost:.4g} ms more")
            kept.append(ranked[0].op.name)
            made = self.workshop.make(scheme, method, kept)
            self.note_try(made, None, f"{kept[-1]} back in float: drop {self.drop(made):.4g}, allowed {self.allowed_drop:.4g}")
        if not kept:
            return start, float_ms, latency_ms
        if self.drop(self.workshop.make(scheme, method, kept)) <= self.allowed_drop:
            kept = self.thinned(scheme, method, kept)
        made = self.workshop.make(scheme, method, kept)
        if self.scores(made).mean() < self.scores(start).mean():
            self.notes.append("operators in float did not raise the accuracy: all stay int8")
            return start, float_ms, latency_ms
        times = self.time_ms({"float": source, "mixed": made.artifact})
        self.note_try(made, times["mixed"], f"in float: {', '.join(made.recipe.float_ops)}")
        return made, times["float"], times["mixed"]

    def thinned(self, scheme: str, method: str, kept: Sequence[str]) -> list[str]:
        """`kept` without those that are not needed to stay within the allowance; the last one added is."""
        needed = list(kept)
        for name in kept[:-1]:
            fewer = [other for other in needed if other != name]
            if self.drop(self.workshop.make(scheme, method, fewer)) <= self.allowed_drop:
                needed = fewer
                self.notes.append(f"{name} proved superfluous in float and stays int8")
        return needed

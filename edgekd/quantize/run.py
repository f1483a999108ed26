"""The best int8 form of a float artifact on one target: schemes by latency, methods by accuracy, fragile operators back in float."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.artifact import StoredArtifact
from edgekd.contracts import CalibrationSet, Converter, Target, Task, Tensors
from edgekd.conversion.toolchain import toolchain_of
from edgekd.errors import ConversionRejected, Rejected, UnsupportedModel
from edgekd.options import QuantizeOptions
from edgekd.quantize.calibrate import METHODS, Stability
from edgekd.quantize.proposals import Proposal, int8_proposals, proposed_text
from edgekd.quantize.sensitivity import TimeMs, measure_sensitivity
from edgekd.quantize.structure import structure_of
from edgekd.quantize.workshop import Made, Workshop
from edgekd.records import QuantRecipe
from edgekd.target import require_support


@dataclass(frozen=True)
class Tried:
    """One thing that was tried; `scheme` is the label of its proposal.

    `accuracy` is the task's mean score on validation from the target's outputs, `drop` what it lost;
    `latency_ms` is screen grade, and stands only where it was measured for this row. `refused`: the quantizer or the target does not take it."""

    scheme: str
    method: str
    float_ops: tuple[str, ...]
    accuracy: float | None
    drop: float | None
    latency_ms: float | None
    reason: str
    refused: bool = False


@dataclass(frozen=True)
class QuantizeResult:
    """The artifact that loses least, whether or not it is within the allowance or faster than float: that is the caller's to judge.

    `scores` are per validation item. `float_ms` and `latency_ms` were screened side by side. `stability` is that of the artifact's own ranges,
    `proposed` the label of what the table proposed first.
    """

    artifact: StoredArtifact
    recipe: QuantRecipe
    scores: NDArray[np.float64]
    tried: tuple[Tried, ...]
    notes: tuple[str, ...]
    float_ms: float
    latency_ms: float
    stability: Stability | None = None
    proposed: str = ""


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

    Every scheme of the target, and every mixture that `proposals` has for such a network, is timed once, next to the source, since a
    calibration method does not change speed. One that the quantizer refuses, or whose file the target does not run, is left out with the
    reason. Proposals say what is made first; the latencies decide what is tried first. From the fastest scheme
    on, calibration methods are compared on accuracy; the first scheme that stays within `allowed_drop` is taken. Schemes that are not
    faster than the source come only after those that are, and not at all if one is. If none is within the allowance, operators of the
    fastest return to float in the order of gain per millisecond (`sensitivity`) until it is, at most `options.max_float_ops`; those
    that prove superfluous go back to int8.

    Raises:
        UnsupportedModel: the target has no int8 scheme, runs none of these files, or cannot give the tensors inside a model.
        ConversionRejected: the model cannot be quantized.
        DataError: calibration or activations are not finite.
    """
    structure = structure_of(source)
    proposals = int8_proposals(source, target.capabilities, structure)
    if not options.methods:
        raise ConversionRejected("no calibration method was asked for", allowed=", ".join(METHODS), hint="set quantize.methods")
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
    run = _Run(target, workshop, validation_inputs, validation_targets, task, reference_scores, options, allowed_drop, time_ms, seed)
    run.notes.append(proposed_text(structure, proposals))
    return run.result(source, proposals)


class _Run:
    """The state of one `quantize` call: what was tried, and the notes."""

    def __init__(
        self,
        target: Target,
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
        self.target = target
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
        label = _label(recipe)
        self.tried.append(Tried(label, recipe.calibration.method, recipe.float_ops, accuracy, drop, latency_ms, reason))

    def result(self, source: StoredArtifact, proposals: Sequence[Proposal]) -> QuantizeResult:
        first_method = self.options.methods[0]
        plain = self.plain(proposals, first_method)
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
            best[scheme] = self.best_method(plain[scheme].recipe, times[scheme])
            if self.drop(best[scheme]) <= self.allowed_drop:
                chosen, latency_ms = best[scheme], times[scheme]
                break
        if chosen is None:
            chosen = best[order[0]]
            if faster:
                chosen, float_ms, latency_ms = self.restore(source, chosen, float_ms, latency_ms)
        first, taken = proposals[0].label, _label(chosen.recipe)
        agrees = "as proposed first" if taken == first else f"proposed first was {first}" + (f", {times[first]:.4g} ms" if first in times else "")
        self.notes.append(f"measured: {taken} is taken, {latency_ms:.4g} ms against {float_ms:.4g} ms in float; {agrees}")
        stability = self.workshop.stability(chosen.recipe)
        return QuantizeResult(chosen.artifact, chosen.recipe, self.scores(chosen), tuple(self.tried), tuple(self.notes), float_ms, latency_ms, stability, first)

    def plain(self, proposals: Sequence[Proposal], method: str) -> dict[str, Made]:
        """The model by every proposal that the quantizer takes it in and the target runs; the first refusal is raised where there is none."""
        made: dict[str, Made] = {}
        refused: list[Rejected] = []
        for proposal in proposals:
            try:
                one = self.workshop.make(proposal.scheme, method, op_rules=dict(proposal.op_rules))
                require_support(self.target, one.artifact, proposal.label)
            except (ConversionRejected, UnsupportedModel) as error:
                refused.append(error)
                self.tried.append(Tried(proposal.label, method, (), None, None, None, str(error), refused=True))
            else:
                made[proposal.label] = one
        if not made:
            raise refused[0]
        return made

    def best_method(self, recipe: QuantRecipe, latency_ms: float) -> Made:
        """The calibration method with the highest accuracy; the earlier one in the options where two are equal."""
        made = {method: self.workshop.make(recipe.scheme, method, op_rules=recipe.op_rules) for method in self.options.methods}
        for method, one in made.items():
            self.note_try(one, latency_ms if method == self.options.methods[0] else None, f"drop {self.drop(one):.4g}, allowed {self.allowed_drop:.4g}")
        return max(made.values(), key=lambda one: float(self.scores(one).mean()))

    def restore(self, source: StoredArtifact, start: Made, float_ms: float, latency_ms: float) -> tuple[Made, float, float]:
        """The start with as few operators in float as bring the drop within the allowance, and the latencies of source and result from one screen."""
        scheme, method, rules = start.recipe.scheme, start.recipe.calibration.method, start.recipe.op_rules
        total = len(next(iter(self.inputs.values())))
        picks = np.sort(np.random.default_rng(self.seed).choice(total, size=min(total, self.options.sensitivity_samples), replace=False))
        probe = {name: array[picks] for name, array in self.inputs.items()}
        kept: list[str] = []
        while self.drop(self.workshop.make(scheme, method, kept, rules)) > self.allowed_drop and len(kept) < self.options.max_float_ops:
            ranked = measure_sensitivity(self.workshop, scheme, method, probe, kept=kept, time_ms=self.time_ms, op_rules=rules)
            if not ranked:
                self.notes.append("no further operator lowers the output error when it returns to float")
                break
            for item in ranked:
                cost = item.cost_ms or 0.0
                self.notes.append(f"{item.op.name} in float: output error {item.base_error:.3g} falls by {item.gain:.3g} for {cost:.4g} ms more")
            kept.append(ranked[0].op.name)
            made = self.workshop.make(scheme, method, kept, rules)
            self.note_try(made, None, f"{kept[-1]} back in float: drop {self.drop(made):.4g}, allowed {self.allowed_drop:.4g}")
        if not kept:
            return start, float_ms, latency_ms
        if self.drop(self.workshop.make(scheme, method, kept, rules)) <= self.allowed_drop:
            kept = self.thinned(scheme, method, kept, rules)
        made = self.workshop.make(scheme, method, kept, rules)
        if self.scores(made).mean() < self.scores(start).mean():
            self.notes.append("operators in float did not raise the accuracy: all stay int8")
            return start, float_ms, latency_ms
        times = self.time_ms({"float": source, "mixed": made.artifact})
        self.note_try(made, times["mixed"], f"in float: {', '.join(made.recipe.float_ops)}")
        return made, times["float"], times["mixed"]

    def thinned(self, scheme: str, method: str, kept: Sequence[str], rules: Mapping[str, str]) -> list[str]:
        """`kept` without those that are not needed to stay within the allowance; the last one added is."""
        needed = list(kept)
        for name in kept[:-1]:
            fewer = [other for other in needed if other != name]
            if self.drop(self.workshop.make(scheme, method, fewer, rules)) <= self.allowed_drop:
                needed = fewer
                self.notes.append(f"{name} proved superfluous in float and stays int8")
        return needed


def _label(recipe: QuantRecipe) -> str:
    """The label of the proposal that a recipe was made from."""
    return Proposal(recipe.scheme, "", "", tuple(sorted(recipe.op_rules.items()))).label

"""Which operators int8 hurts most, and which of them are worth their time in float."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgekd.artifact import StoredArtifact
from edgekd.contracts import Tensors
from edgekd.errors import ConversionRejected
from edgekd.quantize.workshop import Made, Op, Workshop

TimeMs = Callable[[dict[str, StoredArtifact]], Mapping[str, float]]
"""Latencies in milliseconds by label, measured side by side on the target."""

_MAX_PROBED = 24
_TIMED = 8
_GAIN_FLOOR = 0.02
_COST_FLOOR = 0.01


@dataclass(frozen=True)
class Sensitivity:
    """What one operator in float again is worth.

    `gain` is the fall of the output error (mean squared error over the float output's variance, mean over outputs) against `base_error`;
    `cost_ms` the added latency on the target, `None` if it was not timed.
    """

    op: Op
    gain: float
    base_error: float
    cost_ms: float | None

    def worth(self, base_ms: float) -> float:
        """Gain per millisecond; a cost below 1 % of the int8 latency counts as 1 %, since it cannot be told from noise."""
        return self.gain / max(self.cost_ms or 0.0, _COST_FLOOR * base_ms)


def output_error(reference: Tensors, outputs: Tensors) -> float:
    """Mean squared error over the reference's variance, mean over the outputs; NaN and Inf count as infinite error."""
    errors = []
    for name, expected in reference.items():
        left, right = np.asarray(expected, dtype=np.float64), np.asarray(outputs[name], dtype=np.float64)
        if not np.isfinite(right).all():
            return float("inf")
        errors.append(float(np.mean((right - left) ** 2)) / max(float(np.var(left)), 1e-12))
    return float(np.mean(errors))


def suspects(
    workshop: Workshop, scheme: str, method: str, inputs: Tensors, *, limit: int = _MAX_PROBED, op_rules: Mapping[str, str] | None = None
) -> tuple[Op, ...]:
    """The operators to probe one by one: all of them, or with more than `limit` those of the blocks that help most.

    Then the operators are cut into blocks of neighbours, each block is put back in float, and the best blocks are kept, up to half the limit.
    """
    ops = workshop.ops
    if len(ops) <= limit:
        return ops
    width = -(-len(ops) // (limit // 2))
    blocks = [ops[start : start + width] for start in range(0, len(ops), width)]
    reference = workshop.outputs(workshop.prepared, inputs)
    ranked = []
    for block in blocks:
        error = _error(workshop, scheme, method, [op.name for op in block], inputs, reference, op_rules)
        if error is not None:
            ranked.append((error, block))
    ranked.sort(key=lambda pair: pair[0])
    chosen: list[Op] = []
    for _, block in ranked:
        if len(chosen) + len(block) > max(limit // 2, width):
            break
        chosen.extend(block)
    return tuple(chosen)


def _error(
    workshop: Workshop, scheme: str, method: str, float_ops: Sequence[str], inputs: Tensors, reference: Tensors, op_rules: Mapping[str, str] | None
) -> float | None:
    """The output error with these operators in float; `None` where the quantizer refuses this combination."""
    try:
        made = workshop.make(scheme, method, float_ops, op_rules)
    except ConversionRejected:
        return None
    return output_error(reference, workshop.outputs(made.artifact, inputs))


def measure_sensitivity(
    workshop: Workshop,
    scheme: str,
    method: str,
    inputs: Tensors,
    *,
    kept: Sequence[str],
    time_ms: TimeMs,
    op_rules: Mapping[str, str] | None = None,
) -> tuple[Sensitivity, ...]:
    """Operators whose return to float, beyond those in `kept`, lowers the output error noticeably, the worthiest first.

    Leave-one-float: everything else stays int8. A gain below 2 % of the present error is no gain. The eight largest gains are timed on
    the target side by side; the order is gain per added millisecond, then the graph's order.
    """
    reference = workshop.outputs(workshop.prepared, inputs)
    base: Made = workshop.make(scheme, method, kept, op_rules)
    base_error = output_error(reference, workshop.outputs(base.artifact, inputs))
    gains: list[tuple[float, int, Op]] = []
    for position, op in enumerate(suspects(workshop, scheme, method, inputs, op_rules=op_rules)):
        if op.name in kept:
            continue
        error = _error(workshop, scheme, method, [*kept, op.name], inputs, reference, op_rules)
        if error is not None and base_error - error > _GAIN_FLOOR * base_error:
            gains.append((base_error - error, position, op))
    gains.sort(key=lambda item: (-item[0], item[1]))
    gains = gains[:_TIMED]
    if not gains:
        return ()
    models = {"int8": base.artifact} | {op.name: workshop.make(scheme, method, [*kept, op.name], op_rules).artifact for _, _, op in gains}
    times = time_ms(models)
    base_ms = times["int8"]
    found = [Sensitivity(op, gain, base_error, max(0.0, times[op.name] - base_ms)) for gain, _, op in gains]
    return tuple(sorted(found, key=lambda item: -item.worth(base_ms)))

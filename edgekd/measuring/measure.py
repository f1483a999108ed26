"""Measuring on a target in two grades: `screen` serves the search and may be cached, `measure_verdict` decides and never is."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from edgekd.contracts import Target
from edgekd.measuring.aa import aa_run, calibrate_limits
from edgekd.measuring.launching import Bench, Progress, Subject, by_label
from edgekd.measuring.screening import Screened, rank, screen
from edgekd.measuring.validity import causes
from edgekd.records import Grade, Limits, Measurement, MeasurePlan

__all__ = ["Progress", "Screened", "Subject", "aa_run", "calibrate_limits", "measure_verdict", "rank", "screen"]

_SINGLE_BLOCK = 4


def allowed_rejects(plan: MeasurePlan, launches: int) -> int:
    """How many rejected launches beside `launches` valid ones stay within `plan.max_reject_share`: 5 beside 20 at 20 %."""
    if plan.max_reject_share >= 1.0:
        return 10 * launches
    return math.floor(plan.max_reject_share / (1.0 - plan.max_reject_share) * launches + 1e-9)


def block(lacking: Mapping[str, int], rng: np.random.Generator) -> tuple[str, ...]:
    """The next block of a verdict for labels that lack so many launches: ABBA or BAAB for two, else each once in random order."""
    labels = list(lacking)
    if len(labels) == 1:
        return tuple(labels * min(_SINGLE_BLOCK, lacking[labels[0]]))
    order = [labels[index] for index in rng.permutation(len(labels))]
    if len(order) == 2 and min(lacking.values()) >= 2:
        return (order[0], order[1], order[1], order[0])
    return tuple(order)


def measure_verdict(
    target: Target,
    subjects: Sequence[Subject],
    *,
    limits: Limits,
    seed: int,
    undecided: Callable[[Mapping[str, Measurement]], bool],
    progress: Progress | None = None,
    nonce: str = "",
) -> dict[str, Measurement]:
    """Verdict-grade measurements of all subjects by label, taken now under the profile's `measure.verdict` plan; never cached.

    Blocks interleave the subjects (`block`), one job on the device per block, until each has `plan.launches` valid launches; a rejected launch is
    repeated. A subject whose rejects exceed `plan.max_reject_share` is invalid, with the causes counted, and gets no more launches.
    Then `undecided` sees all measurements; while it says True, every valid subject gets `plan.step` more, up to `plan.max_launches`.

    A job on the device that a killed process left is taken over if the `nonce` is equal too: `new_nonce()` measures anew.

    Raises:
        InputError: no subject, or two with one label.
        DeviceError: the device or the way to it failed.
    """
    plan = target.profile.measure.verdict
    bench = Bench(target, by_label(subjects), plan.launch, limits, seed, nonce)
    rng = np.random.default_rng([seed, 0xBA])
    reasons: dict[str, str] = {}
    goal = plan.launches
    while True:
        while lacking := {label: goal - len(bench.valid[label]) for label in bench.subjects if label not in reasons and len(bench.valid[label]) < goal}:
            bench.run(block(lacking, rng))
            for label in lacking:
                rejected = bench.rejected[label]
                if len(rejected) > allowed_rejects(plan, goal):
                    share = f"more than {plan.max_reject_share:.0%} of {goal} valid launches and their repeats"
                    reasons[label] = f"{len(rejected)} of {bench.taken(label)} launches rejected, {share}: {causes(rejected)}"
            if progress is not None:
                progress("verdict", sum(min(goal, len(one)) for one in bench.valid.values()), goal * len(bench.subjects))
        measurements = {label: bench.measurement(label, Grade.VERDICT, reasons.get(label, "")) for label in bench.subjects}
        if goal >= plan.max_launches or len(reasons) == len(bench.subjects) or not undecided(measurements):
            return measurements
        goal = min(goal + plan.step, plan.max_launches)

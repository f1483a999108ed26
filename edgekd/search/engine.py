"""The search: measure a few, predict the rest, measure what could be better, until nothing could be."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist
from typing import TypeAlias

import numpy as np

from edgekd.errors import BudgetError, ConfigError
from edgekd.options import SearchOptions
from edgekd.records import Point
from edgekd.search.certificate import Infeasible
from edgekd.search.model import Candidate, Seen, merge, standard_error
from edgekd.search.outcome import RoundRow, SearchOutcome
from edgekd.search.predictor import LatencyPredictor

MeasureBatch: TypeAlias = Callable[[Sequence[Candidate]], Mapping[str, Seen]]
"""Measures candidates together (interleaved), at the deployed precision: label -> what was seen, for each of them. A label that
was measured before is asked again when its interval is doubtful: the answer should be a new measurement, not a cached one."""

_BATCH = 5
_PROBES = 8
_REPEATS = 3
_INVALID = 2
_UNLIKELY = 0.01
_SUSPECT_ERROR = 0.3


def search(
    candidates: Sequence[Candidate],
    *,
    measure: MeasureBatch,
    limit_ms: float,
    options: SearchOptions,
    seed: int,
    quality: Callable[[Candidate], float] | None = None,
    progress: Callable[[str], None] | None = None,
) -> SearchOutcome:
    """The candidates that meet `limit_ms` as screened, the most promising first; deterministic by `seed` and by what is measured.

    Round 0 measures the smallest, the smallest aligned and eight seeded others; if the fastest of them is surely above the
    limit, it is measured again beside the three predicted to be fastest before the limit is called infeasible. Later rounds
    take the candidates with the highest expected gain in quality times the probability to meet the limit (constrained
    expected improvement, Gardner et al., ICML 2014), one near the boundary, and repeats of doubtful ones. It stops when
    `options.measurements` are spent, or when every candidate better than the best `options.finalists` feasible ones is
    measured or predicted to miss the limit with 99 %. `quality` (default: the capacity) is the higher the better.
    `progress` gets one line per round.

    Raises:
        ConfigError: no candidates, two with one label, different features, or `measure` left one out.
        BudgetError: the limit is not a positive number.
    """
    if not (math.isfinite(limit_ms) and limit_ms > 0):
        raise BudgetError("the latency limit of a search must be a positive number of milliseconds", found=limit_ms)
    if not candidates:
        raise ConfigError("there is nothing to search: no candidates", hint="widen the choices of the space")
    labels = [candidate.label for candidate in candidates]
    if len(set(labels)) != len(labels):
        twice = next(label for label in labels if labels.count(label) > 1)
        raise ConfigError("two candidates have the same label", found=twice, hint="remove the repeated choice", subject=twice)
    names = set(candidates[0].features)
    if any(set(candidate.features) != names for candidate in candidates):
        raise ConfigError("all candidates of a search need the same features", hint="make them together with choice_features")
    return _Search(candidates, measure, limit_ms, options, seed, quality, progress).run()


class _Search:
    """The state of one search; positions refer to `candidates`."""

    def __init__(
        self,
        candidates: Sequence[Candidate],
        measure: MeasureBatch,
        limit_ms: float,
        options: SearchOptions,
        seed: int,
        quality: Callable[[Candidate], float] | None,
        progress: Callable[[str], None] | None,
    ) -> None:
        self.candidates, self.measure, self.limit, self.options, self.progress = candidates, measure, limit_ms, options, progress
        self.threshold = limit_ms * (1.0 - options.headroom)
        self.random = random.Random(seed)
        values = [quality(candidate) if quality else candidate.capacity for candidate in candidates]
        order = {value: place for place, value in enumerate(sorted(set(values)))}
        self.quality = np.array([order[value] for value in values], dtype=np.float64) / max(1, len(order) - 1)
        names = sorted(candidates[0].features)
        self.predictor = LatencyPredictor(np.array([[candidate.features[name] for name in names] for candidate in candidates], dtype=np.float64))
        self.seen: dict[int, list[Seen]] = {}
        self.estimate: dict[int, Seen] = {}
        self.invalid: dict[int, int] = {}
        self.suspect: set[int] = set()
        self.rejected: dict[int, str] = {}
        self.proposed: set[int] = set()
        self.spent = 0
        self.rounds: list[RoundRow] = []

    # ------------------------------------------------------------------------------------------ what is known

    def feasible(self, position: int) -> bool:
        known = self.estimate.get(position)
        return known is not None and known.latency_ms <= self.threshold and known.upper_ms <= self.limit

    def ranking(self) -> list[int]:
        good = [position for position in self.estimate if self.feasible(position)]
        return sorted(good, key=lambda position: (-self.quality[position], self.estimate[position].latency_ms, position))

    def incumbent(self) -> float:
        """The quality that a candidate must exceed to matter: that of the last finalist, -1 while there are too few."""
        ranked = self.ranking()
        return float(self.quality[ranked[self.options.finalists - 1]]) if len(ranked) >= self.options.finalists else -1.0

    def doubtful(self, position: int) -> bool:
        known = self.estimate[position]
        if self.feasible(position) or len(self.seen[position]) >= _REPEATS:
            return False
        return known.lower_ms <= self.threshold or position in self.suspect

    def fastest(self) -> int | None:
        return min(self.estimate, key=lambda position: (self.estimate[position].latency_ms, position), default=None)

    def open(self) -> list[int]:
        """Positions without a valid measurement that may still get one."""
        return [p for p in range(len(self.candidates)) if p not in self.estimate and p not in self.rejected]

    # ------------------------------------------------------------------------------------------ measuring

    def take(self, chosen: Mapping[int, str]) -> None:
        """Measure the chosen positions as one batch and note what came back."""
        batch = list(chosen)[: self.options.measurements - self.spent]
        forecast = self.predictor.predict() if len(self.estimate) >= 4 else None
        answers = self.measure([self.candidates[position] for position in batch])
        self.spent += len(batch)
        fresh: list[int] = []
        for position in batch:
            label = self.candidates[position].label
            if label not in answers:
                raise ConfigError("the measuring function left out a candidate", found=label, hint="answer every candidate, with valid=False if need be")
            seen = answers[label]
            self.proposed.add(position)
            if seen.rejected:
                self.rejected[position] = seen.rejected
                self.estimate.pop(position, None)
            elif not seen.valid:
                self.invalid[position] = self.invalid.get(position, 0) + 1
                if self.invalid[position] >= _INVALID and position not in self.estimate:
                    self.rejected[position] = f"no valid measurement in {_INVALID} attempts: the device was disturbed"
            else:
                if position not in self.estimate:
                    fresh.append(position)
                else:
                    self.suspect.discard(position)
                self.seen.setdefault(position, []).append(seen)
                self.estimate[position] = merge(self.seen[position])
        disturbed = self.looks_disturbed(fresh, forecast)
        if disturbed:
            self.suspect.update(fresh)
        self.learn()
        ranked = self.ranking()
        best = ranked[0] if ranked else None
        row = RoundRow(
            measured={self.candidates[position].label: chosen[position] for position in batch},
            feasible=len(ranked),
            best=self.candidates[best].label if best is not None else "",
            best_latency_ms=self.estimate[best].latency_ms if best is not None else None,
            disturbed=disturbed,
        )
        self.rounds.append(row)
        if self.progress is not None:
            found = f"best {row.best} with {row.best_latency_ms:.4g} ms" if row.best else "none feasible so far"
            self.progress(
                f"search round {len(self.rounds)}: {len(self.proposed)} proposed, {len(self.estimate)} measured, {len(self.rejected)} rejected, "
                f"{len(ranked)} feasible under {self.limit:.4g} ms; {found}{'; the round looks disturbed' if disturbed else ''}"
            )

    def looks_disturbed(self, fresh: Sequence[int], forecast: tuple[np.ndarray, np.ndarray] | None) -> bool:
        """Whether all new candidates came out slower than predicted, by 10 % and two standard deviations in the median."""
        if forecast is None or len(fresh) < 3:
            return False
        gaps = np.array([math.log(self.estimate[position].latency_ms) - forecast[0][position] for position in fresh])
        spread = np.array([forecast[1][position] for position in fresh])
        return bool(gaps.min() > 0 and np.median(gaps) > 0.1 and np.median(gaps / spread) > 2.0)

    def learn(self) -> None:
        if not self.estimate:
            return
        rows = sorted(self.estimate)
        errors = [math.hypot(standard_error(self.estimate[row]), _SUSPECT_ERROR if row in self.suspect else 0.0) for row in rows]
        self.predictor.fit(rows, [self.estimate[row].latency_ms for row in rows], errors)

    # ------------------------------------------------------------------------------------------ choosing

    def probes(self) -> dict[int, str]:
        by_size = sorted(range(len(self.candidates)), key=lambda p: (self.candidates[p].capacity, p))
        chosen = [by_size[0]]
        for step in (16, 8):
            aligned = [p for p in by_size if _aligned(self.candidates[p], step)]
            chosen += aligned[:1]
        rest = [p for p in by_size if p not in chosen]
        chosen += self.random.sample(rest, min(_PROBES, len(rest)))
        return dict.fromkeys(chosen, "probe")

    def improving(self) -> dict[int, str]:
        """The next batch, empty when nothing that could matter is left."""
        mean, deviation = self.predictor.predict()
        line = math.log(self.threshold)
        normal = NormalDist()
        incumbent = self.incumbent()
        meets = {p: normal.cdf((line - float(mean[p])) / float(deviation[p])) for p in self.open()}
        matter = [p for p in meets if self.quality[p] > incumbent and meets[p] >= _UNLIKELY]
        repeats = sorted((p for p in self.estimate if self.quality[p] > incumbent and self.doubtful(p)), key=lambda p: (-self.quality[p], p))
        jitter = {p: 1e-9 * self.random.random() for p in matter}
        ranked = sorted(matter, key=lambda p: -(meets[p] * (self.quality[p] - incumbent) + jitter[p]))
        chosen: dict[int, str] = dict.fromkeys(repeats[:2], "repeat")
        for position in ranked[: _BATCH - 1 - len(chosen)]:
            chosen[position] = "improve"
        near = sorted((p for p in matter if p not in chosen), key=lambda p: (abs(meets[p] - 0.5), p))
        for position in near[: _BATCH - len(chosen)]:
            chosen[position] = "boundary"
        return chosen

    def confirmation(self, fastest: int) -> dict[int, str]:
        mean, _ = self.predictor.predict()
        others = sorted(self.open(), key=lambda p: (float(mean[p]), p))[:3]
        return dict.fromkeys([fastest, *others], "confirm")

    # ------------------------------------------------------------------------------------------ the course

    def left(self) -> bool:
        return self.spent < self.options.measurements

    def run(self) -> SearchOutcome:
        chosen = self.probes()
        self.take(chosen)
        while not self.estimate and self.open() and self.left():  # nothing valid yet: the same again, then others
            waiting = [p for p in chosen if p not in self.rejected] or self.open()[:_BATCH]
            chosen = dict.fromkeys(waiting, "probe")
            self.take(chosen)
        stopped = ""
        fastest = self.fastest()
        if fastest is not None and self.estimate[fastest].lower_ms > self.limit and self.left():
            self.take(self.confirmation(fastest))
            fastest = self.fastest()
        if fastest is None:
            stopped = "no candidate gave a valid measurement"
        elif self.estimate[fastest].lower_ms > self.limit:
            stopped = "the fastest candidate is above the limit"
        while not stopped:
            chosen = self.improving() if self.estimate else dict.fromkeys(self.open()[:_BATCH], "improve")
            if not chosen:
                stopped = "no other candidate could be better and meet the limit"
            elif not self.left():
                stopped = f"{self.options.measurements} measurements are spent"
            else:
                self.take(chosen)
        return self.outcome(stopped)

    def outcome(self, stopped: str) -> SearchOutcome:
        ranked = self.ranking()
        points = [
            Point(
                label=self.candidates[p].label,
                precision=known.precision,
                latency_ms=known.latency_ms,
                lower_ms=known.lower_ms,
                upper_ms=known.upper_ms,
                capacity=self.candidates[p].capacity,
                role="feasible" if self.feasible(p) else "candidate",
            )
            for p, known in sorted(self.estimate.items())
        ]
        return SearchOutcome(
            limit_ms=self.limit,
            headroom=self.options.headroom,
            candidates=len(self.candidates),
            points=tuple(points),
            feasible=tuple(self.candidates[p] for p in ranked),
            rejected={self.candidates[p].label: reason for p, reason in sorted(self.rejected.items())},
            proposed=len(self.proposed),
            measured=len(self.estimate),
            measurements=self.spent,
            predictor_error=self.predictor.held_out_error() if self.estimate else None,
            rounds=tuple(self.rounds),
            stopped=stopped,
            certificate=None if ranked else self.certificate(),
        )

    def certificate(self) -> Infeasible:
        fastest = self.fastest()
        if fastest is None:
            reasons = sorted(set(self.rejected.values()))
            return Infeasible(limit_ms=self.limit, proven=False, reason="; ".join(reasons) or "no candidate gave a valid measurement")
        known = self.estimate[fastest]
        proven = known.lower_ms > self.limit
        return Infeasible(
            limit_ms=self.limit,
            proven=proven,
            fastest=self.candidates[fastest].label,
            precision=known.precision,
            latency_ms=known.latency_ms,
            lower_ms=known.lower_ms,
            upper_ms=known.upper_ms,
            would_fit_ms=max(known.latency_ms / (1.0 - self.options.headroom), known.upper_ms),
            measured=len(self.estimate),
            reason="the lower 99 % bound of the fastest candidate is above the limit" if proven else "the fastest candidate is too near to the limit",
        )


def _aligned(candidate: Candidate, step: int) -> bool:
    """Whether every integer choice of 4 and above is a multiple of `step`, and there is one."""
    widths = [value for value in candidate.spec.kwargs.values() if isinstance(value, int) and not isinstance(value, bool) and value >= 4]
    return bool(widths) and all(value % step == 0 for value in widths)

"""A student over budget is never returned: search, selection and verdict on the null target, whose true latency is known."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from edgekd.artifact import StoredArtifact, store_artifact
from edgekd.errors import Rejected
from edgekd.options import SearchOptions
from edgekd.records import Budget, Check, Format, IOSpec, Limits, Outcome, Precision, StudentSpec, TensorSpec, Verdict
from edgekd.search import Candidate, SearchOutcome, Seen, Selection, Size, choose_passing, make_candidates, search
from edgekd.target import LiveTarget, connect

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")
from edgekd.measuring.measure import Subject, measure_verdict, screen  # noqa: E402
from edgekd.verdict import is_undecided, judge  # noqa: E402

WIDTHS, DEPTHS, KERNELS = [4, 6, 8, 12, 16, 20, 24, 28, 32], [1, 2, 3, 4], [1, 3]
IMAGE = 8
PERCENTILE = 90.0


def write_graph(folder: Path, width: int, depth: int, kernel: int) -> StoredArtifact:
    """A chain of convolutions of one width with zero weights: the null target's latency depends on shapes only."""
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    nodes, weights, last, channels = [], [], "x", 1
    for index in range(depth + 1):
        shape = (width, channels, kernel, kernel)
        weights.append(onnx.numpy_helper.from_array(np.zeros(shape, dtype=np.float32), f"w{index}"))
        nodes.append(helper.make_node("Conv", [last, f"w{index}"], [f"c{index}"], pads=[kernel // 2] * 4, name=f"conv{index}"))
        nodes.append(helper.make_node("Relu", [f"c{index}"], [f"r{index}"], name=f"relu{index}"))
        last, channels = f"r{index}", width
    nodes.append(helper.make_node("GlobalAveragePool", [last], ["output"], name="pool"))
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", kind, [1, 1, IMAGE, IMAGE])],
        [helper.make_tensor_value_info("output", kind, [1, width, 1, 1])],
        weights,
    )
    folder.mkdir()
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), str(folder / "model.onnx"))
    iospec = IOSpec(
        inputs=(TensorSpec(name="x", dtype="float32", shape=(1, 1, IMAGE, IMAGE)),),
        outputs=(TensorSpec(name="output", dtype="float32", shape=(1, width, 1, 1)),),
    )
    return store_artifact(folder, "model.onnx", format=Format.ONNX, precision=Precision.FP32, iospec=iospec, opset=20)


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Candidate, StoredArtifact]]:
    root = tmp_path_factory.mktemp("graphs")
    choices = list(itertools.product(WIDTHS, DEPTHS, KERNELS))
    specs = [StudentSpec(kind="family", kwargs={"width": width, "depth": depth, "kernel": kernel}) for width, depth, kernel in choices]
    sizes = [Size(parameters=depth * (width * kernel) ** 2 + width, macs=IMAGE * IMAGE * depth * (width * kernel) ** 2) for width, depth, kernel in choices]
    candidates = make_candidates(specs, sizes)
    return {
        candidate.label: (candidate, write_graph(root / str(number), *choice))
        for number, (candidate, choice) in enumerate(zip(candidates, choices, strict=True))
    }


class Road:
    """What the pipeline does around the search: screens candidates, and takes the chosen one to a verdict."""

    def __init__(self, target: LiveTarget, members: Mapping[str, tuple[Candidate, StoredArtifact]], limit_ms: float, seed: int, kindness: float = 1.0) -> None:
        self.target, self.members, self.limit, self.seed, self.kindness = target, members, limit_ms, seed, kindness
        self.calls = 0
        self.inputs = {"x": np.zeros((1, 1, IMAGE, IMAGE), dtype=np.float32)}

    def measure(self, batch: Sequence[Candidate]) -> dict[str, Seen]:
        self.calls += 1  # every call draws new noise
        subjects = [Subject(one.label, self.members[one.label][1], self.inputs) for one in batch]
        screened = screen(self.target, subjects, percentile=PERCENTILE, limits=Limits(), seed=1000 * self.seed + self.calls)
        return {
            label: Seen(
                latency_ms=one.latency_ms * self.kindness,
                lower_ms=one.lower_ms * self.kindness,
                upper_ms=one.upper_ms * self.kindness,
                valid=one.measurement.valid,
                precision="fp32",
            )
            for label, one in screened.items()
        }

    def judge(self, candidate: Candidate) -> Verdict:
        plan = self.target.profile.measure.verdict
        budget = Budget(latency_ms=self.limit, percentile=PERCENTILE)

        def verdict(seen: Mapping[str, object]) -> Verdict:
            return judge(budget=budget, limit_ms=self.limit, measurement=seen[candidate.label], plan=plan, accept_simulated=True)  # type: ignore[arg-type]

        subject = Subject(candidate.label, self.members[candidate.label][1], self.inputs)
        seen = measure_verdict(self.target, [subject], limits=Limits(), seed=self.seed, undecided=lambda now: is_undecided(verdict(now)))
        return verdict(seen)

    def run(self) -> tuple[SearchOutcome, Selection]:
        options = SearchOptions(measurements=24)
        outcome = search([candidate for candidate, _ in self.members.values()], measure=self.measure, limit_ms=self.limit, options=options, seed=self.seed)
        return outcome, choose_passing(outcome.feasible, self.judge, attempts=3, latency_ms=outcome.latency_ms())

    def true_ms(self, label: str) -> float:
        return float(self.target.runtime.true_latency_ms(self.members[label][1], PERCENTILE))  # type: ignore[attr-defined]


def overrides(seed: int, noise: float) -> tuple[str, ...]:
    return (f"runtime.options.seed={seed}", f"runtime.options.noise={noise}")


@pytest.mark.slow
def test_student_over_budget_is_never_returned_in_200_seeded_searches(members: dict[str, tuple[Candidate, StoredArtifact]]) -> None:
    returned = possible = shares = stopped_by_verdict = 0.0
    for seed in range(200):
        noise = (0.005, 0.01, 0.02, 0.05)[seed % 4]
        with connect("null", overrides=overrides(seed, noise)) as target:
            truth = {label: float(target.runtime.true_latency_ms(artifact, PERCENTILE)) for label, (_, artifact) in members.items()}  # type: ignore[attr-defined]
            limit = float(np.quantile(list(truth.values()), np.random.default_rng(seed).uniform(0.0, 0.9))) * (0.9 if seed % 10 == 9 else 1.0)
            road = Road(target, members, limit, seed)
            outcome, selection = road.run()
            assert outcome.measurements <= 24
            if selection.chosen is not None:
                assert truth[selection.chosen.label] <= limit
                assert selection.attempts[-1].verdict is not None
                assert selection.attempts[-1].verdict.outcome is Outcome.PASS
                returned += 1
                best = max(candidate.capacity for label, (candidate, _) in members.items() if truth[label] <= limit)
                shares += selection.chosen.capacity / best
            stopped_by_verdict += any(attempt.verdict is not None and attempt.verdict.outcome is not Outcome.PASS for attempt in selection.attempts)
            if outcome.certificate is not None and outcome.certificate.proven:
                assert min(truth.values()) > limit
            possible += min(truth.values()) <= 0.9 * limit
    assert possible >= 150
    assert returned >= 0.9 * possible
    assert shares / returned > 0.75
    assert stopped_by_verdict >= 5


def test_student_over_budget_is_not_returned_when_the_screen_is_too_kind(members: dict[str, tuple[Candidate, StoredArtifact]]) -> None:
    """A screen that reads 20 % too little proposes students over the budget; the verdict stops every one of them."""
    caught = 0
    for seed in range(8):
        with connect("null", overrides=overrides(seed, 0.01)) as target:
            road = Road(target, members, 0.1, seed, kindness=0.8)
            outcome, selection = road.run()
            assert outcome.feasible
            if selection.chosen is not None:
                assert road.true_ms(selection.chosen.label) <= 0.1
            for attempt in selection.attempts:
                assert attempt.verdict is not None
                over = road.true_ms(attempt.label) > 0.1
                caught += over
                assert not (over and attempt.verdict.outcome is Outcome.PASS)
    assert caught >= 4


def verdict_of(outcome: Outcome, name: str = "latency") -> Verdict:
    return Verdict(outcome=outcome, checks=(Check(name=name, outcome=outcome, value=1.0, limit=1.0, unit="ms"),), reason="planted")


def select(judge_one: Callable[[Candidate], Verdict], latencies: Mapping[str, float] | None = None, attempts: int = 3) -> Selection:
    ranked = [Candidate(spec=StudentSpec(kind="family", kwargs={"width": width}), capacity=float(width), features={}) for width in (32, 24, 16, 8)]
    return choose_passing(ranked, judge_one, attempts=attempts, latency_ms=latencies)


@pytest.mark.parametrize("outcome", [Outcome.FAIL, Outcome.REFUSE])
def test_selection_chooses_nothing_without_a_pass(outcome: Outcome) -> None:
    selection = select(lambda candidate: verdict_of(outcome))
    assert selection.chosen is None
    assert [attempt.label for attempt in selection.attempts] == ["width=32", "width=24", "width=16"]
    assert json.loads(selection.to_json())["chosen"] is None


def test_selection_goes_on_to_faster_ones_only_after_a_latency_miss() -> None:
    latencies = {"width=32": 1.0, "width=24": 1.1, "width=16": 0.9, "width=8": 0.5}
    selection = select(lambda candidate: verdict_of(Outcome.PASS if candidate.label == "width=16" else Outcome.FAIL), latencies)
    assert selection.chosen is not None
    assert selection.chosen.label == "width=16"
    assert selection.skipped == 1
    by_accuracy = select(lambda candidate: verdict_of(Outcome.PASS if candidate.label == "width=24" else Outcome.FAIL, "accuracy"), latencies)
    assert by_accuracy.chosen is not None
    assert by_accuracy.chosen.label == "width=24"


def test_selection_stops_where_another_candidate_cannot_help() -> None:
    ranked = [Candidate(spec=StudentSpec(kind="family", kwargs={"width": width}), capacity=float(width), features={}) for width in (32, 24, 16)]
    outcomes = {"width=32": Outcome.FAIL, "width=24": Outcome.REFUSE, "width=16": Outcome.PASS}
    selection = choose_passing(
        ranked, lambda candidate: verdict_of(outcomes[candidate.label]), attempts=3, go_on=lambda verdict: verdict.outcome is Outcome.FAIL
    )
    assert selection.chosen is None
    assert [attempt.label for attempt in selection.attempts] == ["width=32", "width=24"]


def test_selection_notes_a_rejected_candidate_and_tries_the_next() -> None:
    def judge_one(candidate: Candidate) -> Verdict:
        if candidate.label == "width=32":
            raise Rejected("the converter refused it")
        return verdict_of(Outcome.PASS)

    selection = select(judge_one)
    assert selection.chosen is not None
    assert selection.chosen.label == "width=24"
    assert "refused" in selection.attempts[0].rejected
    assert select(judge_one, attempts=1).chosen is None

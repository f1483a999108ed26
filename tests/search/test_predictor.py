"""The latency predictor against independent references, and the features it sees."""

from __future__ import annotations

import math

import numpy as np
import pytest

from edgekd.records import StudentSpec
from edgekd.search import LatencyPredictor, choice_features


def spec(**kwargs: int | float | str | bool) -> StudentSpec:
    return StudentSpec(kind="family", kwargs=kwargs)


def test_choice_features_hold_logs_alignment_and_one_hot_values() -> None:
    rows = choice_features([spec(width=12, norm="batch", slim=True), spec(width=16, norm="none", slim=False)], {"macs": [100.0, 0.0]})
    assert rows[0] == {
        "norm=batch": 1.0,
        "norm=none": 0.0,
        "slim=False": 0.0,
        "slim=True": 1.0,
        "width": pytest.approx(math.log(12)),
        "width%8": pytest.approx(0.25),
        "width%16": pytest.approx(0.25),
        "log macs": pytest.approx(math.log(100)),
    }
    assert rows[1]["width%8"] == rows[1]["width%16"] == 0.0
    assert rows[1]["log macs"] == 0.0
    assert set(choice_features([spec(depth=1), spec(depth=3)], {})[0]) == {"depth"}


def fitted(seed: int = 0, noise: float = 0.01) -> tuple[LatencyPredictor, np.ndarray, np.ndarray, list[int]]:
    generator = np.random.default_rng(seed)
    features = generator.uniform(-1, 1, size=(80, 3))
    truth = 0.4 + 0.8 * features[:, 0] + 0.3 * np.sin(3 * features[:, 1])
    rows = list(range(25))
    predictor = LatencyPredictor(features)
    predictor.fit(rows, np.exp(truth[:25] + noise * generator.standard_normal(25)).tolist(), [noise] * 25)
    return predictor, features, truth, rows


def test_predictor_beats_a_straight_line_and_knows_its_own_uncertainty() -> None:
    covered: list[bool] = []
    errors: list[float] = []
    straight: list[float] = []
    for seed in range(10):
        predictor, features, truth, _ = fitted(seed)
        mean, deviation = predictor.predict()
        covered += list(np.abs(mean[25:] - truth[25:]) < 2 * deviation[25:])
        errors += list(np.abs(mean[25:] - truth[25:]))
        design = np.column_stack([np.ones(80), features])
        line = design @ np.linalg.lstsq(design[:25], truth[:25], rcond=None)[0]
        straight += list(np.abs(line[25:] - truth[25:]))
    assert np.median(errors) < 0.6 * np.median(straight)
    assert 0.88 < np.mean(covered) <= 1.0


def test_held_out_error_equals_refitting_without_each_point() -> None:
    predictor, features, _, rows = fitted()
    kept = predictor._whole[np.ix_(rows, rows)] + np.diag(np.full(25, 0.01**2 + predictor._nugget**2))
    y = predictor._y
    gaps = []
    for row in rows:
        others = [other for other in rows if other != row]
        weights = np.linalg.solve(kept[np.ix_(others, others)], y[others] - predictor._mean)
        gaps.append(abs(math.exp(predictor._mean + kept[row, others] @ weights - y[row]) - 1.0))
    assert predictor.held_out_error() == pytest.approx(np.median(gaps), rel=1e-8)
    assert features.shape == (80, 3)


def test_held_out_error_is_unknown_below_four_points() -> None:
    predictor = LatencyPredictor(np.arange(10.0)[:, None])
    predictor.fit([0, 1, 2], [1.0, 2.0, 3.0], [0.01] * 3)
    assert predictor.held_out_error() is None
    mean, deviation = predictor.predict()
    assert deviation[9] > deviation[1] > 0
    assert np.isfinite(mean).all()


def test_features_without_spread_do_no_harm() -> None:
    predictor = LatencyPredictor(np.ones((5, 2)))
    predictor.fit([0, 1], [1.0, 1.1], [0.01, 0.01])
    mean, deviation = predictor.predict()
    assert np.exp(mean[4]) == pytest.approx(1.05, abs=0.1)
    assert np.isfinite(deviation).all()

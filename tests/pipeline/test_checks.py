"""Leaks between splits and a teacher that knows nothing are found before anything is measured or trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgekd
from edgekd import Arrays, Budget
from edgekd.errors import BudgetError, DataError, ModelError
from tests.pipeline import pipeline_kit as kit


def _with_items_of(mine: Arrays, other: Arrays, count: int) -> Arrays:
    """A data set with the first `count` items of another one appended."""
    inputs = {name: np.concatenate([value, other.inputs[name][:count]]) for name, value in mine.inputs.items()}
    plain = inputs.get("", inputs)
    return Arrays(plain, np.concatenate([mine.targets, other.targets[:count]]))


def _compress(arguments: dict[str, Any]) -> edgekd.Result:
    with edgekd.connect("null") as target:
        return edgekd.compress(**arguments, target=target)


@pytest.mark.parametrize(("one", "other"), [("train", "test"), ("validation", "test"), ("train", "validation")])
def test_splits_that_share_items_are_refused_before_anything_is_stored(one: str, other: str, tmp_path: Path) -> None:
    arguments = kit.arguments("classification", tmp_path / "run", student=kit.fixed("classification"))
    arguments[one] = _with_items_of(arguments[one], arguments[other], 20)
    with pytest.raises(DataError, match=rf"the {one} and {other} data overlap.*20 of \d+"):
        _compress(arguments)
    assert not list((tmp_path / "run" / "stages").iterdir())


def test_a_single_double_is_noted_and_no_obstacle(tmp_path: Path) -> None:
    arguments = kit.arguments("classification", tmp_path / "run", student=kit.fixed("classification"))
    arguments["train"] = _with_items_of(arguments["train"], arguments["test"], 1)
    (row,) = kit.rows_of(_compress(arguments), "baseline", "train and test")
    assert row.decision == "noted"
    assert row.reason.startswith("1 of")


def test_a_teacher_that_knows_nothing_is_refused(tmp_path: Path) -> None:
    arguments = kit.arguments("classification", tmp_path / "run", student=kit.fixed("classification"))
    classes = int(arguments["test"].targets.max()) + 1
    for name in ("train", "validation", "test"):
        plain = arguments[name].inputs
        arguments[name] = Arrays(plain.get("", plain), (arguments[name].targets + 1) % classes)
    with pytest.raises(ModelError, match=r"no better than always answering the commonest class.*label encoding"):
        _compress(arguments)


@pytest.mark.parametrize(("field", "value"), [("max_drop", 5.0), ("max_drop", 1), ("accuracy_floor", 90.0)])
def test_percentages_where_fractions_are_meant_are_refused_with_the_fraction(field: str, value: float) -> None:
    with pytest.raises(BudgetError, match=rf"did you mean {field}={value / 100:g}"):
        Budget(latency_ms=1.0, **{field: value})

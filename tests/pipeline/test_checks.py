"""Leaks between splits and a teacher that knows nothing are found before anything is measured or trained."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgekd
from edgekd import Arrays, Budget
from edgekd.contracts import Target
from edgekd.errors import BudgetError, DataError, ModelError
from edgekd.pipeline import make_context
from edgekd.stages import StageStore
from edgekd.steps.checks import check_splits
from edgekd.steps.context import Context
from edgekd.steps.quantizing import choose_calibration
from edgekd.tasks import Classification
from tests.pipeline import pipeline_kit as kit


def _with_items_of(mine: Arrays, other: Arrays, count: int) -> Arrays:
    """A data set with the first `count` items of another one appended."""
    inputs = {name: np.concatenate([value, other.inputs[name][:count]]) for name, value in mine.inputs.items()}
    plain = inputs.get("", inputs)
    assert isinstance(mine.targets, np.ndarray)
    assert isinstance(other.targets, np.ndarray)
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


class Promised(Classification):
    """A task that gives scores of 1.5 and says that they are 0 or 1, or in [0, 1]."""

    bounded = True

    def __init__(self, binary: bool) -> None:
        super().__init__()
        self.graded = not binary

    def check(self, outputs: Any, targets: Any, split: str = "") -> None:
        super().check(outputs, targets, split)
        self.binary = not self.graded

    def scores(self, outputs: Any, targets: Any) -> Any:
        return 1.5 * super().scores(outputs, targets)


@pytest.mark.parametrize(("binary", "says"), [(True, "binary = True"), (False, "bounded = True")])
def test_scores_outside_the_range_that_the_task_states_are_refused_before_anything_is_stored(binary: bool, says: str, tmp_path: Path) -> None:
    arguments = kit.arguments("classification", tmp_path / "run", student=kit.fixed("classification"))
    with pytest.raises(DataError, match=says):
        _compress(arguments | {"task": Promised(binary)})
    assert not list((tmp_path / "run" / "stages").iterdir())


@pytest.mark.slow
def test_a_single_double_is_noted_and_no_obstacle(tmp_path: Path) -> None:
    arguments = kit.arguments("classification", tmp_path / "run", student=kit.fixed("classification"))
    arguments["train"] = _with_items_of(arguments["train"], arguments["test"], 1)
    (row,) = kit.rows_of(_compress(arguments), "baseline", "train and test")
    assert row.decision == "noted"
    assert row.reason.startswith("1 of")


def test_progress_prints_the_stages_on_standard_error_unless_it_is_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = kit.arguments("classification", tmp_path / "run", student=kit.fixed("classification"), budget=Budget(latency_ms=0.001))
    for progress, lines in ((True, ["baseline: started: export and measure the teacher; does quantizing alone do?"]), (False, [])):
        with pytest.raises(BudgetError):
            _compress(arguments | {"progress": progress})
        out, err = capsys.readouterr()
        assert (out, err.splitlines()) == ("", lines)


def _context(target: Target, folder: Path, **splits: Any) -> Context:
    """The context of a run on these splits, by a teacher of one number per item."""
    return make_context(
        lambda inputs: {"output": inputs["x"]},
        task="regression",
        target=target,
        budget=Budget(latency_ms=1.0),
        student=kit.fixed("regression"),
        store=StageStore(folder),
        **splits,
    )


def _numbers(start: int, stop: int) -> Arrays:
    """Items that are told apart by their one value."""
    return Arrays({"x": np.arange(start, stop, dtype=np.float64)[:, None]}, np.zeros((stop - start, 1)))


def test_calibration_never_holds_an_item_of_the_test_split(tmp_path: Path) -> None:
    with edgekd.connect("null") as target:
        context = _context(target, tmp_path, train=_numbers(0, 200), validation=_numbers(500, 700), test=_numbers(199, 400))
        chosen = choose_calibration(context, 200)
        assert chosen.indices == tuple(range(199))
        assert chosen.split == "train"
        assert 199.0 not in chosen.inputs["x"]
        inside = _context(target, tmp_path, train=_numbers(0, 50), validation=_numbers(500, 700), test=_numbers(0, 400))
        with pytest.raises(DataError, match="every calibration input is also in the test split"):
            choose_calibration(inside, 50)


class OnDisk:
    """The same items, but read one by one, as from a disk."""

    def __init__(self, start: int, stop: int) -> None:
        self.start, self.stop = start, stop

    def __len__(self) -> int:
        return self.stop - self.start

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        return np.array([float(self.start + index)]), np.zeros(1)


def test_large_splits_are_compared_whole_so_that_a_leak_of_one_percent_is_counted_exactly(tmp_path: Path) -> None:
    train, validation = _numbers(0, 50_000), _numbers(100_000, 121_000)
    with edgekd.connect("null") as target:
        rows = check_splits(_context(target, tmp_path, train=train, validation=validation, test=_numbers(49_750, 74_750)))
        assert [(row.step, row.reason.split(" items")[0]) for row in rows[1:]] == [("train and test", "250 of 25000")]
        assert rows[0].reason == "inputs compared: train 50000 items; validation 21000 items; test 25000 items"
        with pytest.raises(DataError, match=r"the train and test data overlap.*251 of 25000 items"):
            check_splits(_context(target, tmp_path, train=train, validation=validation, test=_numbers(49_749, 74_749)))


def test_a_leak_from_training_data_that_are_not_in_memory_is_estimated_with_bounds(tmp_path: Path) -> None:
    with edgekd.connect("null") as target:
        rows = check_splits(_context(target, tmp_path, train=OnDisk(0, 40_000), validation=_numbers(60_000, 60_500), test=_numbers(39_980, 43_980)))
        assert "train 20000 of 40000 items, drawn by seed" in rows[0].reason
        (none,) = [row.reason for row in rows if row.step == "train and validation"]
        assert none.startswith("0 of 500 validation items found among train 20000 of 40000 items, drawn by seed: about 0 in all, 0 to ")
        (some,) = [row.reason for row in rows if row.step == "train and test"]
        found, low, high = int(some.split(" ")[0]), *(int(value) for value in re.findall(r"(\d+) to (\d+)", some)[0])
        assert 0 < found < 20  # of the 20 doubles, those that were drawn
        assert low < 20 < high
        with pytest.raises(DataError, match=r"the train and test data overlap.*about \d+ in all"):
            check_splits(_context(target, tmp_path, train=OnDisk(0, 40_000), validation=_numbers(60_000, 60_500), test=_numbers(39_600, 43_600)))


def test_splits_of_the_same_name_are_compared_with_each_other(tmp_path: Path) -> None:
    with edgekd.connect("null") as target:
        context = _context(target, tmp_path, train=_numbers(0, 100), validation=_numbers(100, 200), test=_numbers(150, 250))
        context.validation.name = context.test.name
        with pytest.raises(DataError, match=r"the validation and test data overlap.*50 of 100"):
            check_splits(context)


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
    wrong: dict[str, Any] = {field: value}
    with pytest.raises(BudgetError, match=rf"did you mean {field}={value / 100:g}"):
        Budget(latency_ms=1.0, **wrong)

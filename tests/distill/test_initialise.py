"""Students that start from their teacher."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from edgekd.distill.initialise import evenly_spaced_blocks, initialise_from_teacher, initialise_student, spaced_indices
from edgekd.errors import ModelError
from tests.distill.distill_cases import Mlp, seeded

pytestmark = pytest.mark.torch


class Block(nn.Module):
    """A residual block."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)


class Trunk(nn.Module):
    """A stem, one stage of blocks, a head."""

    def __init__(self, depth: int, width: int = 4, classes: int = 3) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 1)
        self.stage = nn.Sequential(*[Block(width, width) for _ in range(depth)])
        self.head = nn.Linear(width, classes)


def test_tensors_of_equal_name_and_shape_are_copied_and_others_listed() -> None:
    student, teacher = seeded(Trunk, 1, classes=5), seeded(Trunk, 3, seed=1)
    before = student.head.weight.detach().clone()
    report = initialise_from_teacher(student, teacher)
    assert torch.equal(student.stem.weight, teacher.stem.weight)
    assert torch.equal(student.stage[0].conv.weight, teacher.stage[0].conv.weight)
    assert torch.equal(student.head.weight, before)
    assert set(report.left) == {"head.weight", "head.bias"}
    assert "(5, 4)" in report.left["head.weight"]
    assert report.share == pytest.approx(1 - (5 * 4 + 5) / sum(value.numel() for value in student.state_dict().values()))
    assert "9 of 11 tensors" in report.text()


@pytest.mark.parametrize(
    ("few", "many", "expected"),
    [(1, 5, (0,)), (2, 5, (0, 4)), (3, 5, (0, 2, 4)), (3, 9, (0, 4, 8)), (4, 9, (0, 3, 5, 8)), (3, 3, (0, 1, 2)), (4, 2, (0, 1))],
)
def test_spaced_indices_hold_first_and_last_and_rise(few: int, many: int, expected: tuple[int, ...]) -> None:
    assert spaced_indices(few, many) == expected
    assert sorted(set(expected)) == list(expected)


def test_fewer_blocks_take_evenly_spaced_ones() -> None:
    student, teacher = seeded(Trunk, 3), seeded(Trunk, 5, seed=1)
    report = evenly_spaced_blocks(student, teacher, ["stage"])
    for mine, other in ((0, 0), (1, 2), (2, 4)):
        assert torch.equal(student.stage[mine].conv.weight, teacher.stage[other].conv.weight)
    assert report.copied["stage.1.conv.weight"] == "stage.2.conv.weight"
    assert report.left == {}
    assert report.share == 1.0


def test_more_blocks_than_the_teacher_leave_the_rest() -> None:
    report = evenly_spaced_blocks(seeded(Trunk, 3), seeded(Trunk, 2, seed=1), ["stage"])
    assert {name.split(".")[1] for name in report.left} == {"2"}


def test_container_that_does_not_exist_names_the_near_one() -> None:
    with pytest.raises(ModelError, match=r"stage \(did you mean this\?\)"):
        evenly_spaced_blocks(seeded(Trunk, 1), seeded(Trunk, 2), ["stages"])
    with pytest.raises(ModelError, match="no blocks"):
        evenly_spaced_blocks(seeded(Trunk, 1), seeded(Trunk, 2), ["stem"])


def test_hook_decides_and_the_report_lists_what_it_changed() -> None:
    def hook(student: Any, teacher: Any) -> None:
        with torch.no_grad():
            student.first.weight.copy_(teacher.first.weight[:4])

    student, teacher = seeded(Mlp, 4), seeded(Mlp, 8, seed=1)
    report = initialise_student(student, teacher, hook=hook)
    assert list(report.copied) == ["first.weight"]
    assert torch.equal(student.first.weight, teacher.first.weight[:4])


def test_hook_that_changes_the_architecture_is_refused() -> None:
    def hook(student: Any, teacher: Any) -> None:
        student.first = nn.Linear(8, 5)

    with pytest.raises(ModelError, match="architecture"):
        initialise_student(seeded(Mlp, 4), seeded(Mlp, 8), hook=hook)

"""The callbacks that ship: progress in the terminal, TensorBoard, Weights & Biases."""

from __future__ import annotations

import importlib.util
import io
import warnings
from pathlib import Path

import pytest
from rich.console import Console

from edgekd.contracts import Callback
from edgekd.distill.progress import ProgressBar
from edgekd.distill.run import Talks
from edgekd.distill.wandb import WandB
from edgekd.errors import MissingDependency
from edgekd.teachers import as_teacher
from tests.distill.distill_cases import QUICK, Mlp, quick, seeded

pytestmark = pytest.mark.torch


def console(terminal: bool) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, force_terminal=terminal, width=120), stream


def test_progress_prints_lines_and_messages_without_a_terminal(tmp_path: Path) -> None:
    screen, stream = console(False)
    bar = ProgressBar(console=screen, every=2)
    assert isinstance(bar, Callback)
    assert isinstance(bar, Talks)
    quick(seeded(Mlp, 8), tmp_path / "run", teacher=as_teacher(seeded(Mlp, 8, seed=1).eval()), callbacks=(bar,), label="width=8")
    lines = stream.getvalue().splitlines()
    epochs = [line for line in lines if "epoch" in line and "loss" in line]
    assert [line.split("epoch ")[1].split(",")[0] for line in epochs] == ["2/4", "4/4"]
    assert any("teacher outputs: cached" in line for line in lines)


def test_progress_shows_a_bar_with_the_remaining_time_on_a_terminal(tmp_path: Path) -> None:
    screen, stream = console(True)
    quick(seeded(Mlp, 8), tmp_path / "run", teacher=None, callbacks=(ProgressBar(console=screen),), label="width=8")
    text = stream.getvalue()
    assert "distil width=8" in text
    assert f"/{QUICK.epochs * 10}" in text
    assert "left" in text


def test_tensorboard_writes_steps_and_epochs(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # type: ignore[import-untyped]

        from edgekd.distill.tensorboard import TensorBoard

        board = TensorBoard(tmp_path / "logs", every=5)
        assert isinstance(board, Callback)
        result = quick(seeded(Mlp, 8), tmp_path / "run", teacher=None, callbacks=(board,), label="width=8 depth=1")
        events = EventAccumulator(str(tmp_path / "logs" / "width=8_depth=1"))
        events.Reload()
    assert [point.step for point in events.Scalars("step/loss")] == [5, 10, 15, 20, 25, 30, 35, 40]
    assert [point.value for point in events.Scalars("epoch/validation")] == pytest.approx([row.validation for row in result.record.epochs])


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_wandb_says_what_to_install_when_it_is_absent() -> None:
    with pytest.raises(MissingDependency, match=r"edgekd\[wandb\]"):
        WandB("project")

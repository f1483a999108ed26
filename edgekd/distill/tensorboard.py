"""Training curves in TensorBoard's format."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from edgekd.errors import MissingDependency


class TensorBoard:
    """A callback that writes losses per step and metrics per epoch to `folder/<label>`, for `tensorboard --logdir folder`.

    Raises:
        MissingDependency: tensorboard is not installed.
    """

    def __init__(self, folder: Path, *, every: int = 10) -> None:
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            raise MissingDependency("tensorboard", "distill", purpose="the TensorBoard callback") from error
        self._folder = folder
        self._every = every
        self._writer: Any = None

    def on_start(self, label: str, epochs: int, steps_per_epoch: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        safe = "".join(letter if letter.isalnum() or letter in "-_=." else "_" for letter in label)
        self._writer = SummaryWriter(str(self._folder / safe))

    def on_step(self, step: int, losses: Mapping[str, float]) -> None:
        if step % self._every == 0:
            for name, value in losses.items():
                self._writer.add_scalar(f"step/{name}", value, step)

    def on_epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(f"epoch/{name}", value, epoch)

    def on_end(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

"""A progress display of a training in the terminal, with the time that is left."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID


class ProgressBar:
    """A callback that shows a bar with loss, validation metric and remaining time; lines per epoch where there is no terminal.

    `every` is how many epochs lie between two lines without a terminal.
    """

    def __init__(self, *, console: Console | None = None, every: int = 10) -> None:
        self._console = console
        self._every = every
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._label = ""
        self._epochs = 0
        self._validation = ""

    def _out(self) -> Console:
        if self._console is None:
            from rich.console import Console

            self._console = Console(stderr=True)
        return self._console

    def on_start(self, label: str, epochs: int, steps_per_epoch: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self._label, self._epochs, self._validation = label, epochs, ""
        if not self._out().is_terminal:
            return
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._out(),
            transient=True,
        )
        self._bar.start()
        self._task = self._bar.add_task(f"distil {label}", total=epochs * steps_per_epoch, shown="")

    def on_step(self, step: int, losses: Mapping[str, float]) -> None:
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, shown=f"loss {losses['loss']:.4f}{self._validation}")

    def on_epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        self._validation = f" validation {metrics['validation']:.4f}"
        if self._bar is None and (epoch % self._every == 0 or epoch == self._epochs):
            self._out().print(
                f"distil {self._label}: epoch {epoch}/{self._epochs}, loss {metrics['train_loss']:.4f},{self._validation}, {metrics['seconds']:.1f} s",
                highlight=False,
                markup=False,
                soft_wrap=True,
            )

    def on_message(self, text: str) -> None:
        """Print a sentence of the training above the bar."""
        self._out().print(f"distil {self._label}: {text}" if self._label else f"distil: {text}", highlight=False, markup=False, soft_wrap=True)

    def on_end(self) -> None:
        self._label = ""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

"""Training curves in Weights & Biases, for those who have it installed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from edgekd.errors import MissingDependency


class WandB:
    """A callback that logs losses per step and metrics per epoch to one run per training.

    `project` and `settings` go to `wandb.init` as they are; who is logged in is wandb's own matter.

    Raises:
        MissingDependency: wandb is not installed.
    """

    def __init__(self, project: str = "edgekd", *, every: int = 10, **settings: Any) -> None:
        try:
            import wandb  # type: ignore[import-not-found, unused-ignore]
        except ImportError as error:
            raise MissingDependency("wandb", "wandb", purpose="the Weights & Biases callback") from error
        self._wandb: Any = wandb
        self._project = project
        self._every = every
        self._settings = settings
        self._run: Any = None

    def on_start(self, label: str, epochs: int, steps_per_epoch: int) -> None:
        self._run = self._wandb.init(
            project=self._project, name=label, config={"epochs": epochs, "steps_per_epoch": steps_per_epoch}, reinit=True, **self._settings
        )
        self._run.define_metric("epoch/*", step_metric="epoch")

    def on_step(self, step: int, losses: Mapping[str, float]) -> None:
        if step % self._every == 0:
            self._run.log({f"step/{name}": value for name, value in losses.items()} | {"step": step})

    def on_epoch(self, epoch: int, metrics: Mapping[str, float]) -> None:
        self._run.log({f"epoch/{name}": value for name, value in metrics.items()} | {"epoch": epoch})

    def on_end(self) -> None:
        if self._run is not None:
            self._run.finish()
            self._run = None

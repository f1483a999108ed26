"""Candidates on a target for TFLite files: how many forms they are timed in, as the plan counts them, and forms that the target does not run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from edgekd.data import Arrays
from edgekd.measuring.screening import launches_each
from edgekd.options import Options
from edgekd.pipeline import make_context
from edgekd.planning import make_plan
from edgekd.records import Budget
from edgekd.spaces import Fixed
from edgekd.stages import StageStore
from edgekd.steps.bench import CandidateBench
from edgekd.steps.context import Context
from edgekd.target import LiveTarget, connect
from edgekd.tasks import Classification
from tests.pipeline.plugin_kit import install_runtimes

pytestmark = [pytest.mark.torch, pytest.mark.environments]


class Mixed(nn.Module):
    """Two convolutions over the steps, then attention: convolutions and a transformer in one."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)
        self.attention, self.head = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.two(torch.relu(self.one(x.unsqueeze(1)))).squeeze(1)
        y: torch.Tensor = self.head(self.attention(x).mean(1))
        return y


def context_of(folder: Path, live: LiveTarget) -> Context:
    torch.manual_seed(0)
    random = np.random.default_rng(0)
    splits = [Arrays({"x": random.standard_normal((8, 6, 8)).astype(np.float32)}, random.integers(0, 3, 8)) for _ in range(3)]
    given: dict[str, Any] = {"train": splits[0], "validation": splits[1], "test": splits[2], "task": Classification(), "options": Options()}
    return make_context(Mixed(), target=live, budget=Budget(latency_ms=5.0), student=Fixed(Mixed), store=StageStore(folder / "run"), **given)


def overrides(folder: Path, *more: str) -> tuple[str, ...]:
    return (f"transport.workdir={folder / 'device'}", f"runtime.options.lock={folder / 'lock'}", *more)


def test_a_plan_counts_every_form_that_a_mixed_network_is_timed_in(tmp_path: Path) -> None:
    with connect("litert-local", overrides=overrides(tmp_path)) as live:
        context = context_of(tmp_path, live)
        planned = {row.stage: row for row in make_plan(context).rows}
        bench = CandidateBench(context, tmp_path / "scratch")
        (candidate,) = bench.candidates()
        forms = bench._artifacts(candidate.spec)
    assert len(forms) == 4  # float, the mixture, and both schemes
    screen = live.profile.measure.screen
    assert planned["search"].launches == planned["quantize"].launches == launches_each(screen, len(forms)) * len(forms)


_LITERT = '''
from edgekd.records import SupportReport


class NoStatic(load("runtimes", "litert")):
    """A device whose runtime refuses attention in static int8; its runner is that of LiteRT."""

    def supports(self, model):
        if model.record.metadata.get("scheme") == "static_int8":
            return SupportReport(supported=False, missing={"BATCH_MATMUL": "no int8 kernel"})
        return super().supports(model)
'''


def test_one_form_that_the_target_refuses_is_told_and_the_others_are_timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_runtimes(tmp_path / "plugin", monkeypatch, _LITERT, {"no-static": "NoStatic"})
    with connect("litert-local", overrides=overrides(tmp_path, "runtime.kind=no-static")) as live:
        bench = CandidateBench(context_of(tmp_path, live), tmp_path / "scratch")
        (candidate,) = bench.candidates()
        forms = bench._artifacts(candidate.spec)
    assert set(forms) == {"fp32", "int8", "int8 dynamic_int8"}
    (reasons,) = bench.refused_forms.values()
    assert list(reasons) == ["static_int8"]
    assert "no int8 kernel" in reasons["static_int8"]
    assert not bench.float_only

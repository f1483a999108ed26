"""The networks of the conversion matrix: their shapes, that they are the same every time, and that their inputs share no digit."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("sklearn")

import torch

pytestmark = pytest.mark.torch

ROOT = Path(__file__).resolve().parents[2]
SHAPES: dict[str, tuple[tuple[int, ...], dict[str, tuple[int, ...]]]] = {
    "resnet20": ((3, 32, 32), {"output": (10,)}),
    "mobilenet_v2": ((3, 96, 96), {"output": (10,)}),
    "bilstm": ((32, 16), {"output": (10,)}),
    "vit": ((3, 32, 32), {"output": (10,)}),
    "transformer": ((64, 16), {"output": (10,)}),
    "unet": ((3, 64, 64), {"output": (2, 64, 64)}),
    "gru": ((32, 16), {"output": (10,)}),
    "squeeze_excite": ((3, 32, 32), {"output": (10,)}),
    "detector": ((3, 64, 64), {"boxes": (80, 4), "scores": (80, 10), "objectness": (80, 1)}),
}
PARAMETERS = {"resnet20": 272474, "mobilenet_v2": 2236682}


@pytest.fixture
def networks(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module, from the folder that its script runs in."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import networks  # type: ignore[import-not-found, unused-ignore]

    yield networks
    sys.modules.pop("networks", None)


def outputs(module: torch.nn.Module, inputs: np.ndarray[Any, Any]) -> dict[str, torch.Tensor]:
    with torch.no_grad():
        made = module(torch.from_numpy(inputs))
    return dict(made) if isinstance(made, dict) else {"output": made}


@pytest.mark.parametrize("name", sorted(SHAPES))
def test_network_gives_finite_outputs_that_depend_on_the_input(networks: Any, name: str) -> None:
    assert sorted(networks.NETWORKS) == sorted(SHAPES)
    torch.set_num_threads(1)
    inputs = networks.NETWORKS[name].inputs("held-out", 3)
    module = networks.build(name, batches=1)
    made = outputs(module, inputs)
    shape, expected = SHAPES[name]
    assert inputs.dtype == np.float32
    assert inputs.shape == (3, *shape)
    assert {key: tuple(value.shape) for key, value in made.items()} == {key: (3, *size) for key, size in expected.items()}
    assert all(bool(torch.isfinite(value).all()) for value in made.values())
    assert all(float(value.std(0).max()) > 1e-3 for value in made.values())
    if name in PARAMETERS:
        assert sum(value.numel() for value in module.parameters()) == PARAMETERS[name]


def test_network_is_the_same_every_time_whatever_was_drawn_before(networks: Any) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(1)
    first = networks.build("squeeze_excite", batches=1)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    second = networks.build("squeeze_excite", batches=1)
    assert torch.equal(torch.get_rng_state(), state)
    assert networks.fingerprint("squeeze_excite", first) == networks.fingerprint("squeeze_excite", second)
    with torch.no_grad():
        next(second.parameters()).add_(1e-3)
    assert networks.fingerprint("squeeze_excite", first) != networks.fingerprint("squeeze_excite", second)


def test_batch_norm_statistics_are_those_of_real_inputs(networks: Any) -> None:
    torch.set_num_threads(1)
    module = networks.build("detector", batches=2)
    seen: list[torch.Tensor] = []
    norm = next(layer for layer in module.modules() if isinstance(layer, torch.nn.BatchNorm2d))
    norm.register_forward_hook(lambda layer, given, out: seen.append(out))
    outputs(module, networks.NETWORKS["detector"].inputs("statistics", 64))
    centred = seen[0] - networks.OPEN
    assert float(centred.mean((0, 2, 3)).abs().max()) < 0.02
    assert float((centred.std((0, 2, 3)) - 1.0).abs().max()) < 0.05


@pytest.mark.parametrize("name", ["resnet20", "gru", "transformer"])
def test_parts_share_no_input(networks: Any, name: str) -> None:
    ranges = [set(range(*networks.PARTS[part])) for part in networks.PARTS]
    assert sum(map(len, ranges)) == len(set().union(*ranges)) == 1797
    parts = {part: networks.NETWORKS[name].inputs(part, 16).reshape(16, -1) for part in networks.PARTS}
    for left, right in (("calibration", "held-out"), ("statistics", "held-out"), ("statistics", "calibration")):
        assert not (parts[left][:, None] == parts[right][None]).all(2).any()
    assert np.array_equal(parts["held-out"], networks.NETWORKS[name].inputs("held-out", 16).reshape(16, -1))

"""No library moves unless the golden networks keep their accuracy, their numbers and their operators."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.golden.golden_kit import ANDROID, HERE, LIBRARIES, NETWORKS, ROADS, check, complaints, digits, load_record

ROOT = HERE.parent.parent


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.parametrize("road", [name for name, road in ROADS.items() if road.to == "onnx"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_road_to_onnx_has_lost_nothing(name: str, road: str, tmp_path: Path) -> None:
    assert check(name, road, tmp_path) == []


def test_the_constraints_hold_the_versions_that_the_record_was_made_with() -> None:
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    pinned = dict(re.findall(r"^([\w-]+)==(\S+)$", text, re.MULTILINE))
    recorded = load_record()["versions"]
    assert {name: pinned[name] for name in LIBRARIES + ANDROID} == recorded, "move a version only together with the record: make goldens"


def test_the_record_holds_every_network_and_road_and_none_is_bad() -> None:
    networks = load_record()["networks"]
    assert set(networks) == set(NETWORKS)
    for roads in networks.values():
        assert set(roads) == {*ROADS, "torch"}
        assert roads["torch"]["accuracy"] > 0.9
        assert all(roads[road]["accuracy"] > roads["torch"]["accuracy"] - 0.02 for road in ROADS)
    assert sum(path.stat().st_size for path in HERE.iterdir() if path.is_file()) < 1_500_000


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"accuracy": 0.9}, "accuracy 0.9000, recorded 0.9900"),
        ({"ops": {"Conv": 3, "Transpose": 2}}, "2 layout operators, recorded 1"),
        ({"ops": {"Conv": 4, "Transpose": 1}}, r"5 operators, recorded 4; more of: \{'Conv': 1\}"),
        ({"outputs": np.full((4, 10), 1.5)}, "signal to error"),
    ],
)
def test_what_is_lost_is_told(change: dict[str, Any], text: str) -> None:
    reference = np.random.default_rng(0).standard_normal((4, 10))
    recorded = {"accuracy": 0.99, "sqnr_db": 40.0, "ops": {"Conv": 3, "Transpose": 1}}
    good = {"accuracy": 0.985, "outputs": reference * 1.0101, "ops": {"Conv": 3, "Transpose": 1}}
    assert complaints("onnx u8s8", recorded, reference, good) == []
    said = complaints("onnx u8s8", recorded, reference, good | change)
    assert re.search(text, " ".join(said))
    assert "largest error" in complaints("onnx fp32", recorded, reference, good)[0]
    assert bool(complaints("onnx u8s8", recorded, reference, good | change, exact=False)) is ("ops" in change)


def test_the_stored_outputs_are_those_of_the_test_split() -> None:
    stored, labels = load_file(HERE / "outputs.safetensors"), digits().test_labels
    for name in NETWORKS:
        assert (stored[name].argmax(1) == labels[: len(stored[name])]).mean() > 0.9

"""The golden networks on the roads to TFLite, whose packages are too large for `make test`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.golden.golden_kit import NETWORKS, ROADS, check

pytestmark = [pytest.mark.torch, pytest.mark.environments]


@pytest.mark.parametrize("road", [name for name, road in ROADS.items() if road.to == "tflite"])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_road_to_tflite_has_lost_nothing(name: str, road: str, tmp_path: Path) -> None:
    assert check(name, road, tmp_path) == []

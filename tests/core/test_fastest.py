"""The fastest of several roads: measured side by side on the null target, wrong and refused ones named, never a guess."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekd.conversion.fastest import Fastest, fastest
from edgekd.errors import ConfigError, ConversionRejected, MeasurementInvalid, UnsupportedModel
from edgekd.target import connect
from tests.core.convert_plugin import install_converters

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

DATA = np.random.default_rng(0).standard_normal((8, 6)).astype(np.float32)
SLOW, QUICK = ("fake-onnx-from-linear-slow",), ("fake-onnx-from-linear",)
WRONG, NEVER, ELSEWHERE = ("fake-onnx-from-linear-wrong",), ("fake-onnx-from-linear-never",), ("fake-onnx-from-linear-elsewhere",)
FAILING = {"environment": "failed", "model": "failed", "config": "failed", "runner": "failed", "missing": "not ready"}


@pytest.fixture(autouse=True)
def converters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {"": "", "_slow": "Slow", "_wrong": "Wrong", "_never": "Never", "_elsewhere": "Elsewhere"}
    known = {f"fake_onnx_from_linear{end}": f"LinearToOnnx{kind}" for end, kind in names.items()}
    failing = {f"fake_failing_{kind}": f"Failing{kind.title()}" for kind in FAILING}
    install_converters(tmp_path / "plugin", monkeypatch, **known, **failing)


def linear() -> Any:
    torch.manual_seed(0)
    return torch.nn.Linear(6, 3)


def tried(out: Path, *roads: tuple[str, ...], **given: Any) -> Fastest:
    return fastest(linear(), "onnx", **{"target": "null", "out": out, "roads": roads, "example": DATA, "progress": False, **given})


def test_the_fastest_of_two_roads_is_written_and_both_are_in_the_table(tmp_path: Path) -> None:
    found = tried(tmp_path / "m.onnx", SLOW, QUICK)
    assert [(road.route, road.outcome) for road in found.roads] == [(QUICK, "fastest"), (SLOW, "slower")]
    first, second = (road.latency_ms for road in found.roads)
    assert first is not None
    assert second is not None
    assert first < second
    assert (found.conversion.route, found.conversion.out) == (QUICK, str(tmp_path / "m.onnx"))
    assert found.conversion.passed
    found.conversion.stored.verify()
    assert (found.target, found.simulated, found.percentile) == ("null", "null", 50.0)
    assert Fastest.from_json(found.to_json()) == found


def test_a_road_that_differs_one_that_is_refused_and_one_that_is_not_ready_are_named(tmp_path: Path) -> None:
    found = tried(tmp_path / "folder", WRONG, SLOW, NEVER, ELSEWHERE)
    assert found.conversion.route == SLOW
    outcomes = {road.route: (road.outcome, road.reason) for road in found.roads}
    assert outcomes[SLOW] == ("fastest", "")
    assert outcomes[WRONG][0] == "differs"
    assert "output" in outcomes[WRONG][1]
    assert outcomes[NEVER] == ("refused", "the operator Linear is too square")
    assert outcomes[ELSEWHERE] == ("not ready", 'pip install "edgekd[x86]"')
    assert (tmp_path / "folder" / "artifact.json").is_file()


def test_nothing_is_written_where_every_road_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConversionRejected, match="too square"):
        tried(tmp_path / "m.onnx", WRONG, NEVER)
    with pytest.raises(ConfigError, match="edgekd\\[x86\\]"):
        tried(tmp_path / "m.onnx", ELSEWHERE)
    assert not (tmp_path / "m.onnx").exists()


def test_a_road_that_fails_in_another_way_leaves_the_others_alone(tmp_path: Path) -> None:
    found = tried(tmp_path / "m.onnx", *((f"fake-failing-{kind}",) for kind in FAILING), QUICK)
    assert found.conversion.route == QUICK
    rows = {road.route[0].removeprefix("fake-failing-"): road for road in found.roads[1:]}
    assert {kind: road.outcome for kind, road in rows.items()} == FAILING
    assert "edgekd env create onnx2tf" in rows.pop("missing").reason
    for kind, road in rows.items():
        assert f"the {kind} is at fault" in road.reason


def test_the_reasons_of_every_road_are_told_where_none_is_left(tmp_path: Path) -> None:
    with pytest.raises(ConversionRejected, match=r"model is at fault.*config is at fault.*too square"):
        tried(tmp_path / "m.onnx", ("fake-failing-model",), ("fake-failing-config",), NEVER)
    with pytest.raises(ConfigError, match=r"^a torch module needs example inputs"):  # wrong for every road: told as it is
        tried(tmp_path / "m.onnx", QUICK, SLOW, example=None)


def test_what_convert_takes_reaches_every_road(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'logits'.*allowed: output"):
        tried(tmp_path / "m.onnx", QUICK, SLOW, outputs=("logits",))
    kept = tried(tmp_path / "m.onnx", QUICK, SLOW, outputs=("output",), max_transposes=0)
    assert [road.outcome for road in kept.roads] == ["fastest", "slower"]
    with pytest.raises(ConfigError, match=r"no road takes: 'fake-onnx-from-liner'.*fake-onnx-from-linear"):
        tried(tmp_path / "m.onnx", QUICK, SLOW, options={"fake-onnx-from-liner": {"a": 1}})


def test_a_disturbed_measurement_is_no_choice(tmp_path: Path) -> None:
    with connect("null", overrides=("measure.limits.spread_max=1.0001",)) as live, pytest.raises(MeasurementInvalid, match="not known") as refused:
        tried(tmp_path / "m.onnx", SLOW, QUICK, target=live)
    assert refused.value.exit_code == 2
    assert not (tmp_path / "m.onnx").exists()


def test_wrong_requests_are_refused(tmp_path: Path) -> None:
    out = tmp_path / "m.onnx"
    with pytest.raises(ConfigError, match="once each"):
        tried(out, QUICK, QUICK)
    with pytest.raises(ConfigError, match="fake-onnx-from-nothing"):
        tried(out, ("fake-onnx-from-nothing",))
    with pytest.raises(UnsupportedModel, match="does not run tflite"):
        fastest(linear(), "tflite", target="null", out=out, example=DATA, progress=False)

"""An ONNX file on a target for TFLite files: refused before anything is measured, with the road named."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgekd.errors import ConfigError
from edgekd.quantize_only import quantize_only
from edgekd.records import Budget
from edgekd.target import connect
from tests.pipeline.bundle_kit import home


def test_quantize_only_on_a_litert_target_names_the_road_and_leaves_no_stage(tmp_path: Path) -> None:
    overrides = (f"transport.workdir={tmp_path / 'device'}", f"runtime.options.lock={tmp_path / 'lock'}")
    with connect("litert-local", overrides=overrides) as live, pytest.raises(ConfigError, match="takes tflite files") as raised:
        quantize_only(home() / "net.onnx", home() / "data", target=live, budget=Budget(latency_ms=1.0), run_dir=tmp_path / "run", progress=False)
    assert "tflite-from-onnx" in str(raised.value)
    assert not list((tmp_path / "run" / "stages").iterdir())

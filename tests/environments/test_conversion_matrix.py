"""The command that makes the conversion matrix, run for one network: it fills cells, says why not, times, and goes on where it stopped."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.torch, pytest.mark.environments]

ROOT = Path(__file__).resolve().parents[2]
KINDS = ("onnx-fp32", "onnx-int8", "tflite-dynamic", "onnx-tf-fp32")
QUICK = (
    *(f"measure.{grade}.launch.{name}" for grade in ("screen", "verdict") for name in ("warmup_min_s=0.01", "warmup_max_s=0.05", "min_time_s=0.01")),
    *(f"measure.limits.{name}=off" for name in ("cpu_share_min", "steal_max", "sentinel_drift_max", "spread_max", "frequency_drop_max")),
)
"""Short launches that all count: the command is tested here, and not how still this machine is."""


def command(folder: Path, home: Path | None, *words: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, str(ROOT / "benchmarks" / "conversion_matrix.py"), "--run-dir", str(folder / "run"), "--out", str(folder / "out"), *words]
    if home is not None:
        line += ["--environments", str(home)]
    overrides = (*QUICK, f"transport.workdir={folder / 'device'}", f"runtime.options.lock={folder / 'lock'}")
    variables = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([*line, *(part for one in overrides for part in ("--set", one))], env=variables, capture_output=True, text=True, timeout=600)


def test_one_network_goes_through_the_whole_command(tmp_path: Path, need: Any, home: Path | None) -> None:
    need("onnx-tf")
    asked = ("--only", "gru", "--missing", *(word for kind in KINDS for word in ("--only-format", kind)))
    done = command(tmp_path, home, *asked)
    assert done.returncode == 1, done.stderr
    results = json.loads((tmp_path / "out" / "matrix.json").read_text(encoding="utf-8"))
    cells = {cell["kind"]: cell for cell in results["cells"]}
    assert {kind: cell["status"] for kind, cell in cells.items()} == {kind: "refused" if kind == "onnx-tf-fp32" else "ok" for kind in KINDS}, done.stderr
    assert "linear_before_reset" in cells["onnx-tf-fp32"]["reason"]
    floors = {"onnx-fp32": 110.0, "onnx-int8": 30.0, "tflite-dynamic": 30.0}
    for kind, floor in floors.items():
        (tensor,) = cells[kind]["parity"]["tensors"]
        assert floor < tensor["sqnr_db"] < 200.0
        assert cells[kind]["parity"]["samples"] == 64
    latencies = {kind: one["p50_ms"] for screen in results["screens"] for kind, one in screen["latencies"].items()}
    assert sorted(latencies) == sorted(floors)
    assert all(value > 0 for value in latencies.values())
    page = (tmp_path / "out" / "matrix.md").read_text(encoding="utf-8")
    assert "Of 108 cells 3 are ok, 0 differ, 1 are refused, 104 are missing." in page
    assert "still missing" in done.stderr
    again = command(tmp_path, home, *asked)
    assert "gru onnx-fp32" not in again.stderr
    assert json.loads((tmp_path / "out" / "matrix.json").read_text(encoding="utf-8"))["screens"] == results["screens"]
    assert json.loads((tmp_path / "out" / "matrix.json").read_text(encoding="utf-8"))["cells"] == results["cells"]

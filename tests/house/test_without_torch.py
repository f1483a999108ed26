"""Life without torch: the first hour's commands on the machine at hand, in an interpreter that has no torch to import."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest

from edgekd.bundle import open_bundle
from tests.pipeline.bundle_kit import bundle_copy, home, interpreter, save_inputs, shell

QUICK = (
    "measure.verdict.launch.warmup_min_s=0.05",
    "measure.verdict.launch.warmup_max_s=0.1",
    "measure.verdict.launch.min_time_s=0.05",
    "measure.verdict.launches=3",
    "measure.verdict.step=2",
    "measure.verdict.max_launches=5",
    "measure.screen.launch.warmup_min_s=0.05",
    "measure.screen.launch.warmup_max_s=0.1",
)
"""The shipped protocol takes minutes; this one shows that the road is whole."""

CALM = tuple(
    f"measure.limits.{name}=off" for name in ("cpu_share_min", "steal_max", "sentinel_drift_max", "spread_max", "frequency_drop_max", "temperature_rise_max_c")
)
"""Every launch counts, so that these tests say the same on a busy machine."""


@pytest.fixture(scope="module")
def python() -> Path:
    return interpreter("onnx", "onnxruntime")


def settings(*items: str) -> list[str]:
    return [word for item in (*QUICK, *items) for word in ("--set", item)]


def test_interpreter_has_no_torch(python: Path) -> None:
    code = "import importlib.util as u, edgekd; print([u.find_spec(name) is None for name in ('torch', 'tensorflow', 'sklearn', 'lightning_fabric')])"
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[True, True, True, True]"


@pytest.mark.parametrize("command", [("--help",), ("--version",), ("targets",), ("doctor",), ("profile", "show", "local"), ("runs",), ("cache", "ls")])
def test_command_runs_without_torch(python: Path, command: tuple[str, ...], tmp_path: Path) -> None:
    done = shell(python, *command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_help_needs_nothing_but_the_base(tmp_path: Path) -> None:
    start = time.perf_counter()
    done = shell(interpreter(), "--help", cwd=tmp_path)
    print(f"edgekd --help: {time.perf_counter() - start:.2f} s")
    assert (done.returncode, "quantize" in done.stdout, done.stderr) == (0, True, "")


@pytest.mark.parametrize(("command", "extra"), [(("demo",), "distill"), (("compress", "job.toml"), "distill")])
def test_command_that_trains_names_the_line_that_installs_torch(python: Path, command: tuple[str, ...], extra: str, tmp_path: Path) -> None:
    for name in ("train", "validation", "test"):
        save_inputs(tmp_path / name)
    (tmp_path / "own.py").write_text("def make_net():\n    import torch\n")
    (tmp_path / "job.toml").write_text(
        f'teacher = "{home()}/net.onnx"\ntarget = "null"\n[data]\ntrain = "train"\nvalidation = "validation"\ntest = "test"\n'
        '[budget]\nlatency_share = 0.5\n[student]\nfixed = "own:make_net"\n'
    )
    done = shell(python, *command, cwd=tmp_path)
    assert done.returncode == 3
    assert f'pip install "edgekd[{extra}]"' in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_bench_prints_clocks_and_conditions_on_the_local_target(python: Path, tmp_path: Path) -> None:
    done = shell(python, "bench", home() / "net.onnx", "--inputs", home() / "data", *settings(*CALM), cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    for part in ("p50", "p90", "p99", "initialization", "first inference", "device", "runtime", "threads", "precision", "fp32", "launches"):
        assert part in done.stdout, part
    assert "SIMULATED" not in done.stdout


@pytest.mark.slow
def test_quantize_only_ends_in_a_bundle_on_the_local_target(python: Path, tmp_path: Path) -> None:
    data = save_inputs(tmp_path / "data")
    np.save(data / "targets.npy", np.random.default_rng(0).integers(0, 4, 150))
    options = ["--latency-ms", "10000", "--allow-extreme", "--max-drop", "0.9", "--run-dir", tmp_path / "run", "--json", *settings(*CALM)]
    done = shell(python, "compress", "--quantize-only", home() / "net.onnx", "--data", data, *options, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    body = json.loads(done.stdout)
    assert (body["verdict"]["outcome"], body["verdict"]["simulated"]) == ("pass", "")
    assert {row["stage"] for row in body["ledger"]["rows"]} >= {"baseline", "quantize", "validate"}
    manifest = open_bundle(tmp_path / "run" / "bundle").manifest
    assert "torch" not in manifest.versions
    assert manifest.profile.name == "local"


@pytest.mark.slow
def test_quantize_only_never_fails_for_noise_on_the_local_target(python: Path, tmp_path: Path) -> None:
    options = ["--latency-ms", "10000", "--allow-extreme", "--max-drop", "0.9", "--run-dir", tmp_path / "run", *settings()]
    done = shell(python, "compress", "--quantize-only", home() / "net.onnx", "--data", home() / "data", *options, cwd=tmp_path)
    assert done.returncode in (0, 2), done.stdout + done.stderr
    if not (tmp_path / "run" / "run.json").is_file():
        assert "could not be measured" in done.stderr  # too busy for a reference: a refuse before there is an artifact


def test_gate_and_validate_judge_a_bundle_without_torch(python: Path, tmp_path: Path) -> None:
    bundle = bundle_copy(tmp_path / "bundle")
    for command, options, code in (("gate", [], 2), ("gate", ["--accept-simulated"], 0), ("validate", ["--accept-simulated"], 0)):
        done = shell(python, command, bundle, *options, cwd=tmp_path)
        assert done.returncode == code, done.stderr

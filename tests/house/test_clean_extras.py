"""Each extra alone is enough for what it is for: tried in an interpreter that has nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from edgekd import extras
from edgekd.testing.tflite_models import two_headed_tflite
from tests.pipeline.bundle_kit import home, interpreter, shell

NET = """
import torch


def make():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 3))
"""

pytestmark = [pytest.mark.slow, pytest.mark.installs]


def python(*names: str) -> Path:
    """An interpreter with edgekd and these extras."""
    declared = extras.declared_extras()
    return interpreter(*(re.split(r"[<>=;\s]", text)[0] for name in names for text in declared[name]))


def net(folder: Path) -> Path:
    """A module of a torch network, and a folder of its inputs."""
    (folder / "own_net.py").write_text(NET, encoding="utf-8")
    (folder / "inputs").mkdir()
    np.save(folder / "inputs" / "inputs.npy", np.random.default_rng(0).standard_normal((8, 1, 8, 8)).astype(np.float32))
    return folder / "inputs"


@pytest.mark.parametrize(("extra", "scheme"), [("x86", "u8s8_reduced"), ("jetson", "s8s8_tensorrt")])
def test_onnx_is_quantized_and_compared(extra: str, scheme: str, tmp_path: Path) -> None:
    words = ("convert", home() / "net.onnx", "--precision", "int8", "--scheme", scheme, "--calibration", home() / "data", "-o", "int8.onnx")
    done = shell(python(extra), *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "int8.onnx").is_file()


def test_litert_alone_runs_a_tflite_file(tmp_path: Path) -> None:
    model = two_headed_tflite(tmp_path / "model", batch=1)
    done = shell(python("litert"), "convert", model.entry, "--to", "tflite", "-o", "same.tflite", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    done = shell(python("litert"), "doctor", "litert-local", cwd=tmp_path)
    assert (done.returncode, "is ready" in done.stdout) == (0, True), done.stderr


@pytest.mark.torch
def test_torch_is_exported_with_distill_and_x86(tmp_path: Path) -> None:
    done = shell(python("distill", "x86"), "convert", "own_net:make", "--inputs", net(tmp_path), "-o", "net.onnx", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "within tolerance" in done.stderr

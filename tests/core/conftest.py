"""Subjects for the tests on measuring: artifacts that nothing runs."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from edgekd.artifact import store_artifact
from edgekd.measuring.measure import Subject
from edgekd.records import Format, IOSpec, Precision, TensorSpec


@pytest.fixture
def subjects(tmp_path: Path) -> Callable[..., list[Subject]]:
    spec = IOSpec(inputs=(TensorSpec(name="x", dtype="float32", shape=(1, 2)),), outputs=(TensorSpec(name="y", dtype="float32", shape=(1, 2)),))

    def make(*labels: str) -> list[Subject]:
        out = []
        for label in labels:
            folder = tmp_path / label
            folder.mkdir(exist_ok=True)
            (folder / "model.onnx").write_bytes(label.encode())
            artifact = store_artifact(folder, "model.onnx", format=Format.ONNX, precision=Precision.FP32, iospec=spec)
            out.append(Subject(label, artifact, {"x": np.zeros((1, 2), dtype=np.float32)}))
        return out

    return make

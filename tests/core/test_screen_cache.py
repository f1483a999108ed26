"""Measurements that were screened together are cached together: what a process that stopped half way left is completed, not measured again."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgekd.artifact import StoredArtifact, store_artifact
from edgekd.errors import StorageError
from edgekd.measure import Screened, Subject, screen
from edgekd.records import Format, IOSpec, Limits, Precision, TensorSpec
from edgekd.target import connect


def scaling(folder: Path, factor: float) -> StoredArtifact:
    """The smallest of models: x times a factor."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    shape = (1, 8)
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", "y")]
    constant = numpy_helper.from_array(np.asarray(factor, dtype=np.float32), "factor")
    graph = helper.make_graph([helper.make_node("Mul", ["x", "factor"], ["y"], name="mul")], "net", values[:1], values[1:], [constant])
    folder.mkdir()
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    onnx.checker.check_model(model)
    x, y = (TensorSpec(name=name, dtype="float32", shape=shape) for name in ("x", "y"))
    return store_artifact(folder, "model.onnx", format=Format.ONNX, precision=Precision.FP32, iospec=IOSpec(inputs=(x,), outputs=(y,)), opset=20, producers={})


def screened(models: list[StoredArtifact], cache: Path) -> dict[str, Screened]:
    subjects = [Subject(f"net {position}", model, {"x": np.ones((2, 8), dtype=np.float32)}) for position, model in enumerate(models)]
    with connect("null") as live:
        return screen(live, subjects, percentile=50.0, limits=Limits(), seed=3, cache_dir=cache)


def test_screen_that_stopped_between_two_files_is_completed_and_not_taken_again(tmp_path: Path) -> None:
    models = [scaling(tmp_path / f"model-{position}", 1.0 + position) for position in range(3)]
    whole = screened(models, tmp_path / "whole")
    files = sorted(path.name for path in (tmp_path / "whole" / "screen").iterdir())
    assert len(files) == 3
    for stopped in files:
        cache = tmp_path / f"cut-{stopped}"
        (cache / "screen" / stopped).mkdir(parents=True)  # nothing can be written there
        with pytest.raises(StorageError):
            screened(models, cache)
        (cache / "screen" / stopped).rmdir()
        again = screened(models, cache)
        assert sorted(path.name for path in (cache / "screen").iterdir()) == files
        for label, one in whole.items():
            assert again[label].measurement.launches == one.measurement.launches
            assert (again[label].latency_ms, again[label].lower_ms, again[label].upper_ms) == (one.latency_ms, one.lower_ms, one.upper_ms)

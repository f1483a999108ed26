"""Models with state on the bench: per step with the state fed back, from a folder; refused by the input's name where that is not possible."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from edgekd.benching import bench
from edgekd.cli.main import cli
from edgekd.errors import BundleError, DataError, ModelError, UnsupportedModel
from edgekd.measuring.launching import Bench, Subject
from edgekd.quantize_only import quantize_only
from edgekd.records import Budget, Limits
from edgekd.target import connect
from edgekd.testing import QUICK_PROTOCOL, remembering


def folder_of(tmp_path: Path) -> Path:
    artifact = remembering(tmp_path / "model", 1)
    artifact.record.save(artifact.folder / "artifact.json")
    return artifact.folder


def test_bench_takes_an_artifact_folder_and_only_the_steps_inputs(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    (tmp_path / "data").mkdir()
    np.save(tmp_path / "data" / "x.npy", np.zeros((2, 3), np.float32))
    with connect("null") as live:
        result = bench(folder, target=live, inputs=tmp_path / "data")
        assert result.iospec.state_inputs == ("memory",)
        assert result.measurement.valid
        with pytest.raises(DataError, match="x"):
            bench(folder, target=live, inputs=tmp_path / "model")
        (folder / "model.onnx").write_bytes(b"changed")
        with pytest.raises(BundleError, match=r"model\.onnx"):
            bench(folder, target=live)
        with pytest.raises(ModelError, match=r"artifact\.json"):
            bench(tmp_path / "data", target=live)


def test_the_command_says_that_the_state_is_fed_back(tmp_path: Path) -> None:
    said = CliRunner().invoke(cli, ["bench", str(folder_of(tmp_path)), "--target", "null"])
    assert said.exit_code == 0, said.output
    assert "per step, state fed back (memory)" in said.output


def test_a_target_that_feeds_nothing_back_refuses_the_state_by_name(tmp_path: Path) -> None:
    artifact = remembering(tmp_path, 1)
    with connect("null") as live:
        live.capabilities = msgspec.structs.replace(live.capabilities, state=False)
        with pytest.raises(UnsupportedModel, match="does not feed a state back") as refused:
            Bench(live, {"m": Subject("m", artifact, {"x": np.zeros((1, 3), np.float32)})}, QUICK_PROTOCOL, Limits(), 0)
    assert refused.value.subject == "memory"


def test_a_model_with_state_is_not_compressed(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    from edgekd.models.notes import notes_text
    from edgekd.models.onnx_artifact import set_notes

    artifact = remembering(tmp_path / "model", 1)
    model = onnx.load(str(artifact.entry))
    set_notes(model, notes_text(artifact.record.iospec, artifact.record.precision))
    onnx.save(model, str(tmp_path / "m.onnx"))
    (tmp_path / "data").mkdir()
    with connect("null") as live, pytest.raises(ModelError, match="not compressed") as refused:
        quantize_only(
            tmp_path / "m.onnx", data=tmp_path / "data", target=live, budget=Budget(latency_ms=1.0, percentile=50, max_drop=0.1), run_dir=tmp_path / "r"
        )
    assert refused.value.subject == "memory"

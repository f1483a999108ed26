"""Measuring a TFLite file: its own bytes, its names, and refusals that name what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgekd.benching import bench
from edgekd.errors import ModelError, UnsupportedModel
from edgekd.models.model_file import format_of, import_model
from edgekd.records import Format, Precision
from edgekd.target import connect
from edgekd.testing.tflite_models import HandOp, HandTensor, hand_made, two_headed_tflite


@pytest.mark.slow
def test_bench_takes_a_tflite_file_as_it_is_and_says_what_the_runtime_says(tmp_path: Path) -> None:
    model = two_headed_tflite(tmp_path)
    with connect("litert-local", overrides=[f"transport.workdir={tmp_path / 'device'}", f"runtime.options.lock={tmp_path / 'lock'}"]) as live:
        result = bench(model.entry, target=live)
    assert [(item.name, item.shape) for item in result.iospec.inputs] == [("a", (1, 4)), ("b", (1, 2))]
    assert result.precision is Precision.FP32
    assert result.note.startswith("XNNPACK runs all 5 operators")
    assert result.op_times == ()
    launches = (*result.measurement.launches, *result.measurement.rejected)
    assert launches
    assert all(launch.samples_ns for launch in launches)


def test_bench_refuses_a_tflite_file_on_a_target_for_onnx_and_files_that_are_none(tmp_path: Path) -> None:
    model = two_headed_tflite(tmp_path / "whole")
    (tmp_path / "cut.tflite").write_bytes(model.entry.read_bytes()[:300])
    (tmp_path / "text.tflite").write_text("no model")
    with connect("null") as live:
        with pytest.raises(UnsupportedModel, match="takes onnx"):
            bench(model.entry, target=live)
        for name in ("cut", "text"):
            with pytest.raises(ModelError, match=name):
                bench(tmp_path / f"{name}.tflite", target=live)


def test_the_file_stays_as_it_is_and_an_open_first_axis_counts_as_one(tmp_path: Path) -> None:
    model = two_headed_tflite(tmp_path / "open", "batch", signature=False)
    taken = import_model(model.entry, tmp_path / "taken")
    assert taken.entry.read_bytes() == model.entry.read_bytes()
    assert (taken.record.format, format_of(taken.entry)) == (Format.TFLITE, Format.TFLITE)
    assert [(item.name, item.shape) for item in taken.record.iospec.outputs] == [("heads.gate", (1, 3)), ("heads.total", (1,))]


def test_another_open_axis_is_refused(tmp_path: Path) -> None:
    tensors = [HandTensor(name, (1, "steps")) for name in ("x", "y")]
    path = tmp_path / "steps.tflite"
    path.write_bytes(hand_made(tensors, [HandOp("ADD", ("x", "x"), ("y",))], ["x"], ["y"]))
    with pytest.raises(ModelError, match="dynamic"):
        import_model(path, tmp_path / "taken")

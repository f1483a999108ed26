"""TFLite files without TensorFlow: read, named, annotated, packed with aligned weights, and refused when they are not whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import ai_edge_litert.schema_py_generated as schema
import numpy as np
import pytest

from edgekd.errors import DataError, ModelError
from edgekd.models.layout import LayoutOps, layout_ops
from edgekd.models.tflite_artifact import annotate_tflite, fit_layouts, import_tflite, read_notes
from edgekd.models.tflite_file import (
    depth_of,
    ensure_signature,
    iospec_of,
    load_model,
    named_ops,
    op_counts,
    pack_model,
    parse_model,
    precision_of,
    read_graph,
    read_metadata,
    set_metadata,
    unique_tensor_names,
)
from edgekd.records import IOSpec, Precision, TensorSpec

WEIGHT = np.arange(6, dtype=np.float32).reshape(2, 3) / 10


def tensor(name: bytes, shape: list[int], buffer: int = 0, type_: int = 0, signature: list[int] | None = None) -> Any:
    return schema.TensorT(name=name, shape=shape, buffer=buffer, type=type_, hasRank=True, shapeSignature=signature)


def dense() -> Any:
    """A transposition and a fully connected layer, written by hand; two tensors share a name."""
    codes = [schema.BuiltinOperator.FULLY_CONNECTED, schema.BuiltinOperator.TRANSPOSE]
    tensors = [
        tensor(b"x", [3, 1]),
        tensor(b"w", [2, 3], buffer=1),
        tensor(b"t", [1, 3]),
        tensor(b"y", [1, 2]),
        tensor(b"w", [2], buffer=2, type_=schema.TensorType.INT32),
    ]
    graph = schema.SubGraphT(
        name=b"main",
        tensors=tensors,
        inputs=[0],
        outputs=[3],
        operators=[
            schema.OperatorT(opcodeIndex=1, inputs=[0, 4], outputs=[2], builtinOptionsType=schema.BuiltinOptions.TransposeOptions),
            schema.OperatorT(
                opcodeIndex=0,
                inputs=[2, 1, -1],
                outputs=[3],
                builtinOptionsType=schema.BuiltinOptions.FullyConnectedOptions,
                builtinOptions=schema.FullyConnectedOptionsT(),
            ),
        ],
    )
    graph.operators[0].builtinOptions = schema.TransposeOptionsT()
    buffers = [schema.BufferT()] + [schema.BufferT(data=np.frombuffer(array.tobytes(), dtype=np.uint8)) for array in (WEIGHT, np.array([1, 0], dtype=np.int32))]
    return schema.ModelT(
        version=3,
        operatorCodes=[schema.OperatorCodeT(builtinCode=code, deprecatedBuiltinCode=code, version=1) for code in codes],
        subgraphs=[graph],
        buffers=buffers,
        description=b"by hand",
    )


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "dense.tflite"
    path.write_bytes(pack_model(dense()))
    return path


def test_a_file_is_read_into_operators_tensors_and_counts(file: Path) -> None:
    model = load_model(file)
    graph = read_graph(model)
    assert [(op.kind, op.name) for op in graph.ops] == [("TRANSPOSE", "t"), ("FULLY_CONNECTED", "y")]
    assert list(graph.inputs) == ["x"]
    assert graph.outputs["y"].shape == (1, 2)
    assert [item.constant for item in graph.tensors] == [False, True, False, False, True]
    assert op_counts(model) == {"FULLY_CONNECTED": 1, "TRANSPOSE": 1}
    assert layout_ops(named_ops(model)) == LayoutOps(moving=("t",), renaming=())
    assert depth_of(graph) == 1
    assert [item.name for item in graph.activations()] == ["x", "t", "y"]
    assert precision_of(graph) is Precision.FP32


def test_a_packed_model_is_stable_and_its_weights_are_aligned() -> None:
    model = dense()
    first = pack_model(model)
    again = parse_model(first)
    assert pack_model(model) == first
    assert pack_model(again) == first
    place = first.index(WEIGHT.tobytes())
    assert place % 16 == 0
    np.testing.assert_array_equal(again.buffers[1].data.view(np.float32), WEIGHT.reshape(-1))


@pytest.mark.parametrize("kept", [0, 3, 8, 40, 0.3, 0.6, 0.9])
def test_a_file_that_is_cut_off_is_refused(file: Path, kept: float) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: int(kept if kept > 1 else kept * len(data))])
    with pytest.raises(ModelError, match="convert it again"):
        read_graph(load_model(file))


def with_weights_outside() -> bytes:
    """The model with its weights behind the flatbuffer, found by offset and size, as large files have them."""
    from ai_edge_litert.tools import flatbuffer_utils

    model = dense()
    model.buffers[1] = schema.BufferT(offset=1, size=1)
    data = flatbuffer_utils.convert_object_to_bytearray(model)
    data += bytes(-len(data) % 16)
    place = len(data)
    data = bytearray(data)
    flatbuffer_utils.update_packed_buffer(schema.Model.GetRootAs(data).Buffers(1), offset=place, size=WEIGHT.nbytes)
    return bytes(data) + WEIGHT.tobytes()


def test_weights_behind_the_flatbuffer_are_read_and_packed_inside() -> None:
    data = with_weights_outside()
    model = parse_model(data)
    assert pack_model(model) == pack_model(dense())
    assert read_graph(model).tensors[1].constant
    with pytest.raises(ModelError, match="behind the end of the file"):
        parse_model(data[:-1])


def test_what_is_no_tflite_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"0123TFL4" + b"x" * 100)
    with pytest.raises(ModelError, match="identifier"):
        load_model(tmp_path / "text")
    with pytest.raises(ModelError, match="cannot be read"):
        load_model(tmp_path / "absent")


def test_metadata_is_added_and_replaced() -> None:
    model = dense()
    set_metadata(model, {"labels": b"cat\ndog", "other": b"1"})
    model = parse_model(pack_model(model))
    set_metadata(model, {"labels": b"bird"})
    assert read_metadata(parse_model(pack_model(model))) == {"labels": b"bird", "other": b"1"}
    np.testing.assert_array_equal(model.buffers[1].data.view(np.float32), WEIGHT.reshape(-1))


def test_tensor_names_become_unique_and_a_signature_is_added() -> None:
    model = dense()
    assert unique_tensor_names(model) == 1
    assert unique_tensor_names(model) == 0
    assert [item.name for item in read_graph(model).tensors] == ["x", "w", "t", "y", "w_2"]
    assert (ensure_signature(model), ensure_signature(model)) == (1, 0)
    graph = read_graph(parse_model(pack_model(model)))
    assert (graph.signature, list(graph.inputs), list(graph.outputs)) == ("serving_default", ["x"], ["y"])


def test_an_imported_file_computes_in_the_runtime(file: Path, tmp_path: Path) -> None:
    made = import_tflite(file, tmp_path / "in")
    from ai_edge_litert.interpreter import Interpreter

    runner = Interpreter(model_path=str(made.entry), num_threads=1)
    x = np.array([[1.0], [2.0], [3.0]], dtype=np.float32)
    np.testing.assert_allclose(runner.get_signature_runner()(x=x)["y"], x.T @ WEIGHT.T, rtol=1e-6)
    assert made.record.precision is Precision.FP32
    assert json.loads(made.record.metadata["op_counts"]) == {"FULLY_CONNECTED": 1, "TRANSPOSE": 1}
    assert json.loads(made.record.metadata["tensors"]) == {"x": 3, "t": 3, "y": 2}
    assert json.loads(made.record.metadata["ops"]) == [["y", "FULLY_CONNECTED"]]


def test_a_dynamic_axis_is_refused_on_import(tmp_path: Path) -> None:
    model = dense()
    model.subgraphs[0].tensors[0].shapeSignature = [-1, 1]
    (tmp_path / "d.tflite").write_bytes(pack_model(model))
    assert iospec_of(read_graph(model)).inputs[0].shape == ("batch", 1)
    with pytest.raises(ModelError, match="dynamic"):
        import_tflite(tmp_path / "d.tflite", tmp_path / "in")


def test_notes_travel_in_the_file_and_survive_an_import(file: Path, tmp_path: Path) -> None:
    like = IOSpec(
        inputs=(TensorSpec(name="x", dtype="float32", shape=(3, 1), value_range=(0.0, 1.0), normalization="imagenet"),),
        outputs=(TensorSpec(name="y", dtype="float32", shape=(1, 2)),),
    )
    made = import_tflite(file, tmp_path / "in", like=like)
    noted = annotate_tflite(made, tmp_path / "noted", {"labels": "cat,dog"})
    assert noted.record.parent == made.record.content_hash()
    assert noted.record.files != made.record.files
    assert read_notes(load_model(noted.entry))["labels"] == "cat,dog"
    again = import_tflite(noted.entry, tmp_path / "again")
    assert again.record.iospec == made.record.iospec
    assert again.record.iospec.inputs[0].normalization == "imagenet"
    assert read_notes(load_model(again.entry))["labels"] == "cat,dog"


def test_layouts_are_fitted_both_ways_by_name() -> None:
    def spec(layout: str) -> IOSpec:
        return IOSpec(
            inputs=(TensorSpec(name="x", dtype="float32", shape=(1, 2, 3, 4), layout=layout),), outputs=(TensorSpec(name="y", dtype="float32", shape=(1,)),)
        )

    x = np.arange(48, dtype=np.float32).reshape(2, 2, 3, 4)
    last = fit_layouts({"x": x}, spec("NCHW"), spec("NHWC"))["x"]
    assert last.shape == (2, 3, 4, 2)
    np.testing.assert_array_equal(last, x.transpose(0, 2, 3, 1))
    np.testing.assert_array_equal(fit_layouts({"x": last}, spec("NHWC"), spec("NCHW"))["x"], x)
    assert fit_layouts({"x": x}, spec(""), spec("NHWC"))["x"] is x
    with pytest.raises(DataError, match="layout"):
        fit_layouts({"x": x}, spec("CHWN"), spec("NHWC"))

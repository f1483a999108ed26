"""Each planted fault is named: by diagnosis on callables, by bisection inside ONNX and TFLite files, by its hash for a cut file."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from edgekd.artifact import StoredArtifact, store_artifact
from edgekd.errors import BundleError, ConfigError, DataError, ModelError
from edgekd.parity.bisection import bisect, diagnose_files
from edgekd.parity.compare import compare_hop, compare_tensors, tolerance_for
from edgekd.parity.faults import Diagnosis, Fault, Normalization, diagnose, parse_normalization
from edgekd.parity.graph import graph_of, output_ranges
from edgekd.records import Format, IOSpec, Precision, TensorSpec
from edgekd.testing.tflite_models import HandOp, HandTensor, hand_made, store_hand_made

Arrays = Mapping[str, np.ndarray]
RNG = np.random.default_rng(0)
IMAGES = RNG.standard_normal((12, 3, 6, 6)).astype(np.float32)
IMAGENET = "mean=0.485,0.456,0.406 std=0.229,0.224,0.225"
MEAN, STD = (np.array(values).reshape(1, 3, 1, 1) for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
SPEC = TensorSpec(name="image", dtype="float32", shape=("batch", 3, 6, 6), layout="NCHW", normalization=IMAGENET)
WEIGHT = RNG.standard_normal((3 * 6 * 6, 5)) * 0.3
INT8 = Precision.INT8


def net(inputs: Arrays) -> dict[str, np.ndarray]:
    """A small nonlinear net; every pixel counts by its place."""
    (values,) = inputs.values()
    return {"logits": np.tanh(values.astype(np.float64).reshape(len(values), -1) @ WEIGHT * 0.05 + 0.1).astype(np.float32)}


def fed(alter: Callable[[np.ndarray], np.ndarray]) -> Callable[[Arrays], dict[str, np.ndarray]]:
    return lambda inputs: net({"image": alter(inputs["image"])})


def found(infer: Callable[[Arrays], Arrays], **options: Any) -> Diagnosis:
    return diagnose(net, infer, {"image": IMAGES}, specs=options.pop("specs", (SPEC,)), **options)


def buffer_read_as_nchw(image: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(image.transpose(0, 2, 3, 1)).reshape(image.shape)


@pytest.mark.parametrize(
    ("alter", "fault"),
    [
        (lambda image: image.swapaxes(2, 3), Fault.LAYOUT),
        (buffer_read_as_nchw, Fault.LAYOUT),
        (lambda image: (image - MEAN) / STD, Fault.TWICE),
        (lambda image: image * STD + MEAN, Fault.MISSING),
        (lambda image: (image * STD + MEAN) * 255, Fault.MISSING),
        (lambda image: image * 255, Fault.SCALE),
        (lambda image: image / 255, Fault.SCALE),
        (lambda image: image[:, ::-1], Fault.CHANNELS),
        (lambda image: image[::-1], Fault.BATCH),
        (lambda image: np.roll(image, 1, axis=0), Fault.BATCH),
    ],
)
def test_a_fault_of_the_input_is_named_and_no_other_one(alter: Callable[[np.ndarray], np.ndarray], fault: Fault) -> None:
    diagnosis = found(fed(alter))
    assert not diagnosis.parity.passed
    assert diagnosis.faults() == (fault,)
    assert diagnosis.annotated().findings[0].startswith(fault.value)


def test_a_double_normalisation_is_found_by_the_usual_values_when_none_is_recorded() -> None:
    diagnosis = found(fed(lambda image: (image - MEAN) / STD), specs=())
    assert diagnosis.faults() == (Fault.TWICE,)
    assert "imagenet" in diagnosis.findings[0].text


def test_a_double_normalisation_is_found_behind_the_noise_of_int8() -> None:
    def quantized(inputs: Arrays) -> dict[str, np.ndarray]:
        logits = net({"image": (inputs["image"] - MEAN) / STD})["logits"]
        return {"logits": np.round(logits * 127).astype(np.float32) / 127}

    assert found(quantized, precision=INT8).faults() == (Fault.TWICE,)


def test_agreement_and_an_unknown_cause_have_no_findings() -> None:
    assert found(net).parity.passed
    assert found(net).findings == ()
    unknown = found(lambda inputs: {"logits": net(inputs)["logits"][:, ::-1]})
    assert not unknown.parity.passed
    assert unknown.findings == ()


def test_a_fault_of_one_of_two_inputs_is_named_at_it_and_one_of_both_at_both() -> None:
    def both(inputs: Arrays) -> dict[str, np.ndarray]:
        return {"logits": net({"a": inputs["a"]})["logits"] + 2 * net({"b": inputs["b"]})["logits"]}

    inputs = {"a": IMAGES, "b": RNG.standard_normal(IMAGES.shape).astype(np.float32)}
    one = diagnose(both, lambda given: both({**given, "b": given["b"][:, ::-1]}), inputs)
    assert [(finding.fault, finding.tensor) for finding in one.findings] == [(Fault.CHANNELS, "b")]
    two = diagnose(both, lambda given: both({name: value / 255 for name, value in given.items()}), inputs)
    assert [(finding.fault, finding.tensor) for finding in two.findings] == [(Fault.SCALE, "a, b")]


@pytest.mark.parametrize("shape", [(4, 3, 8, 6), (4, 5, 5, 5)])
def test_a_swapped_layout_of_an_output_is_named_also_where_the_shapes_are_equal(shape: tuple[int, ...]) -> None:
    image = RNG.standard_normal(shape).astype(np.float32)
    diagnosis = diagnose(lambda inputs: {"y": image}, lambda inputs: {"y": image.transpose(0, 2, 3, 1)}, {"x": image})
    assert diagnosis.faults() == (Fault.LAYOUT,)
    row = diagnosis.parity.tensors[0]
    assert row.layout == "NHWC -> NCHW"
    assert "the outputs agree after NHWC -> NCHW: the layout was swapped" in row.reason


def test_nan_overflow_and_a_constant_output_are_told_apart() -> None:
    def spoilt(value: float, scale: float = 1.0) -> Diagnosis:
        def infer(inputs: Arrays) -> dict[str, np.ndarray]:
            logits = net(inputs)["logits"] * np.float32(scale)
            return {"logits": np.where(np.abs(logits) > 0.3 * scale, np.float32(value), logits)}

        reference = lambda inputs: {"logits": net(inputs)["logits"] * np.float32(scale)}  # noqa: E731
        return diagnose(reference, infer, {"image": IMAGES})

    assert spoilt(np.nan).faults() == (Fault.NOT_FINITE,)
    overflow = spoilt(np.inf, 1e6)
    assert overflow.faults() == (Fault.OVERFLOW,)
    assert "65504" in overflow.findings[0].text
    frozen = found(lambda inputs: {"logits": np.repeat(net(inputs)["logits"][:1], len(IMAGES), axis=0)})
    assert frozen.faults() == (Fault.CONSTANT,)


def test_nothing_to_run_on_is_an_error() -> None:
    with pytest.raises(DataError):
        diagnose(net, net, {})


@pytest.mark.parametrize(
    "text", [IMAGENET, "ImageNet", '{"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}', "std: 0.229, 0.224, 0.225; mean: 0.485, 0.456, 0.406"]
)
def test_a_normalization_is_read_in_each_of_its_forms(text: str) -> None:
    assert parse_normalization(text) == Normalization((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_a_normalization_that_cannot_be_read_is_refused() -> None:
    assert parse_normalization("") is None
    for text in ("zscore", "mean=1,2 std=1", "mean=0 std=0", '{"mean": 1}', "{"):
        with pytest.raises(ConfigError):
            parse_normalization(text)
    with pytest.raises(ConfigError, match="number of channels"):
        found(
            fed(lambda image: image * 2),
            specs=(TensorSpec(name="image", dtype="float32", shape=(1, 3, 6, 6), layout="NCHW", normalization="mean=0,0 std=1,1"),),
        )


# ------------------------------------------------------------------------------------------------- numbers


def test_top1_agreement_counts_samples_of_class_scores_only() -> None:
    logits = RNG.standard_normal((20, 4))
    other = logits.copy()
    other[:5] = -other[:5]
    limit = tolerance_for(INT8, 1)
    assert compare_tensors("y", logits, other, limit).top1 == pytest.approx(0.75)
    assert compare_tensors("y", logits[:, :1], other[:, :1], limit).top1 is None
    image = RNG.standard_normal((4, 3, 2, 2))
    assert compare_tensors("y", image, image, limit).top1 is None
    assert compare_tensors("y", image, image, limit, class_axis=1).top1 == 1.0


def test_saturation_is_counted_at_the_ends_of_the_range() -> None:
    values = RNG.standard_normal((50, 8))
    scale = 0.5 / 127
    clipped = np.clip(np.round(values / scale), -128, 127) * scale
    share = float(((values <= -128 * scale + scale / 2) | (values >= 127 * scale - scale / 2)).mean())
    limits = (-128 * scale, 127 * scale)
    for row in (compare_tensors("y", values, clipped, tolerance_for(INT8), limits=limits), compare_tensors("y", values, clipped, tolerance_for(INT8))):
        assert row.saturation == pytest.approx(share, abs=0.01)
        assert not row.passed
        assert "saturated int8" in row.reason
    assert compare_tensors("y", values, values, tolerance_for(INT8)).saturation is None
    good = np.round(values / 0.04) * 0.04
    fine = compare_tensors("y", values, good, tolerance_for(INT8), limits=(-128 * 0.04, 127 * 0.04))
    assert fine.passed
    assert fine.saturation == 0.0


# --------------------------------------------------------------------------------------------------- ONNX


def stored(folder: Path, nodes: Sequence[Any], consts: Mapping[str, np.ndarray], width: int, precision: Precision = Precision.FP32) -> StoredArtifact:
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", width])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", width])],
        [numpy_helper.from_array(array, name) for name, array in consts.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)])
    model.ir_version = 8
    folder.mkdir()
    onnx.save(onnx.shape_inference.infer_shapes(model), folder / "model.onnx")
    spec = IOSpec(
        inputs=(TensorSpec(name="x", dtype="float32", shape=("batch", width)),), outputs=(TensorSpec(name="y", dtype="float32", shape=("batch", width)),)
    )
    return store_artifact(folder, "model.onnx", format=Format.ONNX, precision=precision, iospec=spec)


def ort(model: StoredArtifact, inputs: Arrays, taps: Sequence[str] = ()) -> dict[str, np.ndarray]:
    proto = onnx.load(model.entry)
    known = {item.name: item for item in (*proto.graph.value_info, *proto.graph.output)}
    names = [item.name for item in proto.graph.output] + list(taps)
    proto.graph.output.extend(known[name] for name in taps)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(zip(names, (np.asarray(value) for value in session.run(names, dict(inputs))), strict=True))


X = {"x": RNG.standard_normal((16, 6)).astype(np.float32)}
W1, W2 = (RNG.standard_normal((6, 6)).astype(np.float32) for _ in range(2))


def node(kind: str, inputs: str, output: str, **attributes: Any) -> Any:
    return helper.make_node(kind, inputs.split(), [output], name=f"make_{output}", **attributes)


def plain(folder: Path) -> StoredArtifact:
    return stored(folder, [node("MatMul", "x w1", "a"), node("Relu", "a", "b"), node("MatMul", "b w2", "y")], {"w1": W1, "w2": W2}, 6)


def quantized(folder: Path, calibration: np.ndarray) -> StoredArtifact:
    """`plain` with `b` and `y` in int8, at ranges from `calibration`."""
    b = np.maximum(calibration @ W1, 0)
    scales = {"b_scale": np.float32(b.max() / 255), "y_scale": np.float32(np.abs(b @ W2).max() / 127)}
    zeros = {"b_zero": np.array(-128, np.int8), "y_zero": np.array(0, np.int8)}
    nodes = [
        node("MatMul", "x w1", "a"),
        node("Relu", "a", "b"),
        node("QuantizeLinear", "b b_scale b_zero", "b_q"),
        node("DequantizeLinear", "b_q b_scale b_zero", "b_dq"),
        node("MatMul", "b_dq w2", "raw"),
        node("QuantizeLinear", "raw y_scale y_zero", "y_q"),
        node("DequantizeLinear", "y_q y_scale y_zero", "y"),
    ]
    return stored(folder, nodes, {"w1": W1, "w2": W2, **{name: np.asarray(value) for name, value in (scales | zeros).items()}}, 6, INT8)


def test_stale_calibration_is_named_as_saturation_at_the_hop_and_at_its_tensor(tmp_path: Path) -> None:
    source, good, stale = plain(tmp_path / "float"), quantized(tmp_path / "good", X["x"]), quantized(tmp_path / "stale", 0.2 * X["x"])
    fine = compare_hop("onnx -> int8", ort(source, X), ort(good, X), precision=INT8, limits=output_ranges(good))
    assert fine.passed
    assert fine.tensors[0].saturation is not None
    assert bisect(source, good, ort, X) is None
    diagnosis, place = diagnose_files(source, stale, ort, X)
    assert diagnosis.parity.hop == "onnx fp32 -> onnx int8"
    assert diagnosis.faults()[0] is Fault.SATURATED
    assert diagnosis.findings[0].tensor == "b"
    assert "calibration" in diagnosis.findings[0].text
    assert place is not None
    assert (place.tensor, place.op_type) == ("b", "Relu")
    assert "saturated int8" in place.parity.reason
    low, high = graph_of(stale).ranges["b"]
    assert low == 0.0
    assert high == pytest.approx(0.2 * np.maximum(X["x"] @ W1, 0).max(), rel=1e-5)


def test_a_nan_operator_is_named_at_its_tensor(tmp_path: Path) -> None:
    clean = [node("MatMul", "x w1", "a"), node("Abs", "a", "b"), node("Sqrt", "b", "c"), node("MatMul", "c w2", "y")]
    broken = [node("MatMul", "x w1", "a"), node("Abs", "a", "b"), node("Sqrt", "a", "c"), node("MatMul", "c w2", "y")]
    weights = {"w1": W1, "w2": W2}
    place = bisect(stored(tmp_path / "clean", clean, weights, 6), stored(tmp_path / "broken", broken, weights, 6), ort, X)
    assert place is not None
    assert (place.tensor, place.op_type) == ("c", "Sqrt")
    assert place.parity.nonfinite > 0
    assert "NaN" in place.parity.reason


def evaluated(model: StoredArtifact, inputs: Arrays, taps: Sequence[str] = ()) -> dict[str, np.ndarray]:
    """ONNX's own evaluator, which computes fp16 in fp16; ONNX Runtime widens it on a CPU and nothing overflows there."""
    proto = onnx.load(model.entry)
    names = [item.name for item in proto.graph.output] + list(taps)
    proto.graph.output.extend(item for item in proto.graph.value_info if item.name in taps)
    with np.errstate(all="ignore"):
        return dict(zip(names, ReferenceEvaluator(proto).run(names, dict(inputs)), strict=True))


def layer_norm(folder: Path, *, half: bool) -> StoredArtifact:
    """A layer norm out of single operators; with `half` in fp16 between two casts, whose square overflows above 256."""
    kind = np.float16 if half else np.float32
    consts = {"two": np.array(2, kind), "eps": np.array(1e-3, kind)}
    nodes = [
        *([node("Cast", "x", "h", to=TensorProto.FLOAT16)] if half else [node("Identity", "x", "h")]),
        node("ReduceMean", "h", "mean", axes=[-1]),
        node("Sub", "h mean", "centred"),
        node("Pow", "centred two", "square"),
        node("ReduceMean", "square", "variance", axes=[-1]),
        node("Add", "variance eps", "above"),
        node("Sqrt", "above", "deviation"),
        node("Div", "centred deviation", "scaled"),
        *([node("Cast", "scaled", "y", to=TensorProto.FLOAT)] if half else [node("Identity", "scaled", "y")]),
    ]
    return stored(folder, nodes, consts, 6, Precision.FP16 if half else Precision.FP32)


def test_fp16_overflow_in_a_layer_norm_is_named_at_the_square(tmp_path: Path) -> None:
    source, half = layer_norm(tmp_path / "float", half=False), layer_norm(tmp_path / "half", half=True)
    assert bisect(source, half, evaluated, X) is None
    large = {"x": X["x"] * np.float32(1000)}
    diagnosis, place = diagnose_files(source, half, evaluated, large)
    assert diagnosis.faults()[0] is Fault.OVERFLOW
    assert place is not None
    assert (place.tensor, place.op_type) == ("square", "Pow")
    assert "fp16 overflow" in place.parity.reason


def test_a_file_that_was_cut_off_is_named_by_its_hash(tmp_path: Path) -> None:
    source, cut = plain(tmp_path / "float"), plain(tmp_path / "cut")
    cut.entry.write_bytes(cut.entry.read_bytes()[:-20])
    with pytest.raises(BundleError, match=r"model\.onnx was changed"):
        bisect(source, cut, ort, X)
    with pytest.raises(BundleError, match=r"model\.onnx was changed"):
        output_ranges(cut)


# -------------------------------------------------------------------------------------------------- TFLite


def tflite(folder: Path, high: float | None = None) -> StoredArtifact:
    """Two fully connected layers; with `high` the second one reads its input through int8, from -high to high."""
    pytest.importorskip("ai_edge_litert")
    tensors = [HandTensor("x", (1, 6)), HandTensor("w1", (6, 6), data=W1.T), HandTensor("w2", (6, 6), data=W2.T)]
    tensors += [HandTensor(name, (1, 6)) for name in ("first", "second")]
    ops = [HandOp("FULLY_CONNECTED", ("x", "w1"), ("first",))]
    if high is not None:
        tensors += [HandTensor("first_q", (1, 6), "int8", scales=(high / 127,)), HandTensor("first_dq", (1, 6))]
        ops += [HandOp("QUANTIZE", ("first",), ("first_q",)), HandOp("DEQUANTIZE", ("first_q",), ("first_dq",), version=2)]
    ops.append(HandOp("FULLY_CONNECTED", ("first" if high is None else "first_dq", "w2"), ("second",)))
    spec = IOSpec(inputs=(TensorSpec(name="x", dtype="float32", shape=(1, 6)),), outputs=(TensorSpec(name="second", dtype="float32", shape=(1, 6)),))
    return store_hand_made(folder, hand_made(tensors, ops, ("x",), ("second",)), spec, precision=Precision.FP32 if high is None else INT8)


def test_tflite_is_bisected_with_the_taps_of_its_runtime(tmp_path: Path) -> None:
    source = tflite(tmp_path / "float")
    from edgekd.target import connect

    full = float(np.abs(X["x"] @ W1).max())
    good, stale = tflite(tmp_path / "good", full), tflite(tmp_path / "stale", full / 5)
    assert graph_of(stale).ranges["first"] == pytest.approx((-128 / 127 * full / 5, full / 5))
    with connect("litert-local") as target:
        assert bisect(source, source, target.runtime.infer, X) is None
        assert bisect(source, good, target.runtime.infer, X) is None
        place = bisect(source, stale, target.runtime.infer, X)
    assert place is not None
    assert (place.tensor, place.op_type) == ("first", "FULLY_CONNECTED")
    assert "saturated int8" in place.parity.reason


def test_files_of_two_formats_are_not_bisected(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="two formats"):
        bisect(plain(tmp_path / "onnx"), tflite(tmp_path / "tflite"), ort, X)

"""The small models on which the suite of runtimes runs, with their inputs and their outputs as numpy computes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from edgekd.artifact import StoredArtifact, store_artifact
from edgekd.contracts import Array, Tensors
from edgekd.records import Format, IOSpec, Precision, StatePair, TensorSpec

_RANDOM = np.random.default_rng(7)
_WEIGHT_A = _RANDOM.standard_normal((4, 3)).astype(np.float32)
_WEIGHT_B = _RANDOM.standard_normal((2, 3)).astype(np.float32)
_FADING = np.array([[0.5, 0.3, 0.0], [0.0, 0.4, -0.2], [0.1, 0.0, 0.6]], np.float32)


def two_inputs(samples: int, seed: int = 0) -> dict[str, Array]:
    """Inputs of `two_headed`: `a` `(samples, 4)` and `b` `(samples, 2)`, float32, standard normal."""
    random = np.random.default_rng(seed)
    return {"a": random.standard_normal((samples, 4)).astype(np.float32), "b": random.standard_normal((samples, 2)).astype(np.float32)}


def two_headed_outputs(inputs: Tensors) -> dict[str, Array]:
    """What `two_headed` computes, in numpy: `heads.total` `(samples,)`, `heads.gate` `(samples, 3)` and the inner tensor `mixed` `(samples, 3)`."""
    mixed = inputs["a"] @ _WEIGHT_A + inputs["b"] @ _WEIGHT_B
    return {"mixed": mixed, "heads.gate": np.maximum(mixed, 0.0), "heads.total": mixed.sum(axis=1)}


def two_headed_weights() -> tuple[Array, Array]:
    """The weights `(4, 3)` and `(2, 3)`, float32, by which `two_headed` multiplies `a` and `b`."""
    return _WEIGHT_A.copy(), _WEIGHT_B.copy()


def two_headed(folder: Path, batch: int | str = "batch") -> StoredArtifact:
    """An ONNX model in `folder` with two inputs and two outputs named by key path; its IOSpec lists the outputs in another order than the file.

    `batch` is the first axis of its inputs, a number or the name of a symbol. Needs the package onnx.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    folder.mkdir(parents=True, exist_ok=True)
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["a", "weight_a"], ["from_a"], name="left"),
            helper.make_node("MatMul", ["b", "weight_b"], ["from_b"], name="right"),
            helper.make_node("Add", ["from_a", "from_b"], ["mixed"], name="mix"),
            helper.make_node("Relu", ["mixed"], ["heads.gate"], name="gate"),
            helper.make_node("ReduceSum", ["mixed", "axes"], ["heads.total"], name="total", keepdims=0),
        ],
        "two_headed",
        [helper.make_tensor_value_info("a", TensorProto.FLOAT, [batch, 4]), helper.make_tensor_value_info("b", TensorProto.FLOAT, [batch, 2])],
        [helper.make_tensor_value_info("heads.gate", TensorProto.FLOAT, [batch, 3]), helper.make_tensor_value_info("heads.total", TensorProto.FLOAT, [batch])],
        [numpy_helper.from_array(_WEIGHT_A, "weight_a"), numpy_helper.from_array(_WEIGHT_B, "weight_b"), numpy_helper.from_array(np.array([1]), "axes")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), folder / "model.onnx")

    def tensor(name: str, *rest: int) -> TensorSpec:
        return TensorSpec(name=name, dtype="float32", shape=(batch, *rest))

    iospec = IOSpec(inputs=(tensor("a", 4), tensor("b", 2)), outputs=(tensor("heads.total"), tensor("heads.gate", 3)))
    return store_artifact(folder, "model.onnx", format=Format.ONNX, precision=Precision.FP32, iospec=iospec, opset=18)


def remembering_sequences(samples: int, steps: int, seed: int = 0) -> dict[str, Array]:
    """Inputs of `remembering`: `x` `(samples, steps, 3)`, float32, standard normal."""
    return {"x": np.random.default_rng(seed).standard_normal((samples, steps, 3)).astype(np.float32)}


def remembering_outputs(inputs: Tensors) -> dict[str, Array]:
    """What `remembering` gives step by step from a memory of zeros, in numpy: `total` and `memory.next`, `(samples, steps, 3)`."""
    totals, memories = [], [np.zeros_like(inputs["x"][:, 0])]
    for step in range(inputs["x"].shape[1]):
        totals.append(inputs["x"][:, step] + memories[-1])
        memories.append(totals[-1] @ _FADING)
    return {"total": np.stack(totals, axis=1), "memory.next": np.stack(memories[1:], axis=1)}


def remembering_weight() -> Array:
    """The weight `(3, 3)`, float32, by which the memory fades."""
    return _FADING.copy()


def remembering_iospec(batch: int | str = "batch") -> IOSpec:
    """`x` and the state `memory` in, `total` and `memory.next` out, all `(batch, 3)`."""
    inputs, outputs = (
        tuple(TensorSpec(name=name, dtype="float32", shape=(batch, 3)) for name in names) for names in (("x", "memory"), ("total", "memory.next"))
    )
    return IOSpec(inputs=inputs, outputs=outputs, state=(StatePair(output="memory.next", input="memory"),))


def remembering(folder: Path, batch: int | str = "batch") -> StoredArtifact:
    """An ONNX model with a state in `folder`: `total` is `x` plus what it remembers. Needs the package onnx."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    folder.mkdir(parents=True, exist_ok=True)
    infos = {name: helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, 3]) for name in ("x", "memory", "total", "memory.next")}
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "memory"], ["total"], name="add"), helper.make_node("MatMul", ["total", "fading"], ["memory.next"], name="fade")],
        "remembering",
        [infos["x"], infos["memory"]],
        [infos["total"], infos["memory.next"]],
        [numpy_helper.from_array(_FADING, "fading")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), folder / "model.onnx")
    return store_artifact(folder, "model.onnx", format=Format.ONNX, precision=Precision.FP32, iospec=remembering_iospec(batch), opset=18)

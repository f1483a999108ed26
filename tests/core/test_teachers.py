"""Teachers of every kind: equal outputs, modes restored, fixed batches, and errors that show shapes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from torch import nn

from edgekd.errors import ModelError
from edgekd.teachers import CallableTeacher, OnnxTeacher, as_teacher, forward_names
from tests.contracts.tiny_models import ConvNet, TwoInputs, torch_outputs

RANDOM = np.random.default_rng(0)
IMAGES = {"image": RANDOM.standard_normal((11, 3, 8, 8)).astype(np.float32)}
WEIGHT = RANDOM.standard_normal((3, 2)).astype(np.float32)
ROWS = RANDOM.standard_normal((11, 3)).astype(np.float32)


def linear_file(path: Path, batch: int | str, *, weight: np.ndarray = WEIGHT) -> Path:
    """An ONNX file `y = x @ weight` whose first axis is `batch`."""
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "net",
        [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [batch, 3])],
        [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [batch, 2])],
        [numpy_helper.from_array(weight, "w")],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    return path


def exported(module: nn.Module, batch: int, *, free: bool) -> torch.export.ExportedProgram:
    dynamic = {"image": {0: torch.export.Dim("batch", min=1, max=1024)}} if free else None
    return torch.export.export(module.eval(), (torch.zeros(batch, 3, 8, 8),), dynamic_shapes=dynamic)


# ------------------------------------------------------------------------------------------ outputs


@pytest.mark.parametrize(("batch", "free"), [(1, False), (4, False), (4, True)])
def test_exported_program_gives_the_outputs_of_its_module(batch: int, free: bool) -> None:
    teacher = as_teacher(exported(ConvNet(), batch, free=free))
    assert teacher.module is None
    assert np.allclose(teacher.outputs(IMAGES)["output"], torch_outputs(ConvNet(), IMAGES)["output"], atol=1e-5)


@pytest.mark.parametrize("batch", [1, 4, "batch"])
def test_onnx_teacher_runs_all_items_whatever_its_batch(batch: int | str, tmp_path: Path) -> None:
    teacher = as_teacher(linear_file(tmp_path / "net.onnx", batch))
    assert np.allclose(teacher.outputs({"x": ROWS})["y"], ROWS @ WEIGHT, atol=1e-5)


def test_callable_teacher_gets_named_arrays_in_parts() -> None:
    sizes = []

    def answer(inputs: Mapping[str, np.ndarray]) -> dict[str, Any]:
        sizes.append(len(inputs["x"]))
        return {"y": inputs["x"] @ WEIGHT, "more": (inputs["x"].sum(1),)}

    many = np.tile(ROWS, (50, 1))
    outputs = as_teacher(answer).outputs({"x": many})
    assert list(outputs) == ["y", "more.0"]
    assert np.allclose(outputs["y"], many @ WEIGHT)
    assert sum(sizes) == len(many)
    assert max(sizes) < len(many)


def test_two_inputs_go_to_the_module_in_its_own_order() -> None:
    inputs = {"image": IMAGES["image"], "extra": RANDOM.standard_normal((11, 5)).astype(np.float32)}
    assert forward_names(TwoInputs()) == ("image", "extra")
    outputs = as_teacher(TwoInputs()).outputs(inputs)
    assert list(outputs) == ["cls.logits", "parts.0", "parts.1"]
    assert np.allclose(outputs["cls.logits"], torch_outputs(TwoInputs(), inputs)["cls.logits"], atol=1e-5)


# ------------------------------------------------------------------------------------------ modes and hashes


def test_every_module_gets_its_mode_back_also_after_an_error() -> None:
    net = ConvNet().train()
    net.norm.eval()  # a frozen normalization inside a network in training mode
    before = torch_outputs(ConvNet(), IMAGES)["output"]
    teacher = as_teacher(net)
    assert np.allclose(teacher.outputs(IMAGES)["output"], before, atol=1e-5)
    with pytest.raises(ModelError):
        teacher.outputs({"image": IMAGES["image"][:, :1]})
    assert (net.training, net.conv1.training, net.norm.training) == (True, True, False)
    assert all(parameter.requires_grad for parameter in net.parameters())


class Other(ConvNet):
    """The weights of `ConvNet`, another function."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = super().forward(image).tanh()
        return y


def test_hash_changes_with_a_weight_and_with_the_function(tmp_path: Path) -> None:
    changed = ConvNet()
    with torch.no_grad():
        changed.get_parameter("head.bias")[0] += 1e-3
    modules = [as_teacher(module).weights_hash() for module in (ConvNet(), changed, Other())]
    programs = [as_teacher(exported(module, 1, free=False)).weights_hash() for module in (ConvNet(), changed, Other())]
    files = [
        as_teacher(linear_file(tmp_path / f"{index}.onnx", 1, weight=weight)).weights_hash() for index, weight in enumerate((WEIGHT, WEIGHT + 1e-3, 2 * WEIGHT))
    ]
    for hashes in (modules, programs, files):
        assert len(set(hashes)) == 3
    assert as_teacher(ConvNet()).weights_hash() == modules[0]
    assert as_teacher(exported(ConvNet(), 1, free=False)).weights_hash() == programs[0]


# ------------------------------------------------------------------------------------------ errors


def refuses(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
    return inputs["x"] @ np.zeros((3, 2))


@pytest.mark.parametrize("kind", ["module", "program", "onnx", "callable"])
def test_data_of_the_wrong_shape_are_refused_with_shapes(kind: str, tmp_path: Path) -> None:
    teachers: dict[str, Any] = {"module": ConvNet(), "program": exported(ConvNet(), 4, free=True), "callable": refuses}
    teacher = as_teacher(linear_file(tmp_path / "net.onnx", "n") if kind == "onnx" else teachers[kind])
    inputs = {"image": IMAGES["image"][:, :1]} if kind in ("module", "program") else {"x": ROWS[:, :2]}
    with pytest.raises(ModelError, match="does not accept the data") as caught:
        teacher.outputs(inputs)
    assert "float32 (11, 1, 8, 8)" in str(caught.value) or "float32 (11, 2)" in str(caught.value)
    assert "shape and dtype" in str(caught.value)


def test_data_of_the_wrong_dtype_show_it() -> None:
    with pytest.raises(ModelError, match="image float64"):
        as_teacher(ConvNet()).outputs({"image": IMAGES["image"].astype(np.float64)})


@pytest.mark.parametrize("outputs", [np.float32(1.0), ROWS[:3], {"loss": np.zeros(()), "y": ROWS}])
def test_output_without_an_entry_per_item_is_refused(outputs: Any) -> None:
    with pytest.raises(ModelError, match=r"allowed: \(items, \.\.\.\)"):
        as_teacher(lambda inputs: outputs).outputs({"x": ROWS})


def test_onnx_teacher_names_its_inputs_when_the_data_do_not(tmp_path: Path) -> None:
    with pytest.raises(ModelError) as caught:
        as_teacher(linear_file(tmp_path / "net.onnx", 1)).outputs({"image": ROWS})
    assert (caught.value.found, caught.value.allowed) == (["image"], ["x"])


def test_file_that_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(b"not a model")
    with pytest.raises(ModelError, match="cannot be run"):
        OnnxTeacher(tmp_path / "net.onnx").outputs({"x": ROWS})
    with pytest.raises(ModelError, match="check the path"):
        as_teacher(tmp_path / "none.onnx")


@pytest.mark.parametrize(("teacher", "text"), [("net.pt", r"\*\.onnx"), (3, "a callable")])
def test_what_cannot_teach_is_refused(teacher: Any, text: str) -> None:
    with pytest.raises(ModelError, match=text):
        as_teacher(teacher)


def test_teacher_that_raises_without_text_shows_the_class_of_its_error() -> None:
    def empty(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        raise RuntimeError

    with pytest.raises(ModelError, match=": RuntimeError;"):
        as_teacher(empty).outputs({"x": ROWS})


class Scaled:
    """A callable with an array; `hidden` stands for what nothing can read, such as a session."""

    def __init__(self, factor: float, *, hidden: bool = False) -> None:
        self.factor = None if hidden else np.full(3, factor)
        self.hidden = iter_forever(factor) if hidden else None
        self.calls = 0

    def __call__(self, inputs: dict[str, Any]) -> Any:
        self.calls += 1
        factor = self.factor if self.hidden is None else next(self.hidden)
        return inputs["x"] * factor


def iter_forever(value: float) -> Iterator[float]:
    while True:
        yield value


def test_callable_teacher_is_identified_by_its_state_at_first() -> None:
    teachers = [as_teacher(Scaled(factor)) for factor in (2.0, 2.0, 3.0)]
    first, again, other = (teacher.weights_hash() for teacher in teachers)
    assert first == again != other
    teachers[0].outputs({"x": np.ones((2, 3))})
    assert teachers[0].weights_hash() == first


def test_callable_teacher_that_hides_something_is_identified_by_its_answers() -> None:
    teachers = [as_teacher(Scaled(factor, hidden=True)) for factor in (2.0, 2.0, 3.0)]
    unknown = {teacher.weights_hash() for teacher in teachers}
    for teacher in teachers:
        assert isinstance(teacher, CallableTeacher)
        teacher.answer({"x": np.ones((2, 3))})
    first, again, other = (teacher.weights_hash() for teacher in teachers)
    assert first == again != other
    assert not unknown & {first, other}


def test_callable_teacher_that_hides_something_is_another_in_each_process(tmp_path: Path) -> None:
    script = (
        "import threading\n"
        "from edgekd.teachers import as_teacher\n"
        "class Teacher:\n"
        "    def __init__(self): self.session = threading.local()\n"
        "    def __call__(self, inputs): return inputs['x']\n"
        "print(as_teacher(Teacher()).weights_hash())\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    found = {subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True).stdout for _ in range(2)}
    assert len(found) == 2

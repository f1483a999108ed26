"""edgekd.convert keeps graphs clean: transpositions counted and bounded, outputs cut, batch norms folded, notes in the file at the end."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import edgekd
from edgekd.cli.main import cli
from edgekd.conversion.bounds import module_bound
from edgekd.errors import ConfigError, ConversionRejected, ModelError
from edgekd.models.notes import read_metadata
from edgekd.records import IOSpec, TensorSpec

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

X = np.random.default_rng(0).standard_normal((8, 3, 4, 4)).astype(np.float32)
E = np.random.default_rng(1).standard_normal((8, 2)).astype(np.float32)


@pytest.fixture
def net(tmp_path: Path) -> Path:
    """`x` to `logits`, by way of NHWC and an idle node; `e` to `extra`; and an output of both."""
    node, value = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [
            node("Transpose", ["x"], ["a"], perm=[0, 2, 3, 1], name="to_last"),
            node("Identity", ["a"], ["b"]),
            node("Transpose", ["b"], ["c"], perm=[0, 3, 1, 2], name="to_first"),
            node("Flatten", ["c"], ["d"]),
            node("MatMul", ["d", "w"], ["logits"]),
            node("Relu", ["e"], ["extra"]),
            node("Sigmoid", ["logits"], ["scores"]),
        ],
        "net",
        [value("x", onnx.TensorProto.FLOAT, ["batch", 3, 4, 4]), value("e", onnx.TensorProto.FLOAT, ["batch", 2])],
        [value("logits", onnx.TensorProto.FLOAT, ["batch", 5]), value("extra", onnx.TensorProto.FLOAT, ["batch", 2]), value("scores", 1, ["batch", 5])],
        [onnx.numpy_helper.from_array(np.random.default_rng(2).standard_normal((48, 5)).astype(np.float32), "w")],
    )
    path = tmp_path / "net.onnx"
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)], ir_version=9), str(path))
    return path


def test_layout_operators_are_counted_and_bounded_with_their_names(net: Path, tmp_path: Path) -> None:
    made = edgekd.convert(net, to="onnx", example={"x": X, "e": E}, out=tmp_path / "m.onnx", progress=False)
    assert (made.transposes, made.layout_ops) == (2, 3)
    assert made.artifact.metadata["removed_idle_nodes"] == "1"
    with pytest.raises(ConversionRejected, match=r"2 transpositions.*to_last, to_first.*allowed: 1.*--max-transposes 2"):
        edgekd.convert(net, to="onnx", max_transposes=1, out=tmp_path / "n.onnx", progress=False)
    assert not (tmp_path / "n.onnx").exists()
    allowed = edgekd.convert(net, to="onnx", precision="fp32", via=("prepare-onnx",), max_transposes=2, out=tmp_path / "p.onnx", progress=False)
    assert allowed.transposes is not None
    for wrong in (-1, True):
        with pytest.raises(ConfigError, match=r"bound of transpositions"):
            edgekd.convert(net, to="onnx", max_transposes=wrong, out=tmp_path / "q.onnx", progress=False)


def test_outputs_are_cut_and_the_rest_stays_as_it_was(net: Path, tmp_path: Path) -> None:
    made = edgekd.convert(net, to="onnx", outputs=("extra", "logits"), example={"x": X, "e": E}, out=tmp_path / "m.onnx", progress=False)
    assert [tensor.name for tensor in made.artifact.iospec.outputs] == ["logits", "extra"]
    assert json.loads(made.artifact.metadata["cut_outputs"]) == ["scores"]
    from edgekd.teachers import OnnxTeacher

    feeds = {"x": X[:1], "e": E[:1]}
    before, after = OnnxTeacher(net).outputs(feeds), OnnxTeacher(tmp_path / "m.onnx").outputs(feeds)
    assert list(after) == ["logits", "extra"]
    for name, value in after.items():
        np.testing.assert_array_equal(value, before[name])
    with pytest.raises(ConfigError, match=r"reads the input 'e'"):
        edgekd.convert(net, to="onnx", outputs=("logits",), out=tmp_path / "n.onnx", progress=False)
    with pytest.raises(ConfigError, match=r"logits \(did you mean this\?\)"):
        edgekd.convert(net, to="onnx", outputs=("logit",), out=tmp_path / "n.onnx", progress=False)
    with pytest.raises(ConfigError, match="sequence"):
        edgekd.convert(net, to="onnx", outputs="logits", out=tmp_path / "n.onnx", progress=False)


def test_the_int8_file_holds_notes_about_its_float_source(net: Path, tmp_path: Path) -> None:
    folder, given = tmp_path / "folder", {"x": X, "e": E}
    first = edgekd.convert(net, to="onnx", precision="int8", calibration=given, out=folder, progress=False, allow_divergence=True)
    told = read_metadata(folder / first.artifact.entry)
    assert (told["precision"], told["version"]) == ("int8", edgekd.__version__)
    assert told["parent"] == first.artifact.parent
    assert told["recipe"] == first.artifact.recipe
    first.stored.verify()
    again = edgekd.convert(net, to="onnx", precision="int8", calibration=given, out=tmp_path / "again", progress=False, allow_divergence=True)
    assert again.artifact.files == first.artifact.files


def test_the_command_cuts_bounds_and_shows_what_stands_in_the_file(net: Path, tmp_path: Path) -> None:
    words = ["convert", str(net), "-o", str(tmp_path / "m.onnx"), "--outputs", "logits, extra"]
    done = CliRunner().invoke(cli, words)
    assert done.exit_code == 0, done.output
    assert "layout operators: 3, of which 2 move a tensor" in done.output
    assert "in the file: precision: fp32" in done.output
    refused = CliRunner().invoke(cli, [*words, "--max-transposes", "0"])
    assert refused.exit_code == 3
    assert "2 transpositions" in refused.output + refused.stderr


@pytest.mark.torch
def test_outputs_of_a_module_are_cut_and_an_input_that_nothing_reads_is_named(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)

    class Two(torch.nn.Module):  # type: ignore[misc,name-defined]
        """Two inputs, nested outputs."""

        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.norm, self.one, self.two = torch.nn.BatchNorm1d(48), torch.nn.Linear(48, 5), torch.nn.Linear(2, 5)

        def forward(self, x, e):  # type: ignore[no-untyped-def]
            a, b = self.one(self.norm(x.flatten(1))), self.two(e)
            return {"cls": {"logits": a + b, "own": a}, "extra": (b,)}

    net, given, out = Two().train(), {"x": X, "e": E}, tmp_path / "m.onnx"
    made = edgekd.convert(net, to="onnx", outputs=("cls.logits",), example=given, out=out, progress=False)
    assert [tensor.name for tensor in made.artifact.iospec.outputs] == ["cls.logits"]
    assert made.passed
    assert (made.artifact.metadata["batch_normalizations"], net.norm.training) == ("0", True)
    assert len(read_metadata(out)["source"]) == 64
    for wanted, idle in ((("cls.own",), "e"), (("extra.0",), "x")):
        with pytest.raises(ConfigError, match=rf"reads the input '{idle}'"):
            edgekd.convert(net, to="onnx", outputs=wanted, example=given, out=out, progress=False)


def module(forward: Callable[..., Any]) -> Any:
    """A torch module without weights of its own, with this forward over `x` and `e`."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    return type("Bare", (torch.nn.Module,), {"forward": forward})()


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["label", "detached"])
def test_an_output_without_a_gradient_can_be_kept_alone(kind: str, tmp_path: Path) -> None:
    def forward(self: Any, x: Any, e: Any) -> Any:
        logits = x.flatten(1)[:, :2] + e
        label = {"label": logits.argmax(1), "detached": logits.detach() * 2.0}[kind]
        return {"logits": logits, "label": label}

    net, given, via = module(forward), {"x": X, "e": E}, ("onnx-legacy-from-torch",)
    made = edgekd.convert(net, to="onnx", outputs=("label",), example=given, via=via, out=tmp_path / "m.onnx", progress=False)
    assert [tensor.name for tensor in made.artifact.iospec.outputs] == ["label"]
    assert [tensor.name for tensor in made.artifact.iospec.inputs] == ["x", "e"]
    assert made.passed


@pytest.mark.torch
def test_a_module_that_changes_its_input_is_cut_and_compared_and_leaves_the_callers_arrays(tmp_path: Path) -> None:
    def forward(self: Any, x: Any, e: Any) -> Any:
        x.mul_(2.0)
        return {"sum": x.flatten(1)[:, :2] + e, "own": x.flatten(1).sigmoid_()}

    given = {"x": X.copy(), "e": E.copy()}
    net, out = module(forward), tmp_path / "m.onnx"
    made = edgekd.convert(net, to="onnx", outputs=("sum",), example=given, out=out, via=("onnx-legacy-from-torch",), progress=False)
    assert made.passed
    with pytest.raises(ConfigError, match="reads the input 'e'"):
        edgekd.convert(net, to="onnx", outputs=("own",), example=given, out=out, progress=False)
    spec = IOSpec(
        inputs=tuple(TensorSpec(name=name, dtype="float32", shape=("batch", *value.shape[1:])) for name, value in given.items()),
        outputs=(TensorSpec(name="sum", dtype="float32", shape=("batch", 2)),),
    )
    assert module_bound(net, given, spec).limit == 4  # the borders, and the image that is flattened twice
    np.testing.assert_array_equal(given["x"], X)
    np.testing.assert_array_equal(given["e"], E)


@pytest.mark.torch
@pytest.mark.parametrize("reach", ["missing", "divide", "shape"])
def test_an_error_of_the_module_is_told_with_its_inputs(reach: str, tmp_path: Path) -> None:
    def forward(self: Any, x: Any, e: Any) -> Any:
        return {"missing": lambda: x.nothing, "divide": lambda: x / (0 // 0), "shape": lambda: x @ e}[reach]()

    net, given = module(forward), {"x": X, "e": E}
    spec = IOSpec(
        inputs=tuple(TensorSpec(name=name, dtype="float32", shape=("batch", *value.shape[1:])) for name, value in given.items()),
        outputs=tuple(TensorSpec(name=name, dtype="float32", shape=("batch", 2)) for name in ("output.0", "output.1")),
    )
    told = r"Bare does not accept the data; found: inputs x float32 \(1, 3, 4, 4\), e float32 \(1, 2\): .+; next step"
    with pytest.raises(ModelError, match=told):
        module_bound(net, given, spec)
    with pytest.raises(ModelError, match=told):
        edgekd.convert(net, to="onnx", outputs=("output.0",), example=given, iospec=spec, out=tmp_path / "m.onnx", progress=False)
    with pytest.raises(ModelError, match=told):
        edgekd.convert(net, to="onnx", example=given, out=tmp_path / "m.onnx", progress=False)

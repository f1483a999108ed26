"""Outputs cut out of TFLite files: operators, tensors and weights that only fed them go, the rest computes as before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgekd
from edgekd.errors import ConfigError, ConversionRejected
from edgekd.models.notes import annotate, labels_text, read_metadata
from edgekd.models.tflite_artifact import import_tflite
from edgekd.models.tflite_file import load_model, op_counts, pack_model, parse_model, read_graph
from edgekd.models.tflite_trim import keep_outputs
from edgekd.testing.models import two_headed_outputs, two_headed_weights, two_inputs
from edgekd.testing.tflite_models import HandOp, HandTensor, hand_made, two_headed_tflite

pytest.importorskip("ai_edge_litert")


def run(path: Path, **inputs: np.ndarray) -> dict[str, np.ndarray]:
    from ai_edge_litert.interpreter import Interpreter

    found: dict[str, np.ndarray] = Interpreter(model_path=str(path), num_threads=1).get_signature_runner()(**inputs)
    return found


@pytest.mark.parametrize("signature", [True, False])
def test_an_output_goes_with_what_only_fed_it(tmp_path: Path, signature: bool) -> None:
    source = two_headed_tflite(tmp_path / "in", 1, signature=signature)
    made = edgekd.convert(source.entry, to="tflite", outputs=("heads.gate",), out=tmp_path / "m.tflite", progress=False)
    assert [tensor.name for tensor in made.artifact.iospec.outputs] == ["heads.gate"]
    assert made.artifact.metadata["removed_dead_nodes"] == "1"
    assert made.artifact.metadata["removed_weights"] == "1"  # the axes of the sum
    model = load_model(tmp_path / "m.tflite")
    assert op_counts(model) == {"ADD": 1, "FULLY_CONNECTED": 2, "RELU": 1}
    assert "heads.total" not in [tensor.name for tensor in read_graph(model).tensors]
    inputs = two_inputs(1, seed=3)
    np.testing.assert_allclose(run(tmp_path / "m.tflite", **inputs)["heads.gate"], two_headed_outputs(inputs)["heads.gate"], rtol=1e-5, atol=1e-6)


def branches() -> bytes:
    """Two layers that share nothing: `a` to `left`, `b` to `right`, whose weight fills most of the file."""
    weight_a, weight_b = two_headed_weights()
    tensors = [
        HandTensor("a", (1, 4)), HandTensor("b", (1, 2)), HandTensor("weight_a", (3, 4), data=weight_a.T), HandTensor("weight_b", (3, 2), data=weight_b.T),
        HandTensor("left", (1, 3)), HandTensor("right", (1, 3)),
    ]  # fmt: skip
    ops = [HandOp("FULLY_CONNECTED", ("a", "weight_a"), ("left",)), HandOp("FULLY_CONNECTED", ("b", "weight_b"), ("right",))]
    return hand_made(tensors, ops, ("a", "b"), ("left", "right"))


def test_an_input_that_nothing_reads_any_more_and_unknown_names_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"reads the input 'b'"):
        keep_outputs(parse_model(branches()), ("left",))
    with pytest.raises(ConfigError, match=r"left \(did you mean this\?\)"):
        keep_outputs(parse_model(branches()), ("lef",))


def test_files_with_several_graphs_are_refused() -> None:
    model: Any = parse_model(branches())
    model.subgraphs.append(model.subgraphs[0])
    with pytest.raises(ConversionRejected, match="several graphs"):
        keep_outputs(model, ("left",))


def test_notes_survive_a_cut_and_the_bytes_are_stable(tmp_path: Path) -> None:
    source = two_headed_tflite(tmp_path / "raw", 1)
    noted = annotate(import_tflite(source.entry, tmp_path / "in"), tmp_path / "noted", {"labels": labels_text(("cat", "dog", "owl"))})
    files = []
    for name in ("one", "two"):
        made = edgekd.convert(noted.entry, to="tflite", outputs=("heads.gate",), out=tmp_path / name, progress=False)
        files.append(made.artifact.files)
        told = read_metadata(made.stored.entry)
        assert told["labels"] == '["cat","dog","owl"]'
        assert made.artifact.metadata["labels"] == told["labels"]
        assert "heads.total" not in told["iospec"]
    assert files[0] == files[1]
    assert pack_model(load_model(made.stored.entry)) == made.stored.entry.read_bytes()

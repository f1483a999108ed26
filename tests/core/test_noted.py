"""What a file says of itself: where it comes from, what is not used because it does not fit its graph, and what commands show of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result

import edgekd
from edgekd.cli.main import cli
from edgekd.models.model_file import import_model
from edgekd.models.notes import DROPPED, annotate, labels_text, noted_iospec, read_metadata, shown_notes, weights_hash
from edgekd.models.onnx_artifact import import_onnx, set_notes
from edgekd.models.onnx_file import file_hash, load_model
from edgekd.records import InputProcessing, IOSpec, OutputProcessing, Processing
from edgekd.storage import sha256_file
from edgekd.testing.models import remembering, remembering_iospec

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

OTHER_FORM = json.dumps({"type": "edgekd.io/99", "tensors": []})


def command(*words: object) -> Result:
    return CliRunner().invoke(cli, [str(word) for word in words], env={"COLUMNS": "200"})


@pytest.fixture
def cell(tmp_path: Path) -> Path:
    """A cell with state whose file notes its description, with labels."""
    made = import_onnx(remembering(tmp_path / "made").entry, tmp_path / "in", like=remembering_iospec())
    return annotate(made, tmp_path / "cell", {"labels": labels_text(("cat", "dog"))}).entry


def renamed(path: Path, out: Path, old: str, new: str) -> Path:
    """The ONNX file with one tensor renamed and its notes as they were."""
    model = load_model(path)
    for item in (*model.graph.input, *model.graph.output):
        item.name = new if item.name == old else item.name
    for node in model.graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        node.output[:] = [new if name == old else name for name in node.output]
    onnx.save(model, str(out))
    return out


def noting(path: Path, out: Path, **notes: str) -> Path:
    """The ONNX file with other texts in its notes."""
    model = load_model(path)
    set_notes(model, {**read_metadata(path), **notes})
    onnx.save(model, str(out))
    return out


def ill_joined(path: Path) -> str:
    """The noted description with its state fed back from an output of another size."""
    told = json.loads(read_metadata(path)["iospec"])
    assert told["state"] == [{"type": "edgekd.state/1", "input": "memory", "output": "memory.next"}]
    told["state"][0]["output"] = "nowhere"
    return json.dumps(told)


def stale(kind: str, cell: Path, folder: Path) -> tuple[Path, str]:
    """A file whose description cannot be used, and words of the reason."""
    out = folder / f"{kind}.onnx"
    if kind == "renamed input":
        return renamed(cell, out, "memory", "past"), "'memory', which the graph lacks; its inputs are x, past"
    if kind == "renamed output":
        return renamed(cell, out, "total", "sum"), "'total', which the graph lacks"
    if kind == "other form":
        return noting(cell, out, iospec=OTHER_FORM), "edgekd.io/99"
    if kind == "no JSON":
        return noting(cell, out, iospec="{cut off"), "iospec: "
    return noting(cell, out, iospec=ill_joined(cell)), "does not both have"


@pytest.mark.parametrize("kind", ["renamed input", "renamed output", "other form", "no JSON", "state"])
def test_a_description_that_does_not_fit_is_dropped_and_said(kind: str, cell: Path, tmp_path: Path) -> None:
    path, words = stale(kind, cell, tmp_path)
    made = import_model(path, tmp_path / "back")
    assert words in made.record.metadata[DROPPED]
    assert made.record.iospec.state == ()
    assert made.record.iospec.inputs[0].shape == (1, 3)
    assert json.loads(made.record.metadata["labels"]) == ["cat", "dog"]
    assert words in shown_notes(path)["not used"]
    assert "not used" not in shown_notes(made.entry)
    told = noted_iospec(read_metadata(made.entry), made.entry)
    assert told == made.record.iospec


def test_a_description_that_fits_is_used_and_nothing_is_said(cell: Path, tmp_path: Path) -> None:
    made = import_model(cell, tmp_path / "back")
    assert made.record.iospec.state == remembering_iospec().state
    assert DROPPED not in made.record.metadata
    assert "not used" not in shown_notes(cell)
    told = IOSpec(inputs=tuple(reversed(remembering_iospec(1).inputs)), outputs=remembering_iospec(1).outputs)
    given = import_onnx(noting(cell, tmp_path / "n.onnx", iospec=OTHER_FORM), tmp_path / "like", like=told)
    assert DROPPED not in given.record.metadata  # the caller's own description goes before the noted one, which is then not looked at


def test_convert_and_bench_say_which_note_was_not_used(cell: Path, tmp_path: Path) -> None:
    path = renamed(cell, tmp_path / "r.onnx", "memory", "past")
    made = edgekd.convert(path, to="onnx", out=tmp_path / "m.onnx", progress=False)
    (line,) = made.notes
    assert "a note in the file was not used: iospec: it describes the input 'memory'" in line
    assert "not used" not in shown_notes(tmp_path / "m.onnx")
    done = command("bench", path, "--target", "null")
    assert done.exit_code == 0, done.output
    assert "in the file: not used: iospec: it describes the input 'memory', which the graph lacks" in done.stdout
    assert "one inference" in done.stdout


def test_a_tflite_file_with_a_stale_description_is_read_by_its_graph(tmp_path: Path) -> None:
    pytest.importorskip("ai_edge_litert")
    from edgekd.models import tflite_file
    from edgekd.models.tflite_artifact import NOTES, annotate_tflite, import_tflite
    from edgekd.testing.tflite_models import remembering_tflite

    source = annotate_tflite(remembering_tflite(tmp_path / "made", batch=1), tmp_path / "noted", {"labels": '["cat"]'})
    fresh = import_model(source.entry, tmp_path / "fresh")
    assert (fresh.record.iospec.state, DROPPED in fresh.record.metadata) == (remembering_iospec().state, False)
    model = tflite_file.load_model(source.entry)
    told = json.loads(tflite_file.read_metadata(model)[NOTES])
    for number, (form, words) in enumerate((({"type": "edgekd.io/99"}, "edgekd.io/99"), ({**told["iospec"], "inputs": told["iospec"]["outputs"]}, "'total'"))):
        tflite_file.set_metadata(model, {NOTES: json.dumps({**told, "iospec": form}).encode()})
        path = tmp_path / f"{number}.tflite"
        path.write_bytes(tflite_file.pack_model(model))
        for made in (import_model(path, tmp_path / f"taken-{number}"), import_tflite(path, tmp_path / f"in-{number}")):
            assert words in made.record.metadata[DROPPED] or "memory" in made.record.metadata[DROPPED]
            assert (made.record.iospec.state, made.record.metadata["labels"]) == ((), '["cat"]')
        assert (tmp_path / f"taken-{number}" / "model.tflite").read_bytes() == path.read_bytes()
        assert "iospec" in shown_notes(path)["not used"]


# ------------------------------------------------------------------------------------------ where a file comes from


def test_a_file_says_which_file_it_was_made_of_over_all_hops(cell: Path, tmp_path: Path) -> None:
    plain = tmp_path / "plain.onnx"
    model = load_model(cell)
    set_notes(model, {})
    onnx.save(model, str(plain))
    assert "source" not in read_metadata(plain)
    first = edgekd.convert(plain, to="onnx", outputs=("total",), out=tmp_path / "first.onnx", progress=False)
    assert read_metadata(tmp_path / "first.onnx")["source"] == first.artifact.metadata["source"] == file_hash(plain) == sha256_file(plain)
    edgekd.convert(tmp_path / "first.onnx", to="onnx", precision="fp16", out=tmp_path / "half.onnx", progress=False)
    assert read_metadata(tmp_path / "half.onnx")["source"] == file_hash(plain)


@pytest.mark.slow
@pytest.mark.torch
def test_the_source_is_the_callers_module_whatever_is_wrapped_around_it(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    torch.manual_seed(0)

    class Two(torch.nn.Module):  # type: ignore[misc,name-defined]
        """Two outputs of one layer."""

        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(4, 3)

        def forward(self, x: Any) -> dict[str, Any]:
            logits = self.layer(x)
            return {"logits": logits, "double": 2 * logits}

    net, x = Two(), np.random.default_rng(0).uniform(0, 1, (3, 4)).astype(np.float32)
    softmax = OutputProcessing(kind="softmax", where="inside", output="logits")
    inside = Processing(inputs={"x": InputProcessing(where="inside", mean=(0.5,), std=(0.5,))}, outputs=(softmax,))
    out, example = tmp_path / "m.onnx", {"x": x}
    made = edgekd.convert(net, to="onnx", example=example, outputs=("logits",), processing=inside, out=out, progress=False)
    assert read_metadata(out)["source"] == made.artifact.metadata["source"] == weights_hash(net)


# ------------------------------------------------------------------------------------------ what commands show


def test_bench_shows_what_a_file_is_made_of(cell: Path, tmp_path: Path) -> None:
    out = tmp_path / "half.onnx"
    made = edgekd.convert(cell, to="onnx", precision="fp16", out=out, progress=False)
    wanted = {"labels": "cat, dog", "precision": "fp16", "version": edgekd.__version__, "parent": made.artifact.parent, "source": file_hash(cell)}
    done = command("bench", out, "--target", "null")
    assert done.exit_code == 0, done.output
    shown = dict(line.removeprefix("in the file: ").split(": ", 1) for line in done.stdout.splitlines() if line.startswith("in the file: "))
    assert shown == wanted
    edgekd.convert(out, to="onnx", out=tmp_path / "half", progress=False)
    assert f"in the file: source: {file_hash(cell)}" in command("bench", tmp_path / "half", "--target", "null").stdout
    body = json.loads(command("bench", out, "--target", "null", "--json").stdout)
    assert body["file_notes"]["source"] == wanted["source"]


def test_convert_shows_what_its_file_is_made_of(cell: Path, tmp_path: Path) -> None:
    done = command("convert", cell, "-o", tmp_path / "m.onnx", "--outputs", "total,memory.next")
    assert done.exit_code == 0, done.output
    told = read_metadata(tmp_path / "m.onnx")
    for line in (f"source: {file_hash(cell)}", "labels: cat, dog", "precision: fp32"):
        assert f"in the file: {line}" in done.stdout
    assert told["source"] == file_hash(cell)
    stale = command("convert", renamed(cell, tmp_path / "r.onnx", "memory", "past"), "-o", tmp_path / "n.onnx")
    assert "note: a note in the file was not used: iospec: it describes the input 'memory'" in stale.stdout


def test_bench_shows_nothing_of_a_file_of_others(tmp_path: Path) -> None:
    model = load_model(remembering(tmp_path / "made", batch=1).entry)
    set_notes(model, {})
    onnx.save(model, str(tmp_path / "m.onnx"))
    assert shown_notes(tmp_path / "m.onnx") == {}
    done = command("bench", tmp_path / "m.onnx", "--target", "null")
    assert done.exit_code == 0, done.output
    assert "in the file" not in done.stdout

"""Streaming cells: equal to the network over whole sequences, refused where they cannot be, with their state through every hop."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgekd
from edgekd.errors import ConversionRejected, DataError, ModelError, ParityRejected
from edgekd.models.model_file import import_model
from edgekd.models.onnx_file import load_model
from edgekd.records import Artifact, IOSpec, StatePair, TensorSpec
from edgekd.streaming import StreamingCell, streaming_cell

torch = pytest.importorskip("torch")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.torch
nn = torch.nn

SEQUENCES = np.random.default_rng(0).standard_normal((4, 7, 5)).astype(np.float32)


class Net(nn.Module):  # type: ignore[misc, name-defined]
    """A recurrent layer and a head: every step's logits, and those of the last step."""

    def __init__(self, kind: Any, batch_first: bool = True, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rnn = kind(5, 8, batch_first=batch_first, **options)
        self.head = nn.Linear(options.get("proj_size") or 8, 3)

    def forward(self, x: Any) -> dict[str, Any]:
        y, _ = self.rnn(x)
        return {"logits": self.head(y), "last": self.head(y[:, -1] if self.rnn.batch_first else y[-1])}


class Wrapped(nn.Module):  # type: ignore[misc, name-defined]
    """A GRU within what `body` makes of its input and its output."""

    def __init__(self, body: Callable[[Any, Any], Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.gru, self.body = nn.GRU(5, 5, batch_first=True), body

    def forward(self, x: Any) -> Any:
        return self.body(self.gru, x)


KINDS: dict[str, dict[str, Any]] = {
    "lstm": {"kind": nn.LSTM},
    "two layers with dropout": {"kind": nn.LSTM, "num_layers": 2, "dropout": 0.5},
    "projection": {"kind": nn.LSTM, "proj_size": 4},
    "gru without bias": {"kind": nn.GRU, "bias": False, "num_layers": 2},
    "rnn": {"kind": nn.RNN},
    "relu": {"kind": nn.RNN, "nonlinearity": "relu"},
    "steps first": {"kind": nn.LSTM, "batch_first": False},
}


def made(name: str, **options: Any) -> tuple[Any, StreamingCell, np.ndarray]:
    asked = KINDS[name]
    first = asked.get("batch_first", True)
    x = SEQUENCES if first else np.ascontiguousarray(SEQUENCES.swapaxes(0, 1))
    net = Net(**asked).eval()
    return net, streaming_cell(net, x, time_axis=1 if first else 0, **options), x


@pytest.mark.filterwarnings("ignore:LSTM with projections")
@pytest.mark.parametrize("written", [None, True])
@pytest.mark.parametrize("name", KINDS)
def test_a_cell_gives_what_the_network_gives_for_whole_sequences(name: str, written: bool | None) -> None:
    net, cell, x = made(name, written_out=written)
    with torch.no_grad():
        whole = net(torch.from_numpy(x))
    found = cell.run(x)
    logits = whole["logits"].numpy() if cell.time_axis else whole["logits"].numpy().swapaxes(0, 1)
    np.testing.assert_allclose(found["logits"], logits, atol=1e-6)
    np.testing.assert_allclose(found["last"][:, -1], whole["last"].numpy(), atol=1e-6)
    assert cell.parity.passed
    assert np.ptp(found["logits"]) > 0.1
    assert type(net.rnn) is KINDS[name]["kind"]
    states = cell.iospec.state_inputs
    assert states == (("rnn.h", "rnn.c") if KINDS[name]["kind"] is nn.LSTM else ("rnn.h",))
    assert all(array.any() == 0 for array in cell.initial.values())
    assert cell.iospec.step_inputs == ("x",)


def test_every_step_is_a_sample_with_the_state_before_it() -> None:
    _, cell, x = made("lstm")
    steps, run = cell.steps(x), cell.run(x)
    assert {name: array.shape for name, array in steps.items()} == {"x": (28, 5), "rnn.h": (28, 1, 8), "rnn.c": (28, 1, 8)}
    assert not steps["rnn.c"][::7].any()
    np.testing.assert_array_equal(steps["rnn.h"][1:7], run["rnn.h.next"][0, :6])


@pytest.mark.parametrize(
    ("body", "error", "subject"),
    [
        (lambda gru, x: gru(x)[0].mean(1), ParityRejected, "output"),
        (lambda gru, x: {"fine": gru(x)[0], "bad": torch.softmax(gru.weight_hh_l0.sum() + x, 1)}, ParityRejected, "bad"),
        (lambda gru, x: nn.functional.avg_pool1d(gru(x)[0].transpose(1, 2), 3, 1, 1), ParityRejected, "output"),
        (lambda gru, x: gru(gru(x)[0])[0], ConversionRejected, "gru"),
        (lambda gru, x: gru(x, torch.ones(1, len(x), 5))[0], ConversionRejected, "gru"),
        (lambda gru, x: gru(x[0])[0], ConversionRejected, "gru"),
        (lambda gru, x: nn.functional.conv1d(gru(x)[0].transpose(1, 2), torch.ones(1, 5, 3)), ConversionRejected, "Wrapped"),
        (lambda gru, x: x * 2.0, ConversionRejected, "Wrapped"),
        (lambda gru, x: gru(x)[0] @ gru(x.detach())[0].transpose(1, 2), ConversionRejected, "gru"),
        (lambda gru, x: (y := gru(x)[0]) @ y.transpose(1, 2), ModelError, "output"),
    ],
    ids=["mean", "softmax over time", "pooling", "twice", "initial state", "no batch", "convolution", "no layer", "twice in one product", "attention"],
)
def test_a_network_that_looks_at_other_steps_is_refused_by_name(body: Any, error: type[Exception], subject: str) -> None:
    with pytest.raises(error) as refused:
        streaming_cell(Wrapped(body), SEQUENCES)
    assert refused.value.subject == subject  # type: ignore[attr-defined]


def test_the_first_step_that_differs_is_told() -> None:
    def body(gru: Any, x: Any) -> Any:
        y = gru(x)[0]
        return y + (torch.arange(x.shape[1]) >= 4)[None, :, None]

    with pytest.raises(ParityRejected, match="step 5 of 7"):
        streaming_cell(Wrapped(body), SEQUENCES)


def test_a_bidirectional_layer_needs_the_future() -> None:
    with pytest.raises(ConversionRejected, match="future") as refused:
        streaming_cell(nn.Sequential(nn.Linear(5, 5), nn.LSTM(5, 4, bidirectional=True, batch_first=True)), SEQUENCES)
    assert refused.value.subject == "1"


def test_a_static_input_goes_in_whole_and_an_example_that_proves_nothing_is_refused() -> None:
    class Conditioned(nn.Module):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(5, 5, batch_first=True)

        def forward(self, x: Any, speaker: Any) -> Any:
            return self.gru(x)[0] + speaker[:, None]

    given = {"x": SEQUENCES, "speaker": SEQUENCES[:, 0]}
    cell = streaming_cell(Conditioned(), given, static=("speaker",))
    assert cell.sequences(given)["speaker"].shape == (4, 7, 5)
    assert [tensor.shape for tensor in cell.iospec.inputs] == [("batch", 5), ("batch", 5), ("batch", 1, 5)]
    with pytest.raises(DataError, match="proves nothing"):
        streaming_cell(Wrapped(lambda gru, x: gru(x)[0]), np.ones((2, 5, 5)))
    with pytest.raises(DataError, match="too short"):
        streaming_cell(Wrapped(lambda gru, x: gru(x)[0]), SEQUENCES[:, :2])
    with pytest.raises(DataError, match="speakr"):
        streaming_cell(Conditioned(), given, static=("speakr",))


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[StreamingCell, edgekd.conversion.convert.Conversion]:
    """The LSTM's cell as a folder with an ONNX artifact."""
    _, cell, x = made("two layers with dropout")
    out = tmp_path_factory.mktemp("cell") / "onnx"
    return cell, edgekd.convert(cell.module, to="onnx", example=cell.steps(x), out=out, progress=False)


def test_onnx_keeps_the_state_in_the_record_and_in_the_file(exported: Any, tmp_path: Path) -> None:
    cell, conversion = exported
    record = Artifact.load(Path(conversion.out) / "artifact.json")
    assert record.iospec.state == cell.iospec.state
    assert [node.op_type for node in load_model(conversion.stored.entry).graph.node].count("LSTM") == 2
    alone = import_model(conversion.stored.entry, tmp_path)
    assert alone.record.iospec.state == cell.iospec.state


@pytest.mark.parametrize("profile", ["local", "null"])
def test_a_runtime_steps_sequences_as_torch_does(exported: Any, profile: str) -> None:
    cell, conversion = exported
    with edgekd.connect(profile) as target:
        found = target.runtime.infer(conversion.stored, cell.sequences(SEQUENCES))
    for name, value in cell.run(SEQUENCES).items():
        np.testing.assert_allclose(found[name], value, atol=1e-5)


def test_fp16_onnx_keeps_the_state(exported: Any, tmp_path: Path) -> None:
    cell, conversion = exported
    made = edgekd.convert(conversion.stored, to="onnx", precision="fp16", example=cell.steps(SEQUENCES), out=tmp_path / "h.onnx", progress=False)
    assert import_model(tmp_path / "h.onnx", tmp_path / "in").record.iospec.state == cell.iospec.state == made.artifact.iospec.state


def sqnr_db(reference: np.ndarray, other: np.ndarray) -> float:
    error = (reference.astype(np.float64) - other) ** 2
    return float(10 * np.log10((reference.astype(np.float64) ** 2).sum() / max(error.sum(), 1e-30)))


@pytest.mark.slow
@pytest.mark.parametrize("written", [None, True])
def test_int8_onnx_stays_near_the_float_cell_at_the_end_of_a_sequence(tmp_path: Path, written: bool | None) -> None:
    _, cell, _ = made("lstm", written_out=written)
    random = np.random.default_rng(3)
    calibration, judged = (random.standard_normal((6, 50, 5)).astype(np.float32) for _ in range(2))
    done = edgekd.convert(cell.module, to="onnx", precision="int8", calibration=cell.steps(calibration), out=tmp_path / "q", progress=False)
    assert done.artifact.iospec.state == cell.iospec.state
    kinds = [node.op_type for node in load_model(done.stored.entry).graph.node]
    assert ("LSTM" in kinds) == (written is None)
    with edgekd.connect("local") as target:
        found = target.runtime.infer(done.stored, cell.sequences(judged))
    reference = cell.run(judged)
    assert sqnr_db(reference["logits"][:, -1], found["logits"][:, -1]) > 21.5
    if written is None:
        np.testing.assert_allclose(found["rnn.h.next"], reference["rnn.h.next"], atol=1e-5)  # the LSTM stays in float
    else:
        assert sqnr_db(reference["rnn.h.next"][:, -1], found["rnn.h.next"][:, -1]) > 21.5


def tensor(name: str, *shape: int | str, dtype: str = "float32") -> TensorSpec:
    return TensorSpec(name=name, dtype=dtype, shape=shape)


@pytest.mark.parametrize(
    ("pair", "output", "match"),
    [
        (StatePair(output="gone", input="h"), tensor("h.next", 1, 4), "both have"),
        (StatePair(output="h.next", input="gone"), tensor("h.next", 1, 4), "both have"),
        (StatePair(output="h.next", input="h"), tensor("h.next", 1, 5), "does not fit"),
        (StatePair(output="h.next", input="h"), tensor("h.next", 1, 4, dtype="int8"), "does not fit"),
    ],
)
def test_a_state_that_does_not_fit_is_refused_by_its_input(pair: StatePair, output: TensorSpec, match: str) -> None:
    with pytest.raises(ModelError, match=match) as refused:
        IOSpec(inputs=(tensor("x", 1, 3), tensor("h", "batch", 4)), outputs=(output,), state=(pair,))
    assert refused.value.subject == pair.input


def test_a_file_tells_its_state_and_one_whose_note_is_broken_is_read_by_its_graph(exported: Any, tmp_path: Path) -> None:
    model = load_model(exported[1].stored.entry)
    (note,) = [item for item in model.metadata_props if item.key == "edgekd.iospec"]
    assert {pair["input"]: pair["output"] for pair in json.loads(note.value)["state"]} == {"rnn.h": "rnn.h.next", "rnn.c": "rnn.c.next"}
    note.value = "[1"
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    made = import_model(tmp_path / "m.onnx", tmp_path / "in")
    assert made.record.iospec.state == ()
    assert "m.onnx does not hold a edgekd.io/1" in made.record.metadata["dropped_notes"]

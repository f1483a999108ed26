"""Every row of the table of replacements is proven: what it is for is refused today, with this advice, and what it advises passes the preflight."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgekd.operators.replacements import REPLACEMENTS, Replacement, replacement_for

pytest.importorskip("torch")

from edgekd.operators.hop import torch_outputs
from tests.operators.replaced import CASES, MORE, check, check_case, local, rows_for

pytestmark = [pytest.mark.torch, pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")]


@pytest.mark.slow
@pytest.mark.parametrize("row", rows_for("onnx"), ids=lambda row: row.name)
def test_replacement_passes_where_the_original_is_refused_on_onnxruntime(row: Replacement, tmp_path: Path) -> None:
    with local("local", tmp_path) as target:
        check(row, target)


@pytest.mark.slow
@pytest.mark.parametrize("name", MORE)
def test_replacement_serves_other_networks_of_its_row_on_onnxruntime(name: str, tmp_path: Path) -> None:
    refused, replaced, inputs, row = MORE[name]
    with local("local", tmp_path) as target:
        check_case(next(item for item in REPLACEMENTS if item.name == row), target, refused, replaced, inputs)


def test_every_row_has_a_case_and_every_case_a_row() -> None:
    assert {row.name for row in REPLACEMENTS} == set(CASES)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[3]])
def test_replacement_computes_the_same(name: str) -> None:
    refused, replaced, inputs, _ = CASES[name]
    outputs = [torch_outputs(make().eval(), {"x": inputs})["output"] for make in (refused, replaced)]
    np.testing.assert_allclose(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["packed GRU", "packed RNN"])
def test_replacement_computes_the_same_for_other_networks(name: str) -> None:
    refused, replaced, inputs, _ = MORE[name]
    outputs = [torch_outputs(make().eval(), {"x": inputs})["output"] for make in (refused, replaced)]
    np.testing.assert_allclose(outputs[1], outputs[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("told", ["aten.cumprod", "aten::cumprod", "aten.cumprod.default", "torch.ops.aten.cumprod.default", "aten.cumprod_"])
def test_an_operator_is_known_in_any_spelling(told: str) -> None:
    assert "cumsum" in replacement_for([told], "own.Net", "onnx")
    assert replacement_for(["aten.relu"], "own.Net", "onnx") == ""
    assert replacement_for([], "torch.nn.LSTM(batch_first)", "onnx") == ""
    assert "nn.Linear" in replacement_for([], "torch.nn.LSTM(batch_first, proj_size)", "onnx")
    assert replacement_for([], "torch.nn.LSTM(batch_first, proj_size)", "tflite") == ""


def test_a_row_with_kinds_and_operators_wants_both() -> None:
    assert "pack_padded_sequence" in replacement_for(["aten._local_scalar_dense"], "torch.nn.GRU(batch_first)", "tflite")
    assert "torch.where" in replacement_for(["aten._local_scalar_dense"], "own.Net", "tflite")
    assert replacement_for(["aten.relu"], "torch.nn.GRU(batch_first)", "tflite") == ""

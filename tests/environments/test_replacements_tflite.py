"""The replacements for what does not reach TFLite, whose packages are too large for `make test`."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgekd.operators.replacements import REPLACEMENTS, Replacement
from tests.operators.replaced import MORE, check, check_case, local, rows_for

pytestmark = [pytest.mark.torch, pytest.mark.environments, pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN:UserWarning")]


@pytest.mark.parametrize("row", rows_for("tflite"), ids=lambda row: row.name)
def test_replacement_passes_where_the_original_is_refused_on_litert(row: Replacement, tmp_path: Path) -> None:
    with local("litert-local", tmp_path) as target:
        check(row, target)


@pytest.mark.parametrize("name", MORE)
def test_replacement_serves_other_networks_of_its_row_on_litert(name: str, tmp_path: Path) -> None:
    refused, replaced, inputs, row = MORE[name]
    with local("litert-local", tmp_path) as target:
        check_case(next(item for item in REPLACEMENTS if item.name == row), target, refused, replaced, inputs)

"""What every converter must do, as a suite of tests that those of a new one subclass."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from edgekd.artifact import StoredArtifact
from edgekd.contracts import Converter, ConvertRequest
from edgekd.errors import EdgekdError
from edgekd.records import Format
from edgekd.registry import load
from edgekd.storage import sha256_file


class ConverterContract:
    """Subclass it as `TestMyConverter`, set `converter_name` and write `request` and `unusable_source`; the tests come with it.

    `converter_name` is the name it is registered under. `files_are_reproducible` says whether the same request gives the same bytes twice.
    """

    converter_name: str
    files_are_reproducible = True

    def request(self, folder: Path) -> ConvertRequest:
        """A request that the converter can fulfil, into `folder`."""
        raise NotImplementedError

    def unusable_source(self, folder: Path) -> object:
        """A source that it must refuse."""
        raise NotImplementedError

    @pytest.fixture
    def converter(self) -> Converter:
        made = load("converters", self.converter_name)()
        assert isinstance(made, Converter)
        return made

    @pytest.fixture
    def folder(self, tmp_path: Path) -> Path:
        place = tmp_path / "made"
        place.mkdir()
        return place

    def test_converter_carries_its_registered_name(self, converter: Converter) -> None:
        assert converter.name == self.converter_name
        assert converter.source
        assert converter.target
        assert converter.precisions

    def test_convert_gives_verified_files_of_a_declared_precision(self, converter: Converter, folder: Path) -> None:
        made = converter.convert(self.request(folder))
        made.verify()
        assert made.folder == folder
        assert made.record.precision in converter.precisions
        assert made.record.format.value == converter.target
        assert made.record.opset > 0 or made.record.format is not Format.ONNX
        assert made.record.producers
        assert set(made.record.files) == {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}

    def test_convert_keeps_the_names_of_inputs(self, converter: Converter, folder: Path) -> None:
        request = self.request(folder)
        made = converter.convert(request)
        assert [tensor.name for tensor in made.record.iospec.inputs] == [tensor.name for tensor in request.iospec.inputs]

    def test_convert_leaves_its_source_and_example_alone(self, converter: Converter, folder: Path) -> None:
        request = self.request(folder)
        before = {name: array.copy() for name, array in request.example.items()}
        files = {path: sha256_file(path) for path in _files(request.source)}
        converter.convert(request)
        assert all(np.array_equal(before[name], array) for name, array in request.example.items())
        assert {path: sha256_file(path) for path in _files(request.source)} == files

    def test_convert_gives_the_same_bytes_twice(self, converter: Converter, folder: Path, tmp_path: Path) -> None:
        again = tmp_path / "again"
        again.mkdir()
        request = self.request(folder)
        first = converter.convert(request)
        second = converter.convert(dataclasses.replace(request, folder=again))
        assert (first.record.files == second.record.files) is self.files_are_reproducible

    def test_convert_is_silent(self, converter: Converter, folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
        request = self.request(folder)
        capfd.readouterr()
        converter.convert(request)
        out, err = capfd.readouterr()
        assert out == ""
        assert err == ""

    def test_convert_refuses_a_source_it_cannot_use(self, converter: Converter, folder: Path) -> None:
        request = dataclasses.replace(self.request(folder), source=self.unusable_source(folder))
        with pytest.raises(EdgekdError) as raised:
            converter.convert(request)
        assert raised.value.subject is not None


def _files(source: object) -> list[Path]:
    return [source.folder / name for name in source.record.files] if isinstance(source, StoredArtifact) else []

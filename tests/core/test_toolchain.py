"""Toolchains: the converters to a target's format, and what is refused before anything is measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgekd.conversion.toolchain import Toolchain, require_road, toolchain_of
from edgekd.errors import ConfigError, UnsupportedModel
from edgekd.quantize.recipes import candidate_schemes
from edgekd.records import Capabilities, Format, Precision
from edgekd.registry import table
from edgekd.spaces import Fixed
from edgekd.teachers import CallableTeacher, OnnxTeacher


def able(*formats: Format, schemes: tuple[str, ...] = ("u8s8", "s8s8", "static_int8", "dynamic_int8")) -> Capabilities:
    return Capabilities(formats=formats, precisions=(Precision.FP32, Precision.INT8), schemes=schemes)


def test_the_first_format_of_a_target_gives_converters_hops_and_the_host() -> None:
    onnx = toolchain_of(able(Format.ONNX, Format.TFLITE))
    assert (onnx.exporter, onnx.prepare, onnx.quantizer, onnx.host) == ("onnx-from-torch", "prepare-onnx", "qdq-from-onnx", "local")
    assert (onnx.export_hop, onnx.quantize_hop, onnx.device_hop) == ("torch -> onnx", "onnx -> int8", "onnx -> device")
    tflite = toolchain_of(able(Format.TFLITE))
    found = (tflite.exporter, tflite.prepare, tflite.quantizer, tflite.host)
    assert found == ("tflite-from-torch", "prepare-tflite", "quantized-tflite-from-tflite", "litert-local")
    assert (tflite.export_hop, tflite.quantize_hop, tflite.device_hop) == ("torch -> tflite", "tflite -> int8", "tflite -> device")
    assert set(found[:3]) <= set(table("converters"))
    assert tflite.converter("quantizer").name == "quantized-tflite-from-tflite"


def test_a_format_that_nothing_makes_from_torch_is_refused() -> None:
    with pytest.raises(UnsupportedModel, match="tensorrt"):
        toolchain_of(able(Format.TENSORRT))


def test_a_step_that_no_plug_in_makes_is_refused_when_it_is_needed() -> None:
    chain = Toolchain(format=Format.TENSORRT, exporter="onnx-from-torch", prepare="", quantizer="", host="")
    with pytest.raises(UnsupportedModel, match="quantizer"):
        chain.converter("quantizer")


def test_schemes_are_those_of_the_format() -> None:
    assert candidate_schemes(able(Format.ONNX)) == ("u8s8", "s8s8")
    assert candidate_schemes(able(Format.TFLITE)) == ("static_int8", "dynamic_int8")
    with pytest.raises(UnsupportedModel, match="static_int8"):
        candidate_schemes(able(Format.TFLITE, schemes=("u8s8",)))


def test_an_onnx_file_is_refused_for_a_tflite_target_with_the_road_named(tmp_path: Path) -> None:
    path = tmp_path / "net.onnx"
    path.write_bytes(b"never read")
    file, space = OnnxTeacher(path), Fixed(path)
    tflite, onnx = toolchain_of(able(Format.TFLITE)), toolchain_of(able(Format.ONNX))
    require_road(onnx, file, space)
    require_road(tflite, CallableTeacher(len), Fixed.__new__(Fixed))
    for teacher, student, role in ((file, Fixed.__new__(Fixed), "teacher"), (CallableTeacher(len), space, "student")):
        with pytest.raises(ConfigError, match=f"the {role} is an ONNX file") as raised:
            require_road(tflite, teacher, student)
        assert "tflite-from-onnx" in str(raised.value)
        assert "edgekd env" in str(raised.value)

"""The format graph: which roads there are, in which order, what they need, and what is said when there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgekd import registry
from edgekd.conversion.formats import Edge, FormatGraph, Route, edges_table, load_graph, routes
from edgekd.errors import ConfigError
from edgekd.records import Precision
from tests.core.convert_plugin import install_converters

ROOT = Path(__file__).resolve().parents[2]


def names(found: tuple[Route, ...]) -> list[tuple[str, ...]]:
    return [route.converters for route in found]


def edge(converter: str, source: str, target: str, precision: Precision = Precision.FP32, **more: object) -> Edge:
    return Edge(converter, source, target, precision, **more)  # type: ignore[arg-type]


def test_every_shipped_converter_is_an_edge_in_each_of_its_precisions() -> None:
    graph = load_graph()
    assert graph.broken == {}
    assert {one.converter for one in graph.edges} == set(registry.table("converters"))
    for name in registry.table("converters"):
        kind = registry.load("converters", name)
        seen = [one for one in graph.edges if one.converter == name]
        assert [(one.source, one.target, one.precision) for one in seen] == [(kind.source, kind.target, precision) for precision in kind.precisions]


@pytest.mark.parametrize(
    ("source", "target", "precision", "best"),
    [
        ("torch", "onnx", "fp32", ("onnx-from-torch",)),
        ("torch", "onnx", "int8", ("onnx-from-torch", "qdq-from-onnx")),
        ("torch", "saved_model", "fp32", ("onnx-legacy-from-torch", "saved-model-from-onnx")),
        ("torch", "tflite", "fp32", ("tflite-from-torch",)),
        ("torch", "tflite", "int8", ("tflite-from-torch", "quantized-tflite-from-tflite")),
        ("onnx", "onnx", "int8", ("qdq-from-onnx",)),
        ("onnx", "tflite", "fp32", ("tflite-from-onnx",)),
        ("keras", "tflite", "fp16", ("saved-model-from-keras", "tflite-from-saved-model")),
        ("tflite", "tflite", "fp16", ("quantized-tflite-from-tflite",)),
    ],
)
def test_best_road_is_the_expected_one(source: str, target: str, precision: str, best: tuple[str, ...]) -> None:
    assert names(routes(source, target, precision))[0] == best


def test_no_road_leaves_a_format_twice_prepares_or_goes_on_after_quantizing() -> None:
    found = routes("torch", "tflite", "int8")
    assert len(found) == 9
    for route in found:
        left = [one.source for one in route.edges if one.source != one.target]
        assert len(left) == len(set(left))
        assert all(one.precision is Precision.FP32 for one in route.edges[:-1])
        assert all(one.changes for one in route.edges)


def test_via_takes_converters_and_formats_in_their_order() -> None:
    assert {route.formats[1] for route in routes("torch", "tflite", "fp32", via=("onnx",))} == {"onnx"}
    assert names(routes("torch", "tflite", "fp32", via=("onnx", "saved_model")))[0] == (
        "onnx-legacy-from-torch",
        "saved-model-from-onnx",
        "tflite-from-saved-model",
    )
    assert routes("torch", "tflite", "fp32", via=("saved_model", "onnx")) == ()
    assert names(routes("onnx", "onnx", "int8", via=("prepare-onnx",))) == [("prepare-onnx", "qdq-from-onnx")]


def test_roads_rank_by_hops_then_environments_then_cost() -> None:
    graph = FormatGraph(
        (
            edge("own-environment", "keras", "onnx", environment="onnx2tf", cost_s=1.0),
            edge("dear", "keras", "onnx", cost_s=100.0),
            edge("cheap", "keras", "onnx", cost_s=5.0),
            edge("first", "keras", "saved_model", cost_s=0.1),
            edge("second", "saved_model", "onnx", cost_s=0.1),
        ),
        {},
    )
    assert names(graph.routes("keras", "onnx")) == [("cheap",), ("dear",), ("own-environment",), ("first", "second")]


def test_an_environment_is_not_counted_where_its_module_is_installed() -> None:
    one = edge("x", "keras", "onnx", environment="tensorflow", here="json")
    assert not one.uses_environment()
    assert one.missing() == ()
    assert one.uses_environment(Path("somewhere"))


def test_missing_packages_and_environments_are_lines_to_run(tmp_path: Path) -> None:
    one = edge("x", "keras", "onnx", environment="onnx2tf", needs={"json": "", "no_such_module_anywhere": "android", "no_such_other": ""})
    assert one.missing(tmp_path) == ('pip install "edgekd[android]"', "pip install no_such_other", f"edgekd env create onnx2tf --path {tmp_path}")


def test_converters_of_other_packages_take_part_on_equal_terms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = routes("keras", "onnx")
    install_converters(tmp_path, monkeypatch, fake_dear="KerasDear", fake_onnx_from_keras="KerasToOnnx", fake_pack="Pack")
    assert before == ()
    assert names(routes("keras", "onnx")) == [("fake-dear",), ("fake-onnx-from-keras",)]
    assert ("fake-pack", "tflite-from-saved-model") in names(routes("onnx", "tflite"))


def test_a_converter_with_an_unknown_format_is_told_and_does_not_stop_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_converters(tmp_path, monkeypatch, fake_foreign="Foreign", fake_gone="NoSuchClass")
    graph = load_graph()
    assert set(graph.broken) == {"fake-foreign", "fake-gone"}
    assert "paper" in graph.broken["fake-foreign"]
    assert graph.routes("onnx", "onnx", "int8")
    with pytest.raises(ConfigError, match="paper"):
        graph.routes("onnx", "onnx", "int8", via=("fake-foreign",))


def test_no_road_lists_what_exists() -> None:
    graph = load_graph()
    assert graph.routes("tflite", "onnx") == ()
    told = str(graph.no_route("tflite", "onnx", Precision.FP32))
    for part in ("tflite int8", "torch by onnx-from-torch", "edgekd.converters"):
        assert part in told
    assert "leave out via" in str(graph.no_route("onnx", "onnx", Precision.INT8, ("saved_model",)))


@pytest.mark.parametrize(
    ("source", "target", "precision", "via", "remedy"),
    [
        ("onx", "tflite", "fp32", (), "onnx .did you mean this"),
        ("onnx", "tflight", "fp32", (), "tflite .did you mean this"),
        ("onnx", "tflite", "int4", (), "int8 .did you mean this"),
        ("onnx", "tensorrt", "fp32", (), "convert to onnx"),
        ("onnx", "torch", "fp32", (), "onnx, saved_model"),
        ("onnx", "tflite", "fp32", ("tflite-from-onx",), "tflite-from-onnx .did you mean this"),
    ],
)
def test_wrong_names_are_refused_with_the_near_ones(source: str, target: str, precision: str, via: tuple[str, ...], remedy: str) -> None:
    with pytest.raises(ConfigError, match=remedy):
        routes(source, target, precision, via)


def test_the_table_in_the_docs_is_that_of_the_graph() -> None:
    text = (ROOT / "docs" / "converting.md").read_text(encoding="utf-8")
    assert edges_table(load_graph()) in text

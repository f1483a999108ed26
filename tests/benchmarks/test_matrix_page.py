"""The page of the conversion matrix, made of a result set by hand: no cell is empty, none is wrong in silence, the goals are judged by their figures."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from edgekd.errors import ConversionRejected, WorkerFailed
from edgekd.records import Artifact, Format, HopParity, IOSpec, Precision, TensorParity, TensorSpec

pytest.importorskip("torch")
pytest.importorskip("sklearn")

pytestmark = pytest.mark.torch

ROOT = Path(__file__).resolve().parents[2]
GONE = ("networks", "conversion_matrix", "matrix_kit", "matrix_kit.cells", "matrix_kit.timing", "matrix_kit.page")


@pytest.fixture
def kit(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The parts of the command, from the folder that it runs in."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import conversion_matrix  # type: ignore[import-not-found, unused-ignore]
    from matrix_kit import cells, page, timing  # type: ignore[import-not-found, unused-ignore]

    yield SimpleNamespace(cells=cells, page=page, timing=timing, command=conversion_matrix)
    for name in GONE:
        sys.modules.pop(name, None)


def artifact(mark: str, precision: Precision, format: Format = Format.TFLITE) -> Artifact:
    tensor = TensorSpec(name="x", dtype="float32", shape=(1, 4))
    spec = IOSpec(inputs=(tensor,), outputs=(msgspec.structs.replace(tensor, name="output"),))
    return Artifact(files={"m": mark}, entry="m", format=format, precision=precision, iospec=spec, size_bytes=12345, producers={"onnx2tf": "1.2"})


def parity(kit: Any, sqnr: float, passed: bool = True, name: str = "output") -> HopParity:
    row = TensorParity(name=name, max_abs=0.25, max_rel=0.1, sqnr_db=sqnr, cosine=0.98765432, tolerance=20.0, passed=passed, reason="" if passed else "too far")
    other = msgspec.structs.replace(row, name="other", sqnr_db=sqnr + 9.0, passed=True, reason="")
    return HopParity(hop="torch -> tflite int8", passed=passed, samples=64, tensors=(other, row), first_bad="" if passed else name)


def full(kit: Any, **figures: float) -> Any:
    """A whole result set: every cell ok at 40 dB but those in `figures`, every file timed, int8 twice as fast as fp32."""
    from networks import NETWORKS  # type: ignore[import-not-found, unused-ignore]

    cells, screens, ratios = [], [], []
    for network in NETWORKS:
        latencies: dict[str, dict[str, Any]] = {"onnx": {}, "tflite": {}}
        for kind, asked in kit.cells.KINDS.items():
            made = artifact(f"{network}{kind}", Precision(asked.precision), Format(asked.to))
            sqnr = figures.get(f"{network}_{kind}".replace("-", "_"), 40.0)
            told = parity(kit, sqnr)
            cells.append(
                kit.cells.Cell(
                    network=network,
                    kind=kind,
                    key="k",
                    status="ok",
                    seconds=1.5,
                    route=("a", "b"),
                    parity=told,
                    artifact=made,
                    made_at="2026-01-02T03:04:05+00:00",
                )
            )
            latencies[asked.to][kind] = kit.timing.Latency(p50_ms=2.0, lower_ms=1.9, upper_ms=2.1, launches=3)
        for form, one in latencies.items():
            screens.append(
                kit.timing.Screen(
                    network=network,
                    format=form,
                    hashes={},
                    latencies=one,
                    target="local",
                    fingerprint={"cpu_model": "Imaginary 9", "isa": "vnni"},
                    load_1m=0.5,
                    taken_at="2026-01-02T04:05:06+00:00",
                )
            )
        if network in kit.page.GOAL_NETWORKS:
            ratios.append(
                kit.timing.Ratio(
                    network=network,
                    slow="onnx-fp32",
                    fast="onnx-int8",
                    hashes={},
                    slow_ms=(2.0, 2.2, 2.1),
                    fast_ms=(1.0, 1.0, 1.1),
                    rejected=1,
                    taken_at="2026-01-02T04:05:06+00:00",
                )
            )
    return kit.page.Results(
        cells=tuple(cells), screens=tuple(screens), ratios=tuple(ratios), versions={"torch": "9.9"}, machine="m", made_at="2026-01-02T05:00:00+00:00"
    )


def section(page: str, title: str) -> dict[str, list[str]]:
    """The rows of a table by their first column."""
    lines = page.split(f"## {title}\n", 1)[1].split("\n## ", 1)[0].splitlines()
    rows = [[part.strip() for part in line.strip("|").split("|")] for line in lines if line.startswith("|") and not line.startswith("|---")]
    return {row[0]: row[1:] for row in rows[1:]}


def without(results: Any, **changes: Any) -> Any:
    return msgspec.structs.replace(results, **changes)


def test_whole_result_set_lacks_nothing_and_states_its_conditions(kit: Any) -> None:
    page, missing = kit.page.render(full(kit))
    assert missing == []
    assert "MISSING" not in page
    for told in (
        "Imaginary 9",
        "torch 9.9",
        "onnx2tf 1.2",
        "2026-01-02 04:05 UTC",
        "load average (1 minute) 0.5 to 0.5",
        "TensorRT never read",
        "Seed 7",
        "64 others",
    ):
        assert told in page, told
    rows = section(page, "GRU")
    assert len(rows) == len(kit.cells.KINDS)
    assert rows["TFLite static int8"] == ["ok", "1.5", "40.0 (output)", "0.987654", "2.5e-01", "12", "2.000 (±0.100)", "`a`, `b`"]
    assert all(cell for row in rows.values() for cell in row)
    assert "Of 108 cells 108 are ok, 0 differ, 0 are refused, 0 are missing." in page


def test_file_outside_its_tolerance_shows_differs_with_its_reason(kit: Any) -> None:
    results = full(kit)
    bad = msgspec.structs.replace(
        results.cell("vit", "tflite-static"), status="DIFFERS", reason="torch -> tflite int8, output: too far", parity=parity(kit, 3.0, False)
    )
    page, missing = kit.page.render(without(results, cells=tuple(bad if (one.network, one.kind) == ("vit", "tflite-static") else one for one in results.cells)))
    row = section(page, "ViT")["TFLite static int8"]
    assert (row[0], row[2], row[-1]) == ("**DIFFERS**", "3.0 (output)", "`a`, `b`; torch -> tflite int8, output: too far")
    assert "**3.0 DIFFERS**" in section(page, "Overview")["ViT"]
    assert missing == []
    assert "107 are ok, 1 differ" in page


def test_refused_cell_shows_the_reason_and_needs_no_latency(kit: Any) -> None:
    results = full(kit)
    refused = kit.cells.Cell(network="gru", kind="onnx-tf-fp32", key="k", status="refused", reason="onnx-tf lacks it", seconds=0.4)
    page, missing = kit.page.render(
        without(results, cells=tuple(refused if (one.network, one.kind) == ("gru", "onnx-tf-fp32") else one for one in results.cells))
    )
    row = section(page, "GRU")["onnx-tf fp32"]
    assert (row[0], row[-1]) == ("**refused**", "onnx-tf lacks it")
    assert missing == []


def test_missing_cell_and_missing_latency_are_marked_and_named(kit: Any) -> None:
    results = full(kit)
    cells = tuple(one for one in results.cells if (one.network, one.kind) != ("unet", "tflite-fp16"))
    screens = tuple(one for one in results.screens if (one.network, one.format) != ("vit", "onnx"))
    page, missing = kit.page.render(without(results, cells=cells, screens=screens, ratios=results.ratios[1:]))
    assert section(page, "U-Net")["TFLite fp16"][0] == "**MISSING**"
    assert section(page, "ViT")["ONNX fp32"][6] == "**MISSING**"
    assert {"unet tflite-fp16", "vit onnx-fp32 latency", "vit onnx-tensorrt latency", "resnet20 int8 against fp32"} <= set(missing)
    assert len(missing) == 6


def test_latency_that_does_not_count_says_why(kit: Any) -> None:
    results = full(kit)
    noisy = kit.timing.Latency(p50_ms=2.0, lower_ms=1.0, upper_ms=3.0, launches=1, rejected=6, reason="6 of 7 launches rejected")
    none = kit.timing.Latency(reason="the target cannot run it: Foo")
    screens = tuple(
        msgspec.structs.replace(one, latencies={**one.latencies, "onnx-fp16": noisy, "onnx-tensorrt": none})
        if (one.network, one.format) == ("gru", "onnx")
        else one
        for one in results.screens
    )
    rows = section(kit.page.render(without(results, screens=screens))[0], "GRU")
    assert rows["ONNX fp16"][6:] == ["2.000 (±1.000) not valid", "`a`, `b`; latency: 6 of 7 launches rejected"]
    assert rows["TensorRT-ready Q/DQ ONNX"][6:] == ["none", "`a`, `b`; latency: the target cannot run it: Foo"]


@pytest.mark.parametrize(("own", "verdict"), [(40.6, "met"), (39.6, "met"), (39.4, "**missed**")])
def test_accuracy_goal_compares_with_the_best_other_road(kit: Any, own: float, verdict: str) -> None:
    figures = {"unet_tflite_static": own, "unet_onnx2tf_static": 38.0, "unet_onnx_tf_static": 40.0}
    row = section(kit.page.render(full(kit, **figures))[0], "Goals")["U-Net"]
    assert row[:5] == [f"{own:.2f}", "38.00", "40.00", f"{own - 40.0:+.2f} dB", verdict]


@pytest.mark.parametrize(("fast", "verdict"), [((1.0, 1.0, 1.1), "met"), ((1.3, 1.2, 1.2), "**missed**")])
def test_speed_goal_is_the_ratio_of_medians_with_the_spread_of_pairs(kit: Any, fast: tuple[float, ...], verdict: str) -> None:
    results = full(kit)
    ratios = tuple(msgspec.structs.replace(one, fast_ms=fast) if one.network == "unet" else one for one in results.ratios)
    row = section(kit.page.render(without(results, ratios=ratios))[0], "Goals")["U-Net"]
    low, high = min(a / b for a, b in zip((2.0, 2.2, 2.1), fast, strict=True)), max(a / b for a, b in zip((2.0, 2.2, 2.1), fast, strict=True))
    assert row[5:] == [
        "2.100",
        f"{sorted(fast)[1]:.3f}",
        f"{2.1 / sorted(fast)[1]:.2f} ({low:.2f} to {high:.2f}, 1 of 8 pairs were outside the limits of validity)",
        verdict,
    ]


def test_speed_goal_is_not_judged_where_no_pair_was_valid(kit: Any) -> None:
    results = full(kit)
    ratios = tuple(msgspec.structs.replace(one, rejected=8) if one.network == "unet" else one for one in results.ratios)
    row = section(kit.page.render(without(results, ratios=ratios))[0], "Goals")["U-Net"]
    assert row[-1] == "not judged: no pair was valid"
    assert "none was inside" in row[-2]


def test_reason_is_one_short_line_without_advice_paths_and_logs(kit: Any) -> None:
    error = ConversionRejected("it | failed", found="at\n/home/me/env/lib/a.py in b", hint="do that")
    assert kit.cells.told(error) == "it / failed: at a.py in b"
    failed = WorkerFailed("the process died", reason="died", log=Path("log"), tail="", found="its last words: noise", hint="read it", subject="x")
    assert kit.cells.told(failed) == "the process died"
    assert len(kit.cells.short("word " * 200)) <= 260


def test_times_of_other_files_are_left_out_and_a_cell_without_its_file_is_made_anew(kit: Any, tmp_path: Path) -> None:
    run = kit.command.Run(tmp_path)
    run.identities = dict.fromkeys(kit.command.NETWORKS, "same")
    place = run.place("gru", "tflite-fp32")
    made = msgspec.structs.replace(full(kit).cell("gru", "tflite-fp32"), key=run.key("gru", "tflite-fp32"))
    made.save(place / "cell.json")
    assert run.cell("gru", "tflite-fp32") is None
    (place / "artifact").mkdir()
    (place / "artifact" / "m").write_bytes(b"x")
    assert run.cell("gru", "tflite-fp32") == made
    msgspec.structs.replace(made, key="another network").save(place / "cell.json")
    assert run.cell("gru", "tflite-fp32") is None
    made.save(place / "cell.json")
    (screen,) = (one for one in full(kit).screens if (one.network, one.format) == ("gru", "tflite"))
    path = tmp_path / "times" / "gru-tflite.json"
    path.parent.mkdir()
    for mark, count in ((made.artifact.content_hash(), 1), ("another file", 0)):
        msgspec.structs.replace(screen, hashes={"tflite-fp32": mark}).save(path)
        assert len(run.results().screens) == count

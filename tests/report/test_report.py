"""The report as a reader and a browser meet it: complete, self-contained, escaped, the same bytes for the same data."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import msgspec
import numpy as np
import pytest

from edgekd.records import (
    Budget,
    Check,
    Fingerprint,
    Grade,
    HopParity,
    Launch,
    LaunchProtocol,
    Ledger,
    LedgerRow,
    Limits,
    Measurement,
    Outcome,
    Point,
    Score,
    Snapshot,
    TensorParity,
    Verdict,
)
from edgekd.report import plots
from edgekd.report.data import ClassRow, Curve, ReportData
from edgekd.report.ladder import ladder
from edgekd.report.render import render_report, write_report

FINGERPRINT = Fingerprint(fields={"cpu_model": "Test CPU", "runtime": "onnxruntime", "runtime_version": "1.20", "threads": "1"})


def measurement(label: str, latency_ms: float, *, simulated: str = "", seed: int = 0) -> Measurement:
    generator = np.random.default_rng(seed)

    def launch(index: int, scale: float, invalid: str = "") -> Launch:
        times = latency_ms * 1e6 * scale * np.exp(np.abs(generator.normal(0, 0.03, 200)))
        state = Snapshot(load_1m=0.4, temperature_c=51.0 + index / 10, governor="performance", steal_share=0.001)
        return Launch(
            label=label,
            index=index,
            samples_ns=tuple(int(value) for value in times),
            init_ns=9_000_000,
            first_ns=800_000,
            warmup_runs=50,
            warmup_s=1.1,
            cpu_share=0.99,
            before=state,
            after=state,
            invalid=invalid,
        )

    return Measurement(
        label=label,
        grade=Grade.VERDICT,
        artifact="ab" * 32,
        protocol=LaunchProtocol(),
        limits=Limits(temperature_max_c=None),
        launches=tuple(launch(index, float(np.exp(generator.normal(0, 0.02)))) for index in range(20)),
        rejected=(launch(20, 1.6, "stolen CPU time 0.040 above 0.020"),),
        fingerprint=FINGERPRINT,
        simulated=simulated,
        taken_at="2026-01-02T03:04:05+00:00",
    )


def sample(**changes: object) -> ReportData:
    latency = Check(
        name="latency p50", outcome=Outcome.PASS, value=0.41, limit=0.5, unit="ms", upper=0.44, confidence=0.99, n=20, reason="bound below the limit"
    )
    drop = Check(
        name="accuracy drop", outcome=Outcome.PASS, value=-0.004, limit=-0.03, unit="", lower=-0.02, upper=0.01, confidence=0.99, n=719, reason="within"
    )
    before, after = (
        Score(latency_ms=0.62, latency_error_ms=0.01, accuracy=0.981, size_bytes=310_000, precision="fp32"),
        Score(latency_ms=0.41, latency_error_ms=0.01, accuracy=0.979, size_bytes=92_000, precision="int8"),
    )
    rows = (
        LedgerRow(stage="search", step="candidates", decision="noted", reason="12 proposed, 10 measured, 2 rejected"),
        LedgerRow(stage="quantize", step="int8 u8s8", decision="kept", reason="faster by 34 %, drop within the budget", before=before, after=after),
        LedgerRow(stage="quantize", step="int8 entropy", decision="rolled back", reason="less accurate than minmax", before=after, after=before),
    )
    points = [
        Point(label=f"width={8 * w}", precision="int8", latency_ms=0.2 + 0.05 * w, lower_ms=0.19 + 0.05 * w, upper_ms=0.22 + 0.05 * w, accuracy=0.9 + 0.01 * w)
        for w in range(1, 6)
    ]
    points += [
        Point(label="width=64", precision="int8", latency_ms=0.8, lower_ms=0.78, upper_ms=0.84),
        Point(label="teacher", precision="fp32", latency_ms=1.0, lower_ms=0.98, upper_ms=1.03, accuracy=0.985, role="teacher"),
        Point(label="width=32", precision="int8", latency_ms=0.41, lower_ms=0.40, upper_ms=0.42, accuracy=0.979, role="student"),
    ]
    tensor = TensorParity(name="output", max_abs=1.2e-5, max_rel=1e-5, sqnr_db=88.1, cosine=0.9999999, tolerance=1e-3, passed=True)
    bad = TensorParity(name="output", max_abs=2.0, max_rel=1.0, sqnr_db=3.1, cosine=0.7, tolerance=0.5, passed=False, constant=True)
    data = ReportData(
        title="digits",
        created_at="2026-01-02T03:04:05+00:00",
        verdict=Verdict(outcome=Outcome.PASS, checks=(latency, drop), reason="latency and accuracy within the budget"),
        budget=Budget(latency_share=0.5, max_drop=0.03),
        limit_ms=0.5,
        target="local",
        profile_text='name = "local"\n[runtime]\nkind = "onnxruntime"\n',
        fingerprint=FINGERPRINT,
        proven_on_hardware=True,
        ledger=Ledger(rows=rows),
        points=tuple(points),
        measurements=(measurement("teacher", 1.0), measurement("student", 0.41, seed=1)),
        curves=(
            Curve(
                label="width=32", metric="accuracy", train_loss=tuple(2.0 * 0.9**i for i in range(60)), validation=tuple(1 - 0.9 * 0.9**i for i in range(60))
            ),
        ),
        per_class=tuple(ClassRow(name=str(i), n=70, teacher_accuracy=0.98, student_accuracy=0.97) for i in range(10)),
        parity=(
            HopParity(hop="torch -> onnx", passed=True, samples=32, tensors=(tensor,), agreement=1.0),
            HopParity(hop="onnx -> int8", passed=False, samples=32, tensors=(bad,), agreement=0.5, first_bad="conv1"),
        ),
        versions={"edgekd": "0.1.0", "onnxruntime": "1.20"},
        paths={"bundle": "runs/digits/bundle"},
        task="classification",
        search_counts={"proposed": 12, "measured": 10, "rejected": 2},
    )
    return msgspec.structs.replace(data, **changes)


class Reader(HTMLParser):
    """The tags and the visible text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def full() -> str:
    return render_report(sample())


def test_report_shows_every_part(full: str) -> None:
    text = Reader(full).text
    for part in (
        "PASS: every budget is met",
        "0.4100 ms",
        "at most 0.5 of the teacher's, 0.5000 ms (p50, end to end)",
        "0.6200 ± 0.0100 ms → 0.4100 ± 0.0100 ms",
        "310.0 kB → 92.0 kB",
        "rolled back",
        "stolen CPU time 0.040 above 0.020",
        "onnxruntime 1.20, 1 thread(s), Test CPU",
        "51.0 to 52.9 °C",
        "temperature max c not checked",
        "torch -> onnx",
        "first differs at conv1",
        "12 proposed, 10 measured, 2 rejected",
        "runs/digits/bundle",
        "9.000 ms",
    ):
        assert part in text, part


def test_report_is_self_contained(full: str) -> None:
    tags = Reader(full).tags
    assert not [tag for tag, _ in tags if tag in ("script", "link", "img", "iframe", "object")]
    references = [value for _, attributes in tags for name, value in attributes.items() if name in ("href", "xlink:href", "src") and value]
    assert all(value.startswith("#") for value in references)
    assert "url(http" not in full
    assert "@import" not in full


def test_figures_are_named_ids_are_unique_and_references_resolve(full: str) -> None:
    tags = Reader(full).tags
    ids = [attributes["id"] for _, attributes in tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    figures = [attributes for tag, attributes in tags if tag == "svg"]
    assert len(figures) == 5
    for attributes in figures:
        assert attributes["role"] == "img"
        assert set((attributes["aria-labelledby"] or "").split()) <= set(ids)
    used = set(re.findall(r"url\(#([^)]+)\)", full)) | {value[1:] for _, a in tags for n, value in a.items() if n == "href" and value}
    assert used <= set(ids)


def test_table_headers_have_a_scope(full: str) -> None:
    headers = [attributes for tag, attributes in Reader(full).tags if tag == "th"]
    assert headers
    assert all(attributes.get("scope") in ("col", "row") for attributes in headers)


def test_same_data_give_the_same_bytes(full: str) -> None:
    assert render_report(sample()) == full


def test_svg_colours_follow_the_page(full: str) -> None:
    drawn = "".join(re.findall(r"<svg.*?</svg>", full, flags=re.DOTALL))
    assert set(re.findall(r"#[0-9a-f]{6}\b", drawn)) <= {"#000000", "#ffffff"}
    assert {"var(--teacher)", "var(--student)", "var(--limit)", "var(--ink)"} <= set(re.findall(r"var\(--\w+\)", drawn))


def test_names_from_users_stay_text_and_are_no_mathematics() -> None:
    evil = '<script>alert(1)</script>$x^{"&'
    point = Point(label=evil, precision="fp32", latency_ms=1.0, lower_ms=0.9, upper_ms=1.1, accuracy=0.5, role="teacher")
    data = sample(
        title=evil,
        notes=(evil,),
        points=(point,),
        measurements=(measurement(evil, 0.4),),
        metric=evil,
        per_class=(ClassRow(name=evil, n=1, teacher_accuracy=1, student_accuracy=1),),
        curves=(Curve(label=evil, metric=evil, train_loss=(1.0, 0.5), validation=(0.1, 0.2)),),
        profile_text=evil,
    )
    reader = Reader(render_report(data))
    assert "script" not in [tag for tag, _ in reader.tags]
    assert reader.text.count("<script>alert(1)</script>$x^{") >= 8


def test_simulation_is_marked_wherever_latencies_stand() -> None:
    verdict = Verdict(outcome=Outcome.REFUSE, checks=(), reason="simulated", simulated="null")
    text = Reader(render_report(sample(simulated="null", verdict=verdict, measurements=(measurement("student", 0.4, simulated="null"),)))).text
    assert "REFUSE: simulated" in text
    assert "the evidence does not decide" not in text
    assert "SIMULATED. Every latency in this report comes from a simulation (null" in text
    assert "Latency (simulated)" in text
    assert "What was measured (simulated)" in text


def test_ledger_is_marked_once_when_every_row_is_simulated_and_by_row_when_some_are() -> None:
    rows = tuple(msgspec.structs.replace(row, simulated="null") for row in sample().ledger.rows)
    whole = Reader(render_report(sample(ledger=Ledger(rows=rows)))).text
    assert "before → after; SIMULATED: null" in whole
    assert "[simulated: null]" not in whole
    mixed = Reader(render_report(sample(ledger=Ledger(rows=(rows[0], *sample().ledger.rows[1:]))))).text
    assert mixed.count("[simulated: null]") == 1


def test_real_target_is_not_called_simulated_and_an_unproven_one_says_so(full: str) -> None:
    assert "SIMULATED" not in Reader(full).text
    assert "Never ran on real hardware" not in Reader(full).text
    assert "Never ran on real hardware" in Reader(render_report(sample(proven_on_hardware=False))).text


def test_cards_show_what_ships_and_training_notes_stand_under_training() -> None:
    shipped = (("artifact", "width=32"), ("precision", "int8"), ("size", "92.0 kB"), ("accuracy", "0.9790 (teacher 0.9850)"))
    text = Reader(render_report(sample(shipped=shipped, notes=("agreement 0.99",), training_notes=("81226 MB are free",)))).text
    for name, value in shipped:
        assert f"Ships: {name} {value}" in text
    assert text.index("agreement 0.99") < text.index("What was measured") < text.index("81226 MB are free") < text.index("By class")
    assert "Seed 0 Ships" not in text
    failed = Verdict(outcome=Outcome.FAIL, checks=(), reason="too slow")
    assert "Judged: precision int8" in Reader(render_report(sample(shipped=shipped, verdict=failed))).text


def test_the_ladder_has_a_row_for_each_hop_and_names_the_first_that_differs() -> None:
    def tensor(name: str, sqnr_db: float, **facts: float | str | bool) -> TensorParity:
        row = TensorParity(name=name, max_abs=0.0, max_rel=0.0, sqnr_db=sqnr_db, cosine=1.0, tolerance=21.5, tolerance_kind="sqnr", passed=True)
        return msgspec.structs.replace(row, **facts)

    many = tuple(tensor(f"out{index}", 60.0 - index, passed=True) for index in range(6))
    hops = (
        HopParity(hop="torch -> exported", passed=True, samples=3, tensors=(tensor("y", 200.0, passed=True, top1=0.875, saturation=0.0625),)),
        HopParity(hop="exported -> onnx", passed=True, samples=3, tensors=many),
        HopParity(
            hop="onnx -> int8",
            passed=False,
            samples=3,
            tensors=(
                tensor("y", 7.25, passed=False, reason="clipped"),
                tensor("z", 50.0, passed=False, layout="NHWC -> NCHW"),
                tensor("n", -200.0, passed=False, nonfinite=2),
            ),
            findings=("saturated int8: half of it",),
        ),
    )
    plot = ladder(hops)
    assert plot is not None
    assert "The first hop that differs is onnx -> int8" in plot.text
    assert "torch -&gt; exported" in plot.svg
    for text in ("y exact", "y 7.2 dB, differs", "z 50.0 dB after NHWC -&gt; NCHW, differs", "n NaN or Inf, differs", "asked of int8"):
        assert text in plot.svg
    assert "out5" in plot.text
    assert "out0" not in plot.text
    assert ladder(()) is None
    text = Reader(render_report(sample(parity=hops))).text
    for cell in ("0.8750", "0.0625", "saturated int8: half of it"):
        assert cell in text


def test_parity_says_what_its_tolerance_is_relative_to() -> None:
    def tensor(kind: str, tolerance: float) -> TensorParity:
        return TensorParity(name=kind, max_abs=1e-5, max_rel=2e-5, sqnr_db=40, cosine=1, tolerance=tolerance, passed=True, tolerance_kind=kind)

    hop = HopParity(hop="a -> b", passed=True, samples=3, tensors=(tensor("relative", 5e-5), tensor("sqnr", 21.5)))
    text = Reader(render_report(sample(parity=(hop,)))).text
    assert "error at most 5.0e-05 of the largest value" in text
    assert "signal to error at least 21.5 dB" in text


def test_absent_parts_are_explained() -> None:
    empty = sample(
        verdict=None, limit_ms=None, ledger=Ledger(), points=(), measurements=(), curves=(), per_class=(), parity=(), versions={}, paths={}, search_counts={}
    )
    reader = Reader(render_report(empty))
    for part in (
        "NO VERDICT",
        "No check was made",
        "No plot of candidates",
        "No verdict-grade measurement",
        "The ledger has no rows",
        "No training curves",
        "No table by class",
        "No hop was compared",
        "Nothing was measured",
    ):
        assert part in reader.text, part
    assert "svg" not in [tag for tag, _ in reader.tags]


def test_summary_only_launches_are_drawn_by_their_maximum_and_say_why_there_is_no_curve() -> None:
    launch = Launch(label="student", index=0, summary_ns={"min": 300_000, "median": 400_000, "max": 500_000})
    only = msgspec.structs.replace(measurement("student", 0.4), launches=(launch,), rejected=())
    assert plots.launch_ms(launch, 50.0) == 0.5
    text = Reader(render_report(sample(measurements=(only,)))).text
    assert "gives a summary per launch only" in text
    assert "No launch was rejected" in text


def test_plots_name_their_numbers_in_words() -> None:
    data = sample()
    drawn = plots.pareto(data.points, 0.5, "accuracy")
    assert drawn is not None
    assert "8 measured points, 7 of them with accuracy" in drawn.text
    assert "student width=32 int8 0.4100 ms accuracy 0.9790" in drawn.text
    assert ET.fromstring(drawn.svg).tag == "svg"
    assert "budget 0.5000 ms" in drawn.svg


def test_write_report_writes_the_rendered_text(tmp_path: Path, full: str) -> None:
    write_report(sample(), tmp_path / "deep" / "report.html")
    assert (tmp_path / "deep" / "report.html").read_text() == full


def test_report_data_round_trips_as_json(tmp_path: Path) -> None:
    sample().save(tmp_path / "report.json")
    assert ReportData.load(tmp_path / "report.json") == sample()

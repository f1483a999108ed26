"""The page of the conversion matrix: every cell with its figures or its reason, the goals, and the conditions that the figures hold under."""

from __future__ import annotations

import msgspec
from networks import NETWORKS, OPEN, SEED

from edgekd.records import Record

from .cells import CALIBRATION, HELD_OUT, KINDS, OPSETS, Cell
from .timing import PAIRS, Latency, Ratio, Screen

GOAL_NETWORKS = ("resnet20", "mobilenet_v2", "unet")
GOAL_DB = 0.5
GOAL_RATIO = 1.8
_STATIC, _OTHERS = "tflite-static", ("onnx2tf-static", "onnx-tf-static")
_MISSING = "MISSING"


class Results(Record, tag="edgekd.benchmark.matrix/1", frozen=True, kw_only=True):
    """The raw figures of a matrix. `machine` and `versions` are those of the command that wrote it."""

    cells: tuple[Cell, ...]
    screens: tuple[Screen, ...]
    ratios: tuple[Ratio, ...]
    versions: dict[str, str]
    machine: str
    made_at: str

    def to_readable(self) -> bytes:
        """Indented JSON."""
        return msgspec.json.format(self.to_json(), indent=1) + b"\n"

    def cell(self, network: str, kind: str) -> Cell | None:
        """One cell, if it was made."""
        return next((cell for cell in self.cells if (cell.network, cell.kind) == (network, kind)), None)

    def latency(self, network: str, kind: str) -> Latency | None:
        """The latency of one cell's file, if it was taken."""
        return next((one.latencies[kind] for one in self.screens if one.network == network and kind in one.latencies), None)


def render(results: Results) -> tuple[str, list[str]]:
    """The page as Markdown, and the cells and latencies that it lacks; it marks each of them as missing."""
    missing: list[str] = []
    tables = [_network(results, network, missing) for network in NETWORKS]
    parts = [_INTRODUCTION, _conditions(results), "## Overview\n", _overview(results), _counts(results), "## Goals\n", _goals(results, missing), *tables]
    return "\n".join(parts), missing


_INTRODUCTION = """# Conversion matrix

Nine networks, each brought to every format by `edgekd.convert` and compared with torch. `make matrix` writes this page (`benchmarks/conversion_matrix.py`);
`docs/matrix.json` holds the raw figures. The networks are in `benchmarks/networks.py`: seeded weights that were not trained, batch-norm statistics from
real inputs. The figures say how faithful the tool chain is, not how accurate a task is.
"""


def _conditions(results: Results) -> str:
    first = results.screens[0] if results.screens else None
    fields = first.fingerprint if first else {}
    loads = [one.load_1m for one in results.screens if one.load_1m is not None]
    made = sorted(cell.made_at for cell in results.cells if cell.made_at)
    taken = sorted(one.taken_at for one in results.screens)
    device = ", ".join(f"{name} {fields[name]}" for name in ("cpu_model", "isa", "cores", "ram_mb", "os", "kernel") if fields.get(name))
    producers: dict[str, str] = {}
    for cell in results.cells:
        producers |= cell.artifact.producers if cell.artifact is not None else {}
    others = {name: version for name, version in producers.items() if name not in results.versions}
    rows = [
        "## Conditions\n",
        f"- Machine: {device or results.machine}; one thread. Everything is local; nothing is simulated.",
        f"- Versions: {', '.join(f'{name} {version}' for name, version in results.versions.items())}. "
        + (f"In environments of their own: {', '.join(f'{name} {version}' for name, version in sorted(others.items()))}." if others else ""),
        f"- Converted {_span(made)}; timed {_span(taken)}, load average (1 minute) {f'{min(loads):.1f} to {max(loads):.1f}' if loads else 'not known'}. "
        + "Above about 1.5 something else ran on the machine, and latencies are provisional.",
        f"- Inputs: scikit-learn's handwritten digits, side by side as images, as rows, as patches. int8 is calibrated (minmax) on {CALIBRATION} samples; "
        f"every figure is over {HELD_OUT} others, made of digits that calibrate nothing. Seed {SEED}.",
        f"- Norms in front of activations start with a bias of {OPEN:g}, not the usual 0. This was chosen after a first try with 0, where "
        "MobileNetV2-like gave 33 dB in fp16 and, outside the tolerance, 5 to 8 dB in int8 (ONNX, Q/DQ, TFLite dynamic and static; other roads were not run).",
        "- SQNR, cosine and largest error: the file on its runtime against torch, of the output with the least SQNR. "
        "200 dB stands for no difference. Tolerances: `docs/parity.md`.",
        "- `ok`: the file and every hop to it are within their tolerances. **DIFFERS**: the file exists, and a figure is outside, which the last column names. "
        "**refused**: there is no file; the last column has the text of the error.",
        "- Seconds: wall time of the one call, with comparing every hop; the first TFLite conversion of a command also loads litert-torch. "
        "Other work on the machine is in it.",
        "- Latency: p50 at batch 1, screen grade (fresh processes in turn, see `docs/measuring.md`): ONNX files of a network together on the target "
        "`local`, TFLite files together on `litert-local`. "
        "In brackets half the distance of the bounds (99 % each). Figures of different runtimes are of different screens.",
        "- **TensorRT never read the Q/DQ files.** Their figures are ONNX Runtime's on this CPU, which does not fuse signed activations; "
        "that latency says nothing about TensorRT.",
        "- onnx-tf knows no operator set that torch's exporter writes now, so that its column starts from an ONNX file of torch's older exporter: "
        f"the newest operator set of {', '.join(map(str, OPSETS))} that onnx-tf takes. Its SavedModel becomes TFLite by TensorFlow.",
        "",
    ]
    return "\n".join(rows)


def _span(times: list[str]) -> str:
    if not times:
        return "never"
    first, last = times[0][:16].replace("T", " "), times[-1][:16].replace("T", " ")
    return f"{first} UTC" if first == last else f"{first} to {last} UTC"


def _brief(cell: Cell | None) -> str:
    if cell is None:
        return f"**{_MISSING}**"
    if cell.worst is None:
        return "refused"
    figure = f"{cell.worst.sqnr_db:.1f}"
    return figure if cell.status == "ok" else f"**{figure} DIFFERS**"


def _overview(results: Results) -> str:
    rows = ["SQNR against torch in dB, of the worst output; reasons are in the tables below.\n"]
    rows += ["| network | " + " | ".join(kind.title for kind in KINDS.values()) + " |", "|---|" + "---|" * len(KINDS)]
    for name, network in NETWORKS.items():
        rows.append(f"| {network.title} | " + " | ".join(_brief(results.cell(name, kind)) for kind in KINDS) + " |")
    return "\n".join([*rows, ""])


def _counts(results: Results) -> str:
    wanted = len(NETWORKS) * len(KINDS)
    count = {status: sum(cell.status == status for cell in results.cells) for status in ("ok", "DIFFERS", "refused")}
    return f"Of {wanted} cells {count['ok']} are ok, {count['DIFFERS']} differ, {count['refused']} are refused, {wanted - sum(count.values())} are missing.\n"


def _network(results: Results, network: str, missing: list[str]) -> str:
    rows = [f"## {NETWORKS[network].title}\n"]
    rows += ["| format | result | s | SQNR dB | cosine | largest error | kB | p50 ms | road, and why not |", "|---|---|---|---|---|---|---|---|---|"]
    for kind, asked in KINDS.items():
        cell = results.cell(network, kind)
        if cell is None:
            missing.append(f"{network} {kind}")
            rows.append(f"| {asked.title} | **{_MISSING}** | - | - | - | - | - | - | not made yet |")
            continue
        if cell.worst is None or cell.artifact is None:
            rows.append(f"| {asked.title} | **{cell.status}** | {cell.seconds:.1f} | - | - | - | - | - | {cell.reason} |")
            continue
        worst = cell.worst
        where = f" ({worst.name})" if cell.parity is not None and len(cell.parity.tensors) > 1 else ""
        latency = results.latency(network, kind)
        if latency is None:
            missing.append(f"{network} {kind} latency")
        road = ", ".join(f"`{name}`" for name in cell.route)
        why = "; ".join(text for text in (cell.reason, "" if latency is None or not latency.reason else f"latency: {latency.reason}") if text)
        rows.append(
            f"| {asked.title} | {cell.status if cell.status == 'ok' else f'**{cell.status}**'} | {cell.seconds:.1f} | {worst.sqnr_db:.1f}{where} "
            f"| {worst.cosine:.6f} | {worst.max_abs:.1e} | {cell.artifact.size_bytes / 1e3:.0f} | {_milliseconds(latency)} "
            f"| {road}{'; ' + why if why else ''} |"
        )
    return "\n".join([*rows, ""])


def _milliseconds(latency: Latency | None) -> str:
    if latency is None:
        return f"**{_MISSING}**"
    if latency.p50_ms is None or latency.lower_ms is None or latency.upper_ms is None:
        return "none"
    return f"{latency.p50_ms:.3f} (±{(latency.upper_ms - latency.lower_ms) / 2:.3f})" + (" not valid" if latency.reason else "")


def _goals(results: Results, missing: list[str]) -> str:
    rows = [
        f"Static int8 TFLite by edgekd, without TensorFlow, is to lie within {GOAL_DB} dB of the best other road of the same run, or above it; "
        f"int8 ONNX is to be at least {GOAL_RATIO} times as fast as fp32 ONNX on a CPU with VNNI.\n",
        "| network | edgekd dB | onnx2tf dB | onnx-tf + TensorFlow dB | edgekd less the best other | goal | ONNX fp32 ms | ONNX int8 ms "
        "| ratio (smallest to largest pair) | goal |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for network in GOAL_NETWORKS:
        figures = [_decibel(results.cell(network, kind)) for kind in (_STATIC, *_OTHERS)]
        own, others = figures[0], [value for value in figures[1:] if value is not None]
        shown = [f"{value:.2f}" if value is not None else "none" for value in figures]
        gap = None if own is None or not others else own - max(others)
        verdict = "not known" if gap is None else "met" if gap >= -GOAL_DB else "**missed**"
        ratio = next((one for one in results.ratios if one.network == network), None)
        if ratio is None:
            missing.append(f"{network} int8 against fp32")
            speed = f"**{_MISSING}** | **{_MISSING}** | **{_MISSING}** | not known"
        else:
            low, high = ratio.spread
            slow, fast = _median(ratio.slow_ms), _median(ratio.fast_ms)
            held = "met" if ratio.ratio >= GOAL_RATIO else "**missed**"
            if ratio.rejected == PAIRS:
                held = "not judged: no pair was valid"
            noisy = f", {ratio.rejected} of {PAIRS} pairs were outside the limits of validity" if ratio.rejected else ""
            used = " and are used, since none was inside" if ratio.rejected == PAIRS else ""
            speed = f"{slow:.3f} | {fast:.3f} | {ratio.ratio:.2f} ({low:.2f} to {high:.2f}{noisy}{used}) | {held}"
        rows.append(f"| {NETWORKS[network].title} | {' | '.join(shown)} | {'none' if gap is None else f'{gap:+.2f} dB'} | {verdict} | {speed} |")
    rows.append(f"\nMilliseconds and ratio: medians over up to {PAIRS} launches of each file, taken in turn (ABBA), each launch's p50.\n")
    return "\n".join(rows)


def _decibel(cell: Cell | None) -> float | None:
    return None if cell is None or cell.worst is None else cell.worst.sqnr_db


def _median(values: tuple[float, ...]) -> float:
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


__all__ = ["GOAL_NETWORKS", "Results", "render"]

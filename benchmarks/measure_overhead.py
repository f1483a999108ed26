"""What measuring itself costs, and how well the two grades of measurement agree, on the machine at hand.

    python benchmarks/measure_overhead.py

Prints Markdown: the cost of a launch on the local target (from the call to the result, without the timed and warm-up loops), of `edgekd --help`,
and screen against verdict on models of different length: the medians, their ratio, and the spread from launch to launch. Takes about four minutes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from edgekd.artifact import StoredArtifact
from edgekd.contracts import BenchmarkRequest, Target
from edgekd.measuring.latency import latencies_ms
from edgekd.measuring.measure import Subject, calibrate_limits, measure_verdict, screen
from edgekd.models.onnx_artifact import import_onnx
from edgekd.records import LaunchProtocol
from edgekd.target import connect

SIZES = {"3 layers of 64": (64, 3), "6 layers of 256": (256, 6), "12 layers of 512": (512, 12)}
"""Name to the width and depth of a chain of dense layers."""

PERCENTILE = 50.0
HELP_RUNS = 10
LAUNCHES = 10
SHORTEST = LaunchProtocol(warmup_min_s=0.0, warmup_max_s=0.001, warmup_drift=1.0, min_samples=1, min_time_s=0.0, max_time_s=1.0, rotation=1)


def chain(folder: Path, width: int, depth: int) -> StoredArtifact:
    """Dense layers with ReLU, `(1, width)` in and out, seeded weights."""
    generator = np.random.default_rng(0)
    nodes, arrays, last = [], [], "x"
    for number in range(depth):
        arrays.append(numpy_helper.from_array((generator.standard_normal((width, width)) / width**0.5).astype(np.float32), f"w{number}"))
        nodes.append(helper.make_node("MatMul", [last, f"w{number}"], [f"m{number}"], name=f"dense{number}"))
        last = f"r{number}" if number < depth - 1 else "y"
        nodes.append(helper.make_node("Relu", [f"m{number}"], [last], name=f"relu{number}"))
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, width]) for name in ("x", "y")]
    model = helper.make_model(helper.make_graph(nodes, "chain", ends[:1], ends[1:], arrays), opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    source = folder / "source.onnx"
    onnx.save(model, source)
    return import_onnx(source, folder / "model")


def middle(values: list[float]) -> str:
    """The median with the smallest and the largest value, in milliseconds."""
    return f"{np.median(values):.0f} ({min(values):.0f} to {max(values):.0f})"


def help_ms() -> list[float]:
    """Wall times of `edgekd --help` as a fresh process, in milliseconds."""
    out = []
    for _ in range(HELP_RUNS):
        start = time.perf_counter_ns()
        subprocess.run([sys.executable, "-m", "edgekd", "--help"], check=True, capture_output=True)
        out.append((time.perf_counter_ns() - start) / 1e6)
    return out


def launch_ms(target: Target, subject: Subject) -> tuple[list[float], list[float]]:
    """Wall times in milliseconds of jobs with one shortest launch each, and of each further launch within one job."""
    single, further = [], []

    def job(count: int) -> float:
        start = time.perf_counter_ns()
        target.runtime.benchmark(
            BenchmarkRequest(
                models={subject.label: subject.artifact}, schedule=(subject.label,) * count, inputs={subject.label: subject.inputs}, protocol=SHORTEST
            )
        )
        return (time.perf_counter_ns() - start) / 1e6

    job(1)  # the files are on the device from here on
    for _ in range(LAUNCHES):
        single.append(job(1))
    for _ in range(3):
        further.append((job(LAUNCHES + 1) - float(np.median(single))) / LAUNCHES)
    return single, further


def agreement(target: Target, subject: Subject, rows: list[str]) -> None:
    """Append a table row that compares the two grades on one model."""
    limits = calibrate_limits(target, subject, cache_dir=None, seed=0)
    quick = screen(target, [subject], percentile=PERCENTILE, limits=limits, seed=0)[subject.label]
    taken = measure_verdict(target, [subject], limits=limits, seed=0, undecided=lambda _: False)[subject.label]
    counts = f"{len(taken.launches)} valid, {len(taken.rejected)} rejected"
    marks = "; ".join(f"{name}: {one.reason}" for name, one in (("screen", quick.measurement), ("verdict", taken)) if not one.valid)
    if marks:  # numbers of an invalid measurement say nothing
        rows.append(f"| {subject.label} | - | - | - | - | {counts} | INVALID: {marks} |")
        return
    per_launch = latencies_ms(taken.launches, PERCENTILE)
    median, spread = float(np.median(per_launch)), float(np.log(per_launch).std(ddof=1))
    rows.append(
        f"| {subject.label} | {quick.latency_ms:.4f} ({quick.lower_ms:.4f} to {quick.upper_ms:.4f}) | {median:.4f} | {quick.latency_ms / median:.3f} "
        f"| {spread:.2%} | {counts} | valid |"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="local", help="a profile")
    parser.add_argument("--set", dest="overrides", action="append", default=[], metavar="NAME=VALUE", help="override a field of the profile")
    given = parser.parse_args()
    before = os.getloadavg()[0]
    rows: list[str] = []
    with TemporaryDirectory() as name, connect(given.target, overrides=given.overrides) as target:
        subjects = []
        for label, (width, depth) in SIZES.items():
            place = Path(name) / label.replace(" ", "-")
            place.mkdir()
            inputs = {"x": np.random.default_rng(1).standard_normal((8, width)).astype(np.float32)}
            subjects.append(Subject(label, chain(place, width, depth), inputs))
        single, further = launch_ms(target, subjects[0])
        helped = help_ms()
        for subject in subjects:
            agreement(target, subject, rows)
        fields = target.fingerprint.fields
        simulated = f", SIMULATED ({target.simulated})" if target.simulated else ""
    print("| cost | median (smallest to largest), ms |\n|---|---|")
    print(f"| a job with one shortest launch, from the call to the result ({LAUNCHES} jobs) | {middle(single)} |")
    print(f"| each further launch in a job (3 jobs of {LAUNCHES + 1}) | {middle(further)} |")
    print(f"| `edgekd --help`, a fresh process ({HELP_RUNS} runs) | {middle(helped)} |\n")
    print("| model | screen p50, ms | verdict: median of p50 per launch, ms | screen over verdict | standard deviation of log p50 | launches | validity |")
    print("|---|---|---|---|---|---|---|")
    print("\n".join(rows))
    device = f"{fields.get('cpu_model', 'unknown')} ({fields.get('isa', '?')}), {fields.get('cores', '?')} cores"
    runtime = f"{fields.get('runtime', '?')} {fields.get('runtime_version', '')}, {fields.get('threads', '?')} thread, batch 1, fp32"
    load = f"load average {before:.2f} before, {os.getloadavg()[0]:.2f} after"
    print(f"\nConditions: {device}; {runtime}; Python {fields.get('python', sys.version.split()[0])}; {load}; {time.strftime('%Y-%m-%d')}{simulated}")


if __name__ == "__main__":
    main()

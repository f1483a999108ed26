"""What it brings, on a shared machine, to look at the sentinel all along a launch and to set aside what was beside a slow look.

    python benchmarks/set_aside.py

Launches of one model without looks and with looks at several distances, in turn, under one calibration of the sentinel. Prints Markdown: how many
launches were valid, why the others were not, the spread of the valid ones, and what a launch took. On a quiet machine all rows are alike. Takes two to ten
minutes.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import msgspec
import numpy as np
from measure_overhead import chain

from edgekd.measuring.latency import latencies_ms
from edgekd.measuring.launching import Bench, Subject
from edgekd.measuring.measure import calibrate_limits
from edgekd.measuring.validity import causes
from edgekd.records import LaunchProtocol
from edgekd.target import connect

PERCENTILES = (10.0, 50.0, 90.0)
LOOKS_S = (0.0, 0.01, 0.002)
PROTOCOL = LaunchProtocol(warmup_min_s=0.5, warmup_max_s=2.0, min_samples=200, min_time_s=0.5, max_time_s=10.0)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="local", help="a profile whose runtime looks at the sentinel")
    parser.add_argument("--launches", type=int, default=15, help="launches of each kind")
    parser.add_argument("--width", type=int, default=64, help="channels of the dense layers")
    parser.add_argument("--depth", type=int, default=48, help="dense layers")
    given = parser.parse_args()
    before = os.getloadavg()[0]
    looks = {f"a look every {look_s * 1e3:.0f} ms" if look_s else "no looks": look_s for look_s in LOOKS_S}
    seconds: dict[str, list[float]] = {kind: [] for kind in looks}
    with TemporaryDirectory() as name, connect(given.target, overrides=("measure.patience_s=0",)) as target:
        inputs = {"x": np.random.default_rng(1).standard_normal((8, given.width)).astype(np.float32)}
        subject = Subject("chain", chain(Path(name), given.width, given.depth), inputs)
        limits = calibrate_limits(target, subject, cache_dir=None, seed=0)
        benches = {
            kind: Bench(target, {subject.label: subject}, msgspec.structs.replace(PROTOCOL, look_s=look_s), limits, seed=0) for kind, look_s in looks.items()
        }
        for _ in range(given.launches):
            for kind, bench in benches.items():
                start = time.perf_counter()
                bench.run((subject.label,))
                seconds[kind].append(time.perf_counter() - start)
        fields = target.fingerprint.fields
    print(f"| launches | valid | rejected | {' | '.join(f'p{q:g}: median, ms (sd of its log)' for q in PERCENTILES)} | set aside | a launch took, s |")
    print("|---|---|---|" + "---|" * len(PERCENTILES) + "---|---|")
    for kind, bench in benches.items():
        launches, rejected = bench.valid[subject.label], bench.rejected[subject.label]
        cells = []
        for q in PERCENTILES:
            values = latencies_ms(launches, q) if len(launches) > 1 else None
            cells.append("-" if values is None else f"{np.median(values):.4f} ({np.log(values).std(ddof=1):.1%})")
        counted, aside = sum(len(one.samples_ns) for one in launches), sum(one.set_aside for one in launches)
        share = f"{aside / max(1, counted + aside):.0%} of inferences"
        took = f"{np.median(seconds[kind]):.1f} ({min(seconds[kind]):.1f} to {max(seconds[kind]):.1f})"
        print(f"| {kind} | {len(launches)} of {bench.taken(subject.label)} | {causes(rejected) or '-'} | {' | '.join(cells)} | {share} | {took} |")
    load = f"load average {before:.2f} before, {os.getloadavg()[0]:.2f} after"
    runtime = f"{fields.get('runtime', '?')} {fields.get('runtime_version', '')}, {fields.get('threads', '?')} thread"
    print(f"\nConditions: {fields.get('cpu_model', 'unknown')}, {fields.get('cores', '?')} cores; {runtime}; {load}; {time.strftime('%Y-%m-%d')}")


if __name__ == "__main__":
    main()

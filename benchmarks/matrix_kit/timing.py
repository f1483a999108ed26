"""Latencies of a matrix's files: those of one network and one runtime in turn in one screen, and int8 against fp32 in pairs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from networks import NETWORKS

from edgekd.artifact import StoredArtifact
from edgekd.contracts import Target
from edgekd.conversion.inputs import refit
from edgekd.errors import EdgekdError
from edgekd.measuring.launching import Bench, new_nonce, utc_now
from edgekd.measuring.measure import Screened, Subject, calibrate_limits, screen
from edgekd.records import IOSpec, Limits, Record

from .cells import Cell, specs_of, told

PERCENTILE = 50.0
ROTATION = 8
PAIRS = 8
"""Launches of each side of a ratio, in turn: ABBA, then BAAB."""

_MS = 1e-6


class Latency(Record, tag="edgekd.benchmark.latency/1", frozen=True, kw_only=True):
    """The screened p50 of a file in milliseconds with its bounds, or in `reason` why there is none that counts."""

    p50_ms: float | None = None
    lower_ms: float | None = None
    upper_ms: float | None = None
    launches: int = 0
    rejected: int = 0
    reason: str = ""


class Screen(Record, tag="edgekd.benchmark.screen/1", frozen=True, kw_only=True):
    """The latencies of one network's files on one runtime, measured together, and the hashes of these files."""

    network: str
    format: str
    hashes: dict[str, str]
    latencies: dict[str, Latency]
    target: str
    fingerprint: dict[str, str]
    load_1m: float | None
    taken_at: str


class Ratio(Record, tag="edgekd.benchmark.ratio/1", frozen=True, kw_only=True):
    """How many times faster one file is than another: medians of launches taken in turn, and the ratio pair by pair."""

    network: str
    slow: str
    fast: str
    hashes: dict[str, str]
    slow_ms: tuple[float, ...]
    fast_ms: tuple[float, ...]
    rejected: int
    taken_at: str

    @property
    def ratio(self) -> float:
        """The median of the slow file's launches over that of the fast one's."""
        return float(np.median(self.slow_ms) / np.median(self.fast_ms))

    @property
    def spread(self) -> tuple[float, float]:
        """The smallest and the largest ratio of two launches that were neighbours."""
        pairs = [a / b for a, b in zip(self.slow_ms, self.fast_ms, strict=True)]
        return min(pairs), max(pairs)


def hashes_of(cells: Mapping[str, Cell]) -> dict[str, str]:
    """Content hashes of the files of some cells, by kind."""
    return {kind: cell.artifact.content_hash() for kind, cell in cells.items() if cell.artifact is not None}


def subject_of(network: str, kind: str, stored: StoredArtifact) -> Subject:
    """A file with real inputs, laid out as it takes them."""
    inputs: dict[str, Any] = {"x": NETWORKS[network].inputs("held-out", ROTATION)}
    plain = IOSpec(inputs=specs_of(inputs), outputs=stored.record.iospec.outputs)
    return Subject(kind, stored, refit(inputs, plain, stored, changed=True))


def limits_for(target: Target, network: str, stored: StoredArtifact, seed: int) -> Limits:
    """The limits of validity that hold now on a target, from an A/A run on one file."""
    return calibrate_limits(target, subject_of(network, "A/A", stored), cache_dir=None, seed=seed, nonce=new_nonce())


def take_screen(network: str, target: Target, stored: Mapping[str, StoredArtifact], limits: Limits, seed: int) -> Screen:
    """The p50 of every file of a network that one target runs, launch by launch in turn."""
    latencies: dict[str, Latency] = {}
    subjects = []
    for kind, one in stored.items():
        try:
            support = target.runtime.supports(one)
        except EdgekdError as error:
            latencies[kind] = Latency(reason=told(error))
            continue
        if support.supported:
            subjects.append(subject_of(network, kind, one))
        else:
            latencies[kind] = Latency(reason="the target cannot run it: " + "; ".join(f"{operator}: {why}" for operator, why in support.missing.items()))
    found = screen(target, subjects, percentile=PERCENTILE, limits=limits, seed=seed, nonce=new_nonce()) if subjects else {}
    latencies |= {kind: _latency(one) for kind, one in found.items()}
    now = target.runtime.snapshot()
    return Screen(
        network=network,
        format=next(iter(stored.values())).record.format.value,
        hashes={kind: one.record.content_hash() for kind, one in stored.items()},
        latencies=latencies,
        target=target.name,
        fingerprint=target.fingerprint.fields,
        load_1m=now.load_1m,
        taken_at=utc_now(),
    )


def _latency(one: Screened) -> Latency:
    return Latency(
        p50_ms=one.latency_ms,
        lower_ms=one.lower_ms,
        upper_ms=one.upper_ms,
        launches=len(one.measurement.launches),
        rejected=len(one.measurement.rejected),
        reason="" if one.measurement.valid else one.measurement.reason,
    )


def take_ratio(network: str, target: Target, slow: tuple[str, StoredArtifact], fast: tuple[str, StoredArtifact], limits: Limits, seed: int) -> Ratio:
    """Two files of a network in turn; a pair counts if both its launches are valid, and where none is, all pairs are given with their number."""
    subjects = {kind: subject_of(network, kind, stored) for kind, stored in (slow, fast)}
    bench = Bench(target, subjects, target.profile.measure.screen.launch, limits, seed, new_nonce())
    pairs: list[tuple[float, float]] = []
    everything: list[tuple[float, float]] = []
    for turn in range(PAIRS):
        order = (slow[0], fast[0]) if turn % 2 == 0 else (fast[0], slow[0])
        before = sum(len(one) for one in bench.rejected.values())
        launches = {launch.label: launch for launch in bench.run(order)}
        pair = tuple(float(np.median(launches[kind].samples_ns)) * _MS for kind in (slow[0], fast[0]))
        everything.append((pair[0], pair[1]))
        if sum(len(one) for one in bench.rejected.values()) == before:
            pairs.append((pair[0], pair[1]))
    used = pairs or everything
    return Ratio(
        network=network,
        slow=slow[0],
        fast=fast[0],
        hashes={kind: stored.record.content_hash() for kind, stored in (slow, fast)},
        slow_ms=tuple(pair[0] for pair in used),
        fast_ms=tuple(pair[1] for pair in used),
        rejected=PAIRS - len(pairs),
        taken_at=utc_now(),
    )


def load_stored(folder: Path, cell: Cell) -> StoredArtifact | None:
    """The file of a cell, or nothing where it was refused or its file is gone."""
    place = folder / "artifact"
    return StoredArtifact(cell.artifact, place) if cell.artifact is not None and (place / cell.artifact.entry).is_file() else None

"""The A/A run: one artifact under two labels on the device, which tells the device's own noise and sets the limits of validity."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from edgekd.contracts import Target
from edgekd.measuring.launching import Bench, Progress, Subject, cache_path, cached
from edgekd.measuring.validity import causes, frequency_drop_of, sentinel_drift_of, steal_of, temperature_rise_of
from edgekd.records import AaRun, Launch, Limits
from edgekd.stats import percentile_of

BLOCKS = 2
"""Blocks of four launches, ABBA or BAAB: eight launches."""

_KEPT_SHARE = 0.75
_NOISIEST = 0.10  # five times the "bad" noise between blocks of a busy virtual machine: such a run calibrates nothing
_LABELS = ("A", "B")
_STATES_MIN, _STATES_MAX = 3, 20
_RULE = "rule 7"  # raised when limits follow from a run by another rule: a stored run is then taken anew


def _narrow(ceiling: float | None, seen: Sequence[float | None], *, factor: float, floor: float) -> float | None:
    """`factor` times the largest value seen, at least `floor`, never above the profile's `ceiling`; unseen leaves the ceiling."""
    known = [value for value in seen if value is not None]
    if ceiling is None or not known:
        return ceiling
    return min(ceiling, max(floor, factor * max(known)))


def limits_from(launches: Sequence[Launch], ceiling: Limits, sentinel_ns: int | None) -> Limits:
    """Limits that an A/A run supports; each is the profile's ceiling or tighter, with slack for artifacts that differ from the one run.

    Steal, frequency drop, temperature rise and sentinel drift: twice the largest seen, at least 1 %, 5 %, 2 K and 5 %. CPU share: the
    smallest seen less 0.05, at most 0.98 and at least the profile's. The spread p90/p50 stays at the profile's: it depends on the artifact
    (an inference of 0.05 ms spreads more than one of 1 ms), so one artifact's says nothing on another's.
    """
    shares = [launch.cpu_share for launch in launches if launch.cpu_share is not None]
    share = ceiling.cpu_share_min
    if share is not None and shares:
        share = max(share, min(0.98, min(shares) - 0.05))
    return msgspec.structs.replace(
        ceiling,
        cpu_share_min=share,
        steal_max=_narrow(ceiling.steal_max, [steal_of(one) for one in launches], factor=2.0, floor=0.01),
        sentinel_drift_max=_narrow(ceiling.sentinel_drift_max, [sentinel_drift_of(one, sentinel_ns) for one in launches], factor=2.0, floor=0.05),
        frequency_drop_max=_narrow(ceiling.frequency_drop_max, [frequency_drop_of(one) for one in launches], factor=2.0, floor=0.05),
        temperature_rise_max_c=_narrow(ceiling.temperature_rise_max_c, [temperature_rise_of(one) for one in launches], factor=2.0, floor=2.0),
        sentinel_ns=sentinel_ns,
    )


def _calmest(target: Target) -> int | None:
    """The sentinel's time on the device when nothing disturbs it, before the first launch: the smallest of at least three states, and of more, up to
    twenty, until the two smallest agree within 2 %. `None` where the device has no sentinel."""
    seen: list[int] = []
    while len(seen) < _STATES_MAX and (len(seen) < _STATES_MIN or sorted(seen)[1] > 1.02 * min(seen)):
        found = target.runtime.snapshot().sentinel_ns
        if not found:
            return None
        seen.append(found)
    return min(seen)


def _baseline(launches: Sequence[Launch], percentile: float) -> int | None:
    """A low quantile of the sentinel's times: interference only ever makes the kernel slower."""
    seen = [state.sentinel_ns for launch in launches for state in (launch.before, launch.after) if state.sentinel_ns]
    return int(percentile_of(seen, percentile)) if seen else None


def _pairs(launches: Sequence[Launch], valid: set[int]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """log(median of A) - log(median of B) for each two neighbours that are both valid, `(pairs,)`; a launch without raw samples counts by
    its summary's median."""
    medians = [percentile_of(one.samples_ns, 50.0) if one.samples_ns else float(one.summary_ns.get("median", 0)) for one in launches]
    out = []
    for left in range(0, len(launches) - 1, 2):
        a, b = (left, left + 1) if launches[left].label == _LABELS[0] else (left + 1, left)
        if medians[a] > 0 and medians[b] > 0 and {launches[a].index, launches[b].index} <= valid:
            out.append(np.log(medians[a]) - np.log(medians[b]))
    return np.asarray(out, dtype=np.float64)


def aa_run(target: Target, subject: Subject, *, cache_dir: Path | None, seed: int, progress: Progress | None = None, nonce: str = "") -> AaRun:
    """The A/A run of this device: taken now under the screen's protocol, or the one stored in `cache_dir`.

    It is stored under the device's fingerprint, governor and power mode, the runtime's options, the protocol and the profile's limits. A run is
    `contended` if fewer than three quarters of its launches are inside the profile's limits, or if the two labels differ from pair to pair by a
    standard deviation above 10 %: it gives the profile's limits, and it is not stored, so that the next command calibrates again.
    Where launches look at the sentinel (`LaunchProtocol.look_s`), it is calibrated before them (`_calmest`), otherwise by the launches' own states.
    `nonce`: see `measure_verdict`.
    """
    ceiling = target.profile.measure.limits
    protocol = target.profile.measure.screen.launch
    path = None if cache_dir is None else cache_path(cache_dir, "aa", target, _RULE, protocol.digest(), ceiling.digest())
    stored = cached(path, AaRun)
    if stored is not None:
        return stored
    subjects = {label: Subject(label, subject.artifact, subject.inputs) for label in _LABELS}
    calmest = _calmest(target) if protocol.look_s > 0 and ceiling.sentinel_drift_max is not None else None
    bench = Bench(target, subjects, protocol, msgspec.structs.replace(ceiling, sentinel_ns=calmest), seed, nonce)
    rng = np.random.default_rng([seed, 0xAA])
    launches: list[Launch] = []
    for block in range(BLOCKS):
        a, b = _LABELS if rng.random() < 0.5 else _LABELS[::-1]
        launches += bench.run((a, b, b, a))
        if progress is not None:
            progress("A/A", 4 * (block + 1), 4 * BLOCKS)
    kept = [*bench.valid["A"], *bench.valid["B"]]
    rejected = [*bench.rejected["A"], *bench.rejected["B"]]
    pairs = _pairs(launches, {launch.index for launch in kept})
    block_sd = float(pairs.std(ddof=1)) if pairs.size > 1 else 0.0
    contended = ""
    if len(kept) < _KEPT_SHARE * len(launches):
        contended = f"{len(rejected)} of {len(launches)} launches rejected: {causes(rejected)}"
    elif block_sd > _NOISIEST:
        contended = f"two labels of one artifact differ by a standard deviation of {block_sd:.1%} per pair, limit {_NOISIEST:.0%}"
    if contended:
        limits = msgspec.structs.replace(ceiling, sentinel_ns=calmest or _baseline(launches, 1.0))
    else:
        limits = limits_from(kept, ceiling, calmest or _baseline(kept, 25.0))
    record = AaRun(
        limits=limits,
        block_sd=block_sd,
        offset=float(pairs.mean()) if pairs.size else 0.0,
        protocol=protocol,
        artifact=subject.artifact.record.content_hash(),
        fingerprint=target.fingerprint,
        launches=tuple(launches),
        contended=contended,
        simulated=target.simulated,
        taken_at=bench.started_at,
    )
    if path is not None and not contended:
        record.save(path)
    return record


def calibrate_limits(target: Target, subject: Subject, *, cache_dir: Path | None, seed: int, progress: Progress | None = None, nonce: str = "") -> Limits:
    """The limits of validity on this device, with the sentinel's calibration in `sentinel_ns`; never wider than the profile's. See `aa_run`."""
    return aa_run(target, subject, cache_dir=cache_dir, seed=seed, progress=progress, nonce=nonce).limits

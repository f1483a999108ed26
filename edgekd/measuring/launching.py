"""What both grades of measurement share: subjects, blocks of launches on the device, and sorting launches into valid and rejected."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import msgspec

from edgekd.artifact import StoredArtifact
from edgekd.contracts import BenchmarkRequest, Target, Tensors
from edgekd.errors import InputError, RunnerFailed, UnsupportedModel
from edgekd.measuring.validity import validity_reason
from edgekd.records import Grade, Launch, LaunchProtocol, Limits, Measurement, Record
from edgekd.storage import sha256_bytes

R = TypeVar("R", bound=Record)

_POLL_S = 1.0

Progress = Callable[[str, int, int], None]
"""Told after every block: what is measured, launches that count so far, launches wanted."""


@dataclass(frozen=True)
class Subject:
    """One artifact to time. `inputs` hold at least one sample per input, `(rotation, ...)`, the sample axis first."""

    label: str
    artifact: StoredArtifact
    inputs: Tensors


def utc_now() -> str:
    """The time in UTC, ISO 8601 to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def new_nonce() -> str:
    """A text that no other call gives: it makes a measurement a job of its own on the device, never that of a process that was killed."""
    return uuid.uuid4().hex


def by_label(subjects: Sequence[Subject]) -> dict[str, Subject]:
    """The subjects by their labels, in their order.

    Raises:
        InputError: no subject, or two with one label.
    """
    out = {subject.label: subject for subject in subjects}
    if not out:
        raise InputError("there is nothing to measure", found="no subjects")
    if len(out) != len(subjects):
        raise InputError("two subjects of a measurement share a label", found=[subject.label for subject in subjects])
    return out


class Bench:
    """Runs blocks of launches of some subjects on a target under one protocol and keeps every launch, valid or rejected.

    A launch is rejected by its own facts only (`validity.validity_reason`); its label plays no part. A model with state is refused (`UnsupportedModel`)
    where the target does not feed it back.
    """

    def __init__(self, target: Target, subjects: Mapping[str, Subject], protocol: LaunchProtocol, limits: Limits, seed: int, nonce: str = "") -> None:
        for subject in subjects.values():
            state = subject.artifact.record.iospec.state_inputs
            if state and not target.capabilities.state:
                raise UnsupportedModel(
                    f"the input {state[0]!r} of {subject.label!r} is a state, and the target {target.name!r} does not feed a state back",
                    found=", ".join(state),
                    hint="measure it on a target whose runtime does",
                    subject=state[0],
                )
        self.target = target
        self.subjects = subjects
        self.protocol = protocol
        self.limits = limits
        self.seed = seed
        self.nonce = nonce
        self.started_at = utc_now()
        self.valid: dict[str, list[Launch]] = {label: [] for label in subjects}
        self.rejected: dict[str, list[Launch]] = {label: [] for label in subjects}
        self.waited_s = 0.0
        """How long this measurement has waited for a disturbed device."""
        self._index = 0
        self._disturbed = False

    def taken(self, label: str) -> int:
        """Launches of the label so far, valid and rejected."""
        return len(self.valid[label]) + len(self.rejected[label])

    def run(self, schedule: Sequence[str]) -> tuple[Launch, ...]:
        """One job on the device: one fresh process per label of `schedule`, in that order. Between two jobs the device rests for
        the longer of the protocol's gap and the profile's cooldown, and after one with a rejected launch until it is calm (`_wait_for_calm`).

        Raises:
            RunnerFailed: the runtime gave other launches than those asked for.
            DeviceError: the device or the way to it failed.
        """
        rest_s = max(self.protocol.gap_s, self.target.profile.measure.cooldown_s)
        if self._index and rest_s > 0:
            time.sleep(rest_s)
        if self._disturbed:
            self._wait_for_calm()
        used = [label for label in self.subjects if label in set(schedule)]
        launches = self.target.runtime.benchmark(
            BenchmarkRequest(
                models={label: self.subjects[label].artifact for label in used},
                schedule=tuple(schedule),
                inputs={label: self.subjects[label].inputs for label in used},
                protocol=self.protocol,
                first_index=self._index,
                seed=self.seed,
                nonce=self.nonce,
                sentinel_max_ns=self.limits.sentinel_max_ns if self.protocol.look_s > 0 else None,
            )
        )
        if tuple(launch.label for launch in launches) != tuple(schedule):
            raise RunnerFailed(
                "the runtime gave other launches than those asked for",
                found=[launch.label for launch in launches],
                allowed=list(schedule),
                subject=self.target.name,
            )
        self._index += len(launches)
        self._disturbed = False
        for launch in launches:
            reason = validity_reason(launch, self.limits)
            if reason:
                self._disturbed = True
                self.rejected[launch.label].append(msgspec.structs.replace(launch, invalid=reason))
            else:
                self.valid[launch.label].append(launch)
        return launches

    def _wait_for_calm(self) -> None:
        """Wait until the sentinel is within its limit again, while the profile's `measure.patience_s` lasts.

        Only the device's state is looked at, never a latency, so that waiting favours nobody.
        """
        slow_ns = self.limits.sentinel_max_ns
        if slow_ns is None:
            return
        start = time.monotonic() - self.waited_s
        while (left_s := self.target.profile.measure.patience_s - self.waited_s) > 0:
            seen = self.target.runtime.snapshot().sentinel_ns
            if seen is None or seen <= slow_ns:
                break
            time.sleep(min(_POLL_S, left_s))
            self.waited_s = time.monotonic() - start

    def measurement(self, label: str, grade: Grade, reason: str = "") -> Measurement:
        """The record of one label; a `reason` makes it invalid."""
        return Measurement(
            label=label,
            grade=grade,
            artifact=self.subjects[label].artifact.record.content_hash(),
            protocol=self.protocol,
            limits=self.limits,
            launches=tuple(self.valid[label]),
            rejected=tuple(self.rejected[label]),
            fingerprint=self.target.fingerprint,
            simulated=self.target.simulated,
            valid=not reason,
            reason=reason,
            taken_at=self.started_at,
        )


def cache_path(folder: Path, kind: str, target: Target, *parts: str) -> Path:
    """The file for a measurement of `kind` in a shared cache: named by device fingerprint, runtime options, the governor and the power mode that the
    device has now, and `parts`."""
    now = target.runtime.snapshot()
    key = "\n".join([target.fingerprint.digest(), target.profile.runtime.digest(), target.simulated, f"{now.governor} {now.power_mode}", *parts])
    return folder / kind / f"{sha256_bytes(key.encode())[:40]}.json"


def cached(path: Path | None, kind: type[R]) -> R | None:
    """The record in a cache file, or `None`: no file, or one that another version wrote, which is measured anew and replaced."""
    if path is None or not path.is_file():
        return None
    try:
        return kind.load(path)
    except InputError:
        return None

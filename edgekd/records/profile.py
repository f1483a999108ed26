"""The record behind a target profile: which device, how it is reached, what runs there, how it is measured."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from edgekd.records.base import Record
from edgekd.records.measure import Fingerprint, LaunchProtocol, Limits, MeasurePlan, NonNegativeFloat
from edgekd.records.model import Positive, Precision

Port = Annotated[int, Meta(ge=0, le=65535)]


class TransportConfig(Record, tag="edgekd.transport/1", frozen=True, kw_only=True):
    """How the device is reached. `kind` is a registered transport; `workdir` is a private folder on the device."""

    kind: str = "local"
    host: str = ""
    port: Port = 0
    user: str = ""
    serial: str = ""
    python: str = ""
    workdir: str = ""


class RuntimeConfig(Record, tag="edgekd.runtime/1", frozen=True, kw_only=True):
    """What runs the model. `precisions` are those to try on this target, the preferred one first."""

    kind: str = "onnxruntime"
    threads: Positive = 1
    precisions: tuple[Precision, ...] = (Precision.INT8, Precision.FP32)
    options: dict[str, str | int | float | bool] = {}


class MeasureConfig(Record, tag="edgekd.measure/1", frozen=True, kw_only=True):
    """The two grades, and the widest limits of validity (an A/A run on the device narrows them).

    `patience_s`: how long one measurement in all waits for a device that rejected launches show to be disturbed.
    """

    screen: MeasurePlan = MeasurePlan(
        launch=LaunchProtocol(warmup_min_s=0.1, warmup_max_s=0.3, min_samples=50, min_time_s=0.1, max_time_s=3.0),
        launches=3,
        step=2,
        max_launches=7,
        max_reject_share=0.5,
    )
    verdict: MeasurePlan = MeasurePlan()
    limits: Limits = Limits()
    cooldown_s: NonNegativeFloat = 0.0
    patience_s: NonNegativeFloat = 20.0
    lock_wait_s: NonNegativeFloat = 60.0


class Profile(Record, tag="edgekd.profile/1", frozen=True, kw_only=True):
    """A target on file. `identity` names the fingerprint's fields that make a device the same device.

    `proven_on` lists where the profile ran on real hardware: each entry is a machine and instruction sets, as the fingerprint's
    `machine` and `isa` name them, for example `x86_64 avx512 vnni`. `proof` says more in words.
    """

    name: str
    description: str
    transport: TransportConfig = TransportConfig()
    runtime: RuntimeConfig = RuntimeConfig()
    measure: MeasureConfig = MeasureConfig()
    identity: tuple[str, ...] = ("cpu_model", "isa", "machine", "runtime", "runtime_version", "threads")
    proven_on: tuple[str, ...] = ()
    proof: str = ""

    def proven_here(self, device: Fingerprint) -> bool:
        """Whether the device is of a kind that the profile was proven on: the same machine, with all instruction sets of one entry."""
        machine, isa = device.fields.get("machine", ""), set(device.fields.get("isa", "").split())
        return any(words and words[0] == machine and isa.issuperset(words[1:]) for words in map(str.split, self.proven_on))

"""Records about measuring: the protocol, what was seen, under which conditions, and whether it counts."""

from __future__ import annotations

import math
from enum import Enum
from typing import Annotated

from msgspec import Meta

from edgekd.records.base import Record
from edgekd.records.model import Format, NonNegative, Positive, Precision

PositiveFloat = Annotated[float, Meta(gt=0.0)]
NonNegativeFloat = Annotated[float, Meta(ge=0.0)]
Share = Annotated[float, Meta(ge=0.0, le=1.0)]


class Grade(str, Enum):
    """`screen` serves the search and may be cached; `verdict` decides and never comes from the cache."""

    SCREEN = "screen"
    VERDICT = "verdict"


class Clock(str, Enum):
    """What a time covers. `end_to_end`: one inference, host buffers in and out, synchronised. `init`: from the start of
    loading to a ready session. `first`: the first inference after it."""

    END_TO_END = "end_to_end"
    DEVICE = "device"
    COPIES = "copies"
    INIT = "init"
    FIRST = "first"


class LaunchProtocol(Record, tag="edgekd.launch_protocol/1", frozen=True, kw_only=True):
    """How one launch (a fresh process, one observation) is run.

    Warm-up lasts at least `warmup_min_s` and goes on until the medians of five windows rise or fall by less than
    `warmup_drift` a window, at most `warmup_max_s`. Then at least `min_samples` inferences and `min_time_s` are timed, at most
    `max_time_s`. Inputs rotate over `rotation` tensors.

    `look_s` above 0: the sentinel is looked at every so many seconds of the timed loop, and inferences beside a slow look are set aside; `min_samples`
    and `min_time_s` are asked of the others. 0: it is looked at before and after the launch only.
    """

    warmup_min_s: NonNegativeFloat = 1.0
    warmup_max_s: NonNegativeFloat = 3.0
    warmup_drift: NonNegativeFloat = 0.005
    min_samples: Positive = 200
    min_time_s: NonNegativeFloat = 1.0
    max_time_s: PositiveFloat = 30.0
    rotation: Positive = 8
    gap_s: NonNegativeFloat = 0.0
    look_s: NonNegativeFloat = 0.0


class MeasurePlan(Record, tag="edgekd.measure_plan/1", frozen=True, kw_only=True):
    """How many launches a grade takes; a verdict looks after `launches`, and again after each `step` up to `max_launches`."""

    launch: LaunchProtocol = LaunchProtocol()
    launches: Positive = 20
    step: Positive = 20
    max_launches: Positive = 60
    max_reject_share: Share = 0.2


class Limits(Record, tag="edgekd.limits/1", frozen=True, kw_only=True):
    """When a launch is invalid. A value of `None` is not checked (and the report says so).

    `cpu_share_min`: CPU time over wall time of the timed loop per thread. `steal_max`: share of CPU time taken by the hypervisor.
    `sentinel_drift_max`: relative excess of a fixed kernel's time over its calibration. `spread_max`: p90/p50 of a launch.
    `frequency_drop_max`: relative fall of the clock during a launch. `temperature_rise_max_c`: kelvin within a launch.
    `sentinel_ns`: the calibrated time of the fixed kernel, from the A/A run; without it the drift is not checked.
    """

    cpu_share_min: Share | None = 0.95
    steal_max: Share | None = 0.02
    sentinel_drift_max: NonNegativeFloat | None = 0.10
    spread_max: PositiveFloat | None = 1.5
    frequency_drop_max: Share | None = 0.10
    temperature_rise_max_c: PositiveFloat | None = 5.0
    temperature_max_c: PositiveFloat | None = None
    sentinel_ns: Positive | None = None

    @property
    def sentinel_max_ns(self) -> int | None:
        """The longest time of the sentinel on an undisturbed device, in nanoseconds; `None` where it is not checked."""
        if self.sentinel_ns is None or self.sentinel_drift_max is None:
            return None
        return math.floor(self.sentinel_ns * (1.0 + self.sentinel_drift_max) + 1e-6)


class Snapshot(Record, tag="edgekd.snapshot/1", frozen=True, kw_only=True):
    """The device's state at one moment. `None`: the device does not tell."""

    load_1m: float | None = None
    frequency_mhz: float | None = None
    governor: str | None = None
    temperature_c: float | None = None
    steal_share: float | None = None
    power_mode: str | None = None
    sentinel_ns: NonNegative | None = None
    available_mb: float | None = None


class Launch(Record, tag="edgekd.launch/1", frozen=True, kw_only=True):
    """One fresh process. `samples_ns` are the timed inferences in order, integer nanoseconds (empty if the runtime gives a
    summary only, then `summary_ns` holds `min`, `median`, `max`).

    Where the sentinel was looked at within the launch, `sentinel_ns` is its longest time beside one of these, and `set_aside` counts the inferences
    beside a slower one: they are in no sample, but for a launch that is invalid because of them, which holds all.
    """

    label: str
    index: NonNegative
    samples_ns: tuple[NonNegative, ...] = ()
    summary_ns: dict[str, int] = {}
    init_ns: NonNegative = 0
    first_ns: NonNegative = 0
    warmup_runs: NonNegative = 0
    warmup_s: NonNegativeFloat = 0.0
    warmup_drift: NonNegativeFloat | None = None
    cpu_share: float | None = None
    switches_per_s: float | None = None
    sentinel_ns: NonNegative | None = None
    set_aside: NonNegative = 0
    peak_memory_bytes: NonNegative | None = None
    before: Snapshot = Snapshot()
    after: Snapshot = Snapshot()
    started_at: str = ""
    invalid: str = ""


class Fingerprint(Record, tag="edgekd.fingerprint/1", frozen=True, kw_only=True):
    """What the device is. `fields` holds for example `cpu_model`, `isa`, `cores`, `ram_mb`, `os`, `kernel`, `runtime`,
    `runtime_version`, `threads`, `machine`, all as text."""

    fields: dict[str, str]

    def differing(self, other: Fingerprint, names: tuple[str, ...]) -> dict[str, tuple[str, str]]:
        """The fields among `names` in which the two differ, with both values."""
        pairs = {name: (self.fields.get(name, "(absent)"), other.fields.get(name, "(absent)")) for name in names}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


class Capabilities(Record, tag="edgekd.capabilities/1", frozen=True, kw_only=True):
    """What a runtime on a device can do; known at connect, before anything is trained.

    `schemes` are quantization schemes in the order of preference on this device; `channel_steps` are widths at which
    kernels are full, per precision. `state` says that it feeds the state of a model back, see `contracts.Runtime`.
    `delegate` is what runs the graph instead of the processor, `gpu` for one; empty for none.
    `proven_on_hardware` is set at connect, from the profile's `proven_on` and the device's fingerprint.
    """

    formats: tuple[Format, ...]
    precisions: tuple[Precision, ...]
    schemes: tuple[str, ...] = ()
    channel_steps: dict[str, int] = {}
    samples: str = "raw"
    clocks: tuple[Clock, ...] = (Clock.END_TO_END, Clock.INIT, Clock.FIRST)
    taps: bool = False
    op_times: bool = False
    state: bool = False
    simulated: str = ""
    proven_on_hardware: bool = False
    delegate: str = ""


class Measurement(Record, tag="edgekd.measurement/1", frozen=True, kw_only=True):
    """What one artifact took on one target: raw launches with their conditions.

    `valid` is false when too many launches were rejected; `reason` says why. `simulated` is empty for a real device,
    else `null`, `emulated` or `fake`.
    """

    label: str
    grade: Grade
    mode: str = "steady"
    artifact: str
    protocol: LaunchProtocol
    limits: Limits
    launches: tuple[Launch, ...]
    rejected: tuple[Launch, ...] = ()
    fingerprint: Fingerprint
    simulated: str = ""
    valid: bool = True
    reason: str = ""
    taken_at: str = ""


class AaRun(Record, tag="edgekd.aa_run/1", frozen=True, kw_only=True):
    """The same artifact measured under two labels: what the device's own noise is, and the limits of validity that follow.

    `block_sd` is the standard deviation of the log-ratio of the two labels' medians per block (0.01 is about 1 %), `offset` its mean.
    `contended` says why the run is no basis for a calibration; then `limits` are the profile's own. `launches` are all that were run.
    """

    limits: Limits
    block_sd: NonNegativeFloat
    offset: float
    protocol: LaunchProtocol
    artifact: str
    fingerprint: Fingerprint
    launches: tuple[Launch, ...]
    contended: str = ""
    simulated: str = ""
    taken_at: str = ""


class OpTime(Record, tag="edgekd.op_time/1", frozen=True, kw_only=True):
    """How long one operator took, median over runs, as the runtime's own profiler tells."""

    name: str
    op_type: str
    time_ns: NonNegative
    share: Share
    provider: str = ""


class SupportReport(Record, tag="edgekd.support/1", frozen=True, kw_only=True):
    """Whether a target runs a model; `missing` names operators (and inputs) it cannot, each with the reason."""

    supported: bool
    missing: dict[str, str] = {}
    note: str = ""

"""The contracts between the core and everything that varies: transports, runtimes, converters, tasks, spaces, losses.

A plug-in is found by name through `edgekd.registry`; it is checked against its contract when it is registered.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from edgekd.artifact import StoredArtifact
from edgekd.records import (
    Capabilities,
    Fingerprint,
    IOSpec,
    Launch,
    LaunchProtocol,
    OpTime,
    Precision,
    Profile,
    QuantRecipe,
    Snapshot,
    StudentSpec,
    SupportReport,
)

if TYPE_CHECKING:
    import torch

Array = NDArray[Any]
Tensors = Mapping[str, Array]
"""Named arrays, batch first. Inputs are in the order of `IOSpec.inputs`, outputs are named by key path."""


# ---------------------------------------------------------------------------------------------- transports


class EndState(str, Enum):
    """How a remote command ended; never guessed from a bare return code."""

    EXITED = "exited"
    SIGNALLED = "signalled"
    LOST = "lost"
    TIMEOUT = "timeout"


@dataclass(frozen=True)
class Completed:
    """A finished remote command. `code` is the exit status, or the signal's number when `state` is `signalled`."""

    state: EndState
    code: int
    stdout: bytes
    stderr: bytes


@dataclass(frozen=True)
class JobState:
    """A detached job: still running, or how it ended. `lines` is what it wrote so far, one JSON text each."""

    running: bool
    end: Completed | None
    lines: tuple[str, ...]


@runtime_checkable
class Transport(Protocol):
    """The way to a device. Paths on the device are texts relative to `workdir`, a private folder.

    Acquire in `open`, release in `close`; a constructor `T(profile)` only stores. Every call has a deadline and raises
    `DeviceTimeout` or `LinkLost` when the *way* fails; a command that fails is a `Completed`.
    """

    name: str

    def open(self) -> None: ...

    def close(self) -> None: ...

    @property
    def workdir(self) -> str:
        """The absolute path of the work folder on the device."""
        ...

    def run(self, argv: Sequence[str], *, timeout_s: float, stdin: bytes = b"") -> Completed:
        """Run a command in `workdir` and wait for it. No shell: every word arrives as it is."""
        ...

    def push(self, local: Path, remote: str) -> None:
        """Copy a file to the device, verified by hash; a file that is already there with this hash is not sent again."""
        ...

    def pull(self, remote: str, local: Path) -> None:
        """Copy a file from the device, verified by hash; `local` is written whole or not at all."""
        ...

    def remove(self, remote: str) -> None:
        """Remove a file or folder below `workdir`; it is no error if it does not exist."""
        ...

    def start(self, job: str, argv: Sequence[str]) -> None:
        """Start a detached job that outlives the link. Its standard output goes to a file on the device.

        Its files lie below `jobs/<job>`, among them `owner.json`, which tells who started it; `remove("jobs/<job>")` forgets an
        ended job and frees its name.

        Raises:
            DeviceError: a job of this name exists already.
        """
        ...

    def poll(self, job: str) -> JobState:
        """What became of a job, also after a reconnect and from another process. An unknown job is a `DeviceError`."""
        ...

    def kill(self, job: str) -> None:
        """End a job and its children by the process group that was recorded for it."""
        ...

    def reap(self) -> tuple[str, ...]:
        """Names of leftover jobs of dead hosts, after ending them and removing their files."""
        ...


# ---------------------------------------------------------------------------------------------- runtimes


@dataclass(frozen=True)
class BenchmarkRequest:
    """Launches to run on the device, as one job: one fresh process for each label in `schedule`, in that order.

    `models` maps a label to its artifact; `inputs` maps a label to at least one sample per input, `(rotation, ...)` with the
    sample axis first; each timed inference takes one sample with a batch axis of 1. A model with state (`IOSpec.state`) is timed step by step: what an
    output gives is the input of its pair at the next inference. It starts from the first sample given for that input, from zero where none is.
    `first_index` numbers the launches. Two requests with different `nonce` are never the same job: a runtime that takes over the job of a killed
    host does so for an equal request only.
    `sentinel_max_ns` is given where the protocol has a `look_s`: an inference beside a sentinel that took longer is set aside (`Launch.set_aside`). A
    runtime that cannot look leaves `Launch.sentinel_ns` out, and the launch is judged by its states before and after.
    """

    models: Mapping[str, StoredArtifact]
    schedule: tuple[str, ...]
    inputs: Mapping[str, Tensors]
    protocol: LaunchProtocol
    first_index: int = 0
    seed: int = 0
    nonce: str = ""
    sentinel_max_ns: int | None = None


@runtime_checkable
class Runtime(Protocol):
    """What executes a model on a device, and owns everything that does: compile, benchmark, infer, op times, supports.

    Constructed as `R(profile, transport)`, opened with the transport already open.
    """

    name: str

    def open(self) -> None:
        """Check that the runtime is usable on the device.

        Raises:
            MissingDependency: a package is missing on the host.
            DeviceError: the device lacks the runtime; the message names the remedy.
        """
        ...

    def close(self) -> None: ...

    def capabilities(self) -> Capabilities: ...

    def fingerprint(self) -> Fingerprint: ...

    def snapshot(self) -> Snapshot: ...

    def supports(self, model: StoredArtifact) -> SupportReport: ...

    def compile(self, model: StoredArtifact, folder: Path) -> StoredArtifact:
        """What is deployed on the device for this model; the model itself where the runtime compiles nothing."""
        ...

    def benchmark(self, request: BenchmarkRequest) -> tuple[Launch, ...]:
        """One launch per label of the schedule, in order, with raw facts; whether a launch counts is decided by the core."""
        ...

    def infer(self, model: StoredArtifact, inputs: Tensors, taps: Sequence[str] = ()) -> dict[str, Array]:
        """Outputs for all samples, `(samples, ...)`, named as in the artifact's IOSpec, plus the tapped tensors by name.

        Samples run one by one with a batch axis of 1 where the artifact's batch is bound to 1.

        A model with state: with all its states among `inputs` every sample is one step, as for any model. With none of them the inputs are
        sequences `(samples, steps, ...)`: every sample starts from a state of zeros, and outputs (the states among them) and taps are
        `(samples, steps, ...)`. Some of them without the others are a `DataError`.
        """
        ...

    def op_times(self, model: StoredArtifact, inputs: Tensors, runs: int = 50) -> tuple[OpTime, ...]:
        """Median time per operator, in execution order.

        Raises:
            UnsupportedModel: the runtime has no profiler.
        """
        ...


@runtime_checkable
class Compiler(Protocol):
    """The last edge of the road, supplied by a target: a portable file in, the deployed file out."""

    def compile(self, model: StoredArtifact, folder: Path) -> StoredArtifact: ...


class Target(Protocol):
    """A profile made live: a transport with a runtime. `edgekd.connect` gives one; use it as a context manager."""

    profile: Profile
    transport: Transport
    runtime: Runtime
    capabilities: Capabilities
    fingerprint: Fingerprint

    @property
    def name(self) -> str: ...

    @property
    def simulated(self) -> str:
        """Empty for a real device, else `null`, `emulated` or `fake`."""
        ...


class Infer(Protocol):
    """Runs an artifact on named inputs; handed to converters that must run a model."""

    def __call__(self, model: StoredArtifact, inputs: Tensors, taps: Sequence[str] = ()) -> dict[str, Array]: ...


# ---------------------------------------------------------------------------------------------- converters


@dataclass(frozen=True)
class CalibrationSet:
    """Inputs that calibrate activations. `inputs` are `(samples, ...)`; `data_hash` identifies them."""

    inputs: Tensors
    split: str
    data_hash: str
    indices: tuple[int, ...] = ()


@dataclass(frozen=True)
class ConvertRequest:
    """One edge of the road. `source` is a `torch.nn.Module` for exporters, else a stored artifact.

    `example` holds one batch per input, batch first. `recipe` and `calibration` are for quantizers, which take activation
    `ranges` (tensor -> low, high), or observe them on `calibration` with `infer`.
    `notes` (labels, processing) go into the file, where the format can hold them, and on to what is made of it.
    """

    source: Any
    folder: Path
    iospec: IOSpec
    example: Tensors
    recipe: QuantRecipe | None = None
    calibration: CalibrationSet | None = None
    options: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    ranges: Mapping[str, tuple[float, float]] | None = None
    infer: Infer | None = None
    notes: Mapping[str, str] = field(default_factory=dict)


@runtime_checkable
class Converter(Protocol):
    """A host-side function from file to file (or from a module to a file). Constructed without arguments.

    Optional class attributes are read by the format graph: `environment` (the name of the `edgekd env` that it runs in), `environment_here`
    (a module that makes that environment superfluous where it is installed), `needs` (module to the extra that installs it, "" for the
    module's own package), `cost_s` (rough seconds, to rank roads), `precision_options` (precision to the options that ask for it)
    and `follows` (names of the converters whose files it takes best).
    """

    name: str
    source: str
    target: str
    precisions: tuple[Precision, ...]

    def convert(self, request: ConvertRequest) -> StoredArtifact:
        """The converted artifact in `request.folder`.

        Raises:
            ConversionRejected: the model cannot be converted; names the operator or module.
            MissingDependency: a package is missing.
        """
        ...


# ---------------------------------------------------------------------------------------------- tasks and models


@runtime_checkable
class Task(Protocol):
    """What outputs mean. Everything a gate needs is numpy; everything a training needs imports torch late.

    `unpack` splits what the collate function gives into named inputs and a target. A score is per item and higher is
    better; the metric is the mean score. `binary` says that scores are 0 or 1. A task with graded scores in [0, 1] says so by an
    attribute `bounded = True`; without it their range is unknown, and scores that show no spread are refused. A subclass with `scores` of
    its own states it anew. Both are compared with the teacher's scores on validation before anything is trained. A gate takes the task whose
    source and state are those that the run was given; an object that goes on to a second call leaves what `check` learns out of its state
    by a `__getstate__`.
    """

    name: str
    metric: str
    binary: bool

    def unpack(self, batch: Any, input_names: Sequence[str]) -> tuple[dict[str, Any], Any]:
        """Inputs by name, in the order of the model's arguments, and the target (an array, or a mapping of arrays)."""
        ...

    def check(self, outputs: Tensors, targets: Any, split: str = "") -> None:
        """Raise `DataError` or `ModelError` if outputs and targets do not fit (shape, label range); `split` is what the message calls the data."""
        ...

    def scores(self, outputs: Tensors, targets: Any) -> NDArray[np.float64]:
        """One score per item, shape `(items,)`; the metric is their mean."""
        ...

    def agreement(self, outputs: Tensors, reference: Tensors) -> NDArray[np.float64]:
        """How far two models agree, per item in [0, 1]."""
        ...

    def classes(self, targets: Any) -> NDArray[np.int64] | None:
        """The class of each item for the per-class table, or `None`."""
        ...

    def loss(self, outputs: Mapping[str, torch.Tensor], target: Any) -> torch.Tensor:
        """The task's own loss, a scalar in float32."""
        ...

    def distillation(self, outputs: Mapping[str, torch.Tensor], teacher: Mapping[str, torch.Tensor], loss: str, temperature: float) -> torch.Tensor:
        """The soft-target loss of the named kind on this task's outputs, a scalar in float32."""
        ...

    def describe(self) -> dict[str, str]:
        """Enough text to rebuild the task with `edgekd.tasks.task_from`, for the manifest."""
        ...


@runtime_checkable
class Teacher(Protocol):
    """The reference model: outputs for inputs, and its module when it is one."""

    name: str
    module: torch.nn.Module | None

    def outputs(self, inputs: Tensors) -> dict[str, Array]:
        """Outputs by key path for a batch, in evaluation mode, without gradients."""
        ...

    def weights_hash(self) -> str:
        """What identifies the teacher in stage keys."""
        ...


@runtime_checkable
class StudentSpace(Protocol):
    """The set of students to choose from. A candidate is a `StudentSpec`; the space knows how to build it.

    `Fixed` and `Family` ship now; a space of subnetworks of the teacher fills `StudentSpec.keep` and is built by cutting
    the teacher by those indices.
    """

    kind: str

    def candidates(self, seed: int) -> tuple[StudentSpec, ...]:
        """Every member, or a seeded sample of a space too large to list; in a stable order."""
        ...

    def build(self, spec: StudentSpec, seed: int) -> torch.nn.Module:
        """The candidate with seeded initial weights, in training mode.

        Raises:
            Rejected: the factory refuses these arguments.
        """
        ...

    def source_hash(self) -> str:
        """What identifies the space in stage keys."""
        ...


# ---------------------------------------------------------------------------------------------- training


@runtime_checkable
class Callback(Protocol):
    """Told about the training; used by the progress display, TensorBoard and third parties."""

    def on_start(self, label: str, epochs: int, steps_per_epoch: int) -> None: ...

    def on_step(self, step: int, losses: Mapping[str, float]) -> None: ...

    def on_epoch(self, epoch: int, metrics: Mapping[str, float]) -> None: ...

    def on_end(self) -> None: ...

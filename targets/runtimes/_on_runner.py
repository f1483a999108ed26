"""What every runtime that works through the on-device runner has in common; a subclass adds what its library is and what it can do."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec

from edgekd.artifact import StoredArtifact
from edgekd.contracts import BenchmarkRequest, Transport
from edgekd.errors import DeviceError, MissingDependency, ProfileError, RunnerFailed, UnsupportedModel
from edgekd.records import Fingerprint, Format, Launch, Profile, Snapshot, SupportReport

from ._job import RunnerJobs
from ._models import compared_names, fitting_request, refused_record

SHORT_S = 120.0
"""How long a call without inferences may take, in seconds."""

SAMPLE_S = 2.0
"""What one more sample or run may add to that, in seconds."""


class OnRunner:
    """A runtime whose library is driven by `runner_<name>.py` on the device. Every launch is a fresh process there.

    A subclass sets `name`, `format`, `package` (what pip installs on the device), `modules` (any of which serves), `extra` (of edgekd, that
    installs it) and `options` (of `runtime.options`: name to type and what is allowed).
    """

    name: str
    format: Format
    package: str
    modules: tuple[str, ...]
    extra: str
    options: Mapping[str, tuple[type, str]] = {"lock": (str, "a path")}

    def __init__(self, profile: Profile, transport: Transport) -> None:
        self.profile = profile
        self.transport = transport
        self._jobs = RunnerJobs(profile, transport, self.name, package=self.package)
        self._fields: dict[str, str] | None = None

    def open(self) -> None:
        """Send the runner and ask what the device is.

        Raises:
            MissingDependency: the local target needs the library on this machine.
            DeviceError: the device lacks it, or numpy; the message holds the command that installs them.
            ProfileError: an option is unknown.
        """
        for name, value in self.profile.runtime.options.items():
            if name not in self.options or not isinstance(value, self.options[name][0]):
                allowed = ", ".join(f"{option} = {text}" for option, (_, text) in self.options.items())
                raise ProfileError(f"runtime.options.{name} is not known here", found=value, allowed=allowed, subject=name)
        here = self.profile.transport.kind == "local" and not self.profile.transport.python
        if here and not any(importlib.util.find_spec(module) for module in self.modules):
            raise MissingDependency(self.package, self.extra, purpose=f"the runtime {self.name} on this machine")
        self._jobs.install()
        self._fields, _ = self._jobs.probe()

    def close(self) -> None:
        """Nothing runs between calls; models stay on the device for the next session."""
        self._fields = None

    def fingerprint(self) -> Fingerprint:
        """What the device is, as found when the runtime was opened.

        Raises:
            DeviceError: the runtime is not open.
        """
        if self._fields is None:
            raise DeviceError("the runtime is not open", hint="use it between open() and close()", subject=self.name)
        return Fingerprint(fields=dict(self._fields))

    def snapshot(self) -> Snapshot:
        """The device's state now; the share of stolen time is that of a tenth of a second."""
        with self._jobs.folder("snapshot") as work:
            lines = self._jobs.call("snapshot", work, SHORT_S)
        return msgspec.convert(lines[0]["snapshot"], Snapshot)

    def supports(self, model: StoredArtifact) -> SupportReport:
        """Whether the model has this runtime's format and tensors of numbers, and the library takes it on the device, which is tried.

        A model that the device's library is known to compute wrongly is not supported, and does not load for any other call either.
        """
        refused = refused_record(model.record, self.format)
        if refused is not None:
            return refused
        try:
            with self._jobs.folder("check") as work:
                found = self._jobs.call("check", work, SHORT_S, model=self._jobs.send_model(model))[0]
        except UnsupportedModel as error:
            return SupportReport(supported=False, missing={str(error.subject): str(error.found)}, note=error.what)
        except RunnerFailed as error:
            return SupportReport(supported=False, missing={"session": str(error.found)}, note=f"loading the model failed hard: {error.what}")
        return msgspec.structs.replace(compared_names(model.record, found["inputs"], found["outputs"]), note=self.support_note(found))

    def support_note(self, found: Mapping[str, Any]) -> str:
        """What the check found worth saying about a model that loads."""
        return ""

    def compile(self, model: StoredArtifact, folder: Path) -> StoredArtifact:
        """The same files in `folder`: this runtime deploys what it is given."""
        return model if folder.resolve() == model.folder.resolve() else model.copy_to(folder)

    def benchmark(self, request: BenchmarkRequest) -> tuple[Launch, ...]:
        """One launch, a fresh process on the device, per label of the schedule, in order, with raw samples.

        A sample covers handing the inputs in, the inference and taking all outputs out, in the types of the file.

        Raises:
            ConfigError: the schedule is empty or names a label without a model or inputs; DataError: the inputs do not fit.
            DeviceBusy: another benchmark held the device for `measure.lock_wait_s`.
            DeviceTimeout, LinkLost, RunnerFailed: the device or the way to it failed; ask again to find a job that still runs.
            UnsupportedModel, ModelError: a model cannot be loaded, or not run with these inputs.
        """
        return self._jobs.benchmark(replace(request, inputs=fitting_request(request)))

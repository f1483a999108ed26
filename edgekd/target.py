"""A profile made live: the transport opened, the runtime on it checked, the device identified."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import msgspec

from edgekd import registry
from edgekd.artifact import StoredArtifact
from edgekd.contracts import Runtime, Target, Transport
from edgekd.errors import ConfigError, ProfileError, UnsupportedModel, near_names
from edgekd.records import Capabilities, Fingerprint, Profile, SupportReport
from edgekd.settings.profile_file import Overrides, load_profile, override_profile


class LiveTarget:
    """A target to measure and run on. Open it with `with`, or with `open` and `close`; it can be opened again after closing.

    `transport` and `runtime` exist from the start; `capabilities` and `fingerprint` from `open` on.
    """

    profile: Profile
    transport: Transport
    runtime: Runtime
    capabilities: Capabilities
    fingerprint: Fingerprint

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self._stack: ExitStack | None = None
        self._build()

    def _build(self) -> None:
        self.transport = _plugin("transports", "transport.kind", self.profile.transport.kind, self.profile)(self.profile)
        self.runtime = _plugin("runtimes", "runtime.kind", self.profile.runtime.kind, self.profile)(self.profile, self.transport)

    def __getattr__(self, name: str) -> Any:
        if name in ("capabilities", "fingerprint"):
            raise ConfigError(f"the target has no {name} before it is open", hint="with edgekd.connect(...) as target: ...", subject=name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def name(self) -> str:
        """The profile's name."""
        return self.profile.name

    @property
    def simulated(self) -> str:
        """Empty for a real device, else `null`, `emulated` or `fake`, as the runtime says."""
        return self.capabilities.simulated

    def open(self) -> LiveTarget:
        """The target itself, connected: transport, then runtime, then what it is and can do. On an error all is closed again.

        Raises:
            DeviceError: the device cannot be reached, or lacks the runtime.
            MissingDependency: a package is missing on this machine.
            ProfileError: the profile asks for a precision that the runtime lacks, or identifies the device by a field that
                its fingerprint lacks.
            ConfigError: the target is open already.
        """
        if self._stack is not None:
            raise ConfigError(f"the target {self.name!r} is open already", hint="use the target at hand, or close it first", subject=self.name)
        if "fingerprint" in vars(self):  # a second time: plug-ins start fresh
            self._build()
        with ExitStack() as stack:
            stack.callback(self.transport.close)
            self.transport.open()
            stack.callback(self.runtime.close)
            self.runtime.open()
            able = self.runtime.capabilities()
            fields = {"runtime": self.runtime.name, "threads": str(self.profile.runtime.threads)} | self.runtime.fingerprint().fields
            self.fingerprint = Fingerprint(fields=fields)
            self.capabilities = msgspec.structs.replace(able, proven_on_hardware=not able.simulated and self.profile.proven_here(self.fingerprint))
            self._check()
            self._stack = stack.pop_all()
        return self

    def close(self) -> None:
        """Release the runtime, then the transport; it is no error if nothing is open."""
        stack, self._stack = self._stack, None
        if stack is not None:
            stack.close()

    def __enter__(self) -> LiveTarget:
        return self.open()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def supports(self, model: StoredArtifact) -> SupportReport:
        """Whether the runtime on this device runs the model, and what it cannot."""
        return self.runtime.supports(model)

    def _check(self) -> None:
        for precision in self.profile.runtime.precisions:
            if precision not in self.capabilities.precisions:
                raise ProfileError(
                    f"the profile {self.name!r} asks for a precision that its runtime lacks on this device",
                    found=precision.value,
                    allowed=", ".join(item.value for item in self.capabilities.precisions),
                    hint="change runtime.precisions",
                    subject=self.name,
                )
        for field in self.profile.identity:
            if field not in self.fingerprint.fields:
                raise ProfileError(
                    f"the profile {self.name!r} identifies the device by a field that the device does not tell",
                    found=field,
                    allowed=near_names(field, self.fingerprint.fields),
                    hint="change `identity`",
                    subject=self.name,
                )


def require_support(target: Target, model: StoredArtifact, subject: object) -> SupportReport:
    """What the target says of a file that it runs; `subject` is what the error is about.

    Raises:
        UnsupportedModel: names what the target lacks, each with the reason.
    """
    report = target.runtime.supports(model)
    if not report.supported:
        missing = "; ".join(f"{name}: {why}" for name, why in report.missing.items())
        raise UnsupportedModel("the target cannot run the model", found=missing, subject=subject)
    return report


def hardware_text(profile: Profile, target: Target | None = None) -> str:
    """Whether the profile ever ran on real hardware of this kind, in words; without an open `target`, on which hardware it ran."""
    places = ", ".join(profile.proven_on)
    if target is None:
        return f"on {places}" + (f" ({profile.proof})" if profile.proof else "") if places else "never ran on real hardware"
    if target.capabilities.proven_on_hardware:
        return "yes" + (f": {profile.proof}" if profile.proof else "")
    fields = target.fingerprint.fields
    kind = " ".join([fields.get("machine", "unknown machine"), fields.get("isa", "")]).strip()
    return f"never ran on real hardware of this kind: {kind}; proven on {places}" if places and not target.simulated else "never ran on real hardware"


def connect(profile: str | Path | Profile = "local", *, overrides: Overrides = ()) -> LiveTarget:
    """The target of this profile (a name, a path or a record), not yet open: use it as a context manager.

    `overrides` change fields for this call, for example `("runtime.threads=2",)`.

    Raises:
        ProfileError: no such profile, an unknown key, a value that cannot be used, or a transport or runtime that no
            plug-in provides.
    """
    record = override_profile(profile, overrides) if isinstance(profile, Profile) else load_profile(profile, overrides)
    return LiveTarget(record)


def _plugin(kind: str, key: str, name: str, profile: Profile) -> Any:
    known = registry.table(kind)
    if name not in known:
        raise ProfileError(
            f"the profile {profile.name!r} names a {key.partition('.')[0]} that no plug-in provides",
            found=f'{key} = "{name}"',
            allowed=near_names(name, known),
            hint="correct the name, or install the package that provides it",
            subject=name,
        )
    return registry.load(kind, name)

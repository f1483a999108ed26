"""Every error that edgekd raises on purpose, in one tree.

EdgekdError
├── InputError                the user's input is wrong: stop
│   ├── ConfigError           an option, a job file or a call
│   ├── ProfileError          a target profile
│   ├── BudgetError           a budget without meaning, or in the wrong unit
│   ├── DataError             a data set, a batch, labels, calibration inputs
│   ├── ModelError            a teacher, a student or a model file
│   ├── BundleError           a bundle that is incomplete or was changed
│   ├── RegistryError         a name that no plug-in has, or that two want
│   ├── MissingDependency     an extra that is not installed
│   └── MissingEnvironment    a converter's own environment that was not made, or is out of date
├── DeviceError               the device failed: retry or report
│   ├── LinkLost              the connection broke
│   ├── DeviceTimeout         a deadline passed
│   ├── DeviceBusy            somebody else holds the device
│   ├── RunnerFailed          the program on the device died or spoke nonsense
│   └── MeasurementInvalid    no launch was valid, so there is nothing to judge: ends in refuse
├── StorageError              the disk is full or not writable
├── EnvironmentFailed         a converter's own environment could not be made
└── Rejected                  a candidate does not qualify: the search goes on
    ├── ConversionRejected    a converter refused the model
    │   └── WorkerFailed      a converter's own process died, hung, took too much memory or spoke nonsense
    ├── ParityRejected        a converted model computes something else
    ├── UnsupportedModel      the target cannot run the model
    └── TrainingDiverged      the loss left the finite numbers

A broken promise of our own code is not an `EdgekdError`: it surfaces as it is.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

EXIT_PASS = 0
EXIT_FAIL = 1
EXIT_REFUSE = 2
EXIT_ERROR = 3
EXIT_INTERRUPTED = 130


class EdgekdError(Exception):
    """The root. The message says what is wrong, what was found, what is allowed and what to do next.

    `subject` is the thing concerned (a target, a converter, a layer, a file), for code that reacts to it.
    """

    exit_code: ClassVar[int] = EXIT_ERROR

    def __init__(
        self,
        what: str,
        *,
        found: object = None,
        allowed: object = None,
        hint: str | None = None,
        subject: object = None,
    ) -> None:
        self.what = what
        self.found = found
        self.allowed = allowed
        self.hint = hint
        self.subject = subject
        parts = [what.rstrip(".")]
        if found is not None:
            parts.append(f"found: {found}")
        if allowed is not None:
            parts.append(f"allowed: {allowed}")
        if hint is not None:
            parts.append(f"next step: {hint}")
        super().__init__("; ".join(parts))


class InputError(EdgekdError):
    """What the user gave cannot be used."""


class ConfigError(InputError):
    """An option, a job file or a call is wrong."""


class ProfileError(InputError):
    """A target profile is unknown or not well-formed."""


class BudgetError(InputError):
    """A budget is not positive, contradicts itself or is in the wrong unit."""


class DataError(InputError):
    """Data are empty, of the wrong shape, not finite or out of range."""


class ModelError(InputError):
    """A teacher, a student or a model file cannot be used."""


class BundleError(InputError):
    """A bundle misses a file, or a file is not the one that was hashed."""


class RegistryError(InputError):
    """A plug-in name is unknown, taken, or its class lacks a method."""


class MissingDependency(InputError):
    """A package of an extra is not installed."""

    def __init__(self, package: str, extra: str, *, purpose: str) -> None:
        self.package = package
        self.extra = extra
        super().__init__(
            f"{purpose} needs the package {package!r}, which is not installed",
            hint=f'pip install "edgekd[{extra}]"',
            subject=package,
        )


class MissingEnvironment(InputError):
    """A converter runs in an environment of its own, which was not made or was made from another list of packages."""

    def __init__(self, environment: str, *, found: str, purpose: str, hint: str) -> None:
        self.environment = environment
        super().__init__(f"{purpose} needs the environment {environment!r}", found=found, hint=hint, subject=environment)


class DeviceError(EdgekdError):
    """The device or the way to it failed."""


class LinkLost(DeviceError):
    """The connection to the device broke before an answer came."""


class DeviceTimeout(DeviceError):
    """The device did not answer within the deadline."""


class DeviceBusy(DeviceError):
    """Another process holds the device's lock."""


class RunnerFailed(DeviceError):
    """The program on the device died, or its answer cannot be read."""


class MeasurementInvalid(DeviceError):
    """No launch was valid (contended, throttled), so there is no number to judge. It ends a command like a refuse."""

    exit_code: ClassVar[int] = EXIT_REFUSE


class StorageError(EdgekdError):
    """A file could not be written whole; what was there before is untouched."""


class EnvironmentFailed(EdgekdError):
    """A converter's own environment could not be made; what was there before is untouched."""


class Rejected(EdgekdError):
    """A candidate does not qualify; whoever proposed it goes on to the next."""


class ConversionRejected(Rejected):
    """A converter refused the model."""


class WorkerFailed(ConversionRejected):
    """The process of its own that a converter runs in ended without a result.

    `reason` is `error` (it stopped by itself), `crash` (a signal), `timeout`, `memory`, `noise` (its log grew without end) or `rubbish`
    (no readable result). `log` is the file with everything it printed, `tail` the last lines of it.
    """

    def __init__(self, what: str, *, reason: str, log: Path, tail: str, found: object = None, allowed: object = None, hint: str, subject: object) -> None:
        self.reason = reason
        self.log = log
        self.tail = tail
        super().__init__(what, found=found, allowed=allowed, hint=f"{hint}; everything it printed: {log}", subject=subject)


class ParityRejected(Rejected):
    """A converted model does not compute what its source computes."""


class UnsupportedModel(Rejected):
    """The target cannot run the model."""


class TrainingDiverged(Rejected):
    """The loss or a weight left the finite numbers."""


def near_names(name: str, known: Iterable[str]) -> str:
    """The allowed names as text, the near ones first: `local (did you mean this?), null`."""
    names = sorted(known)
    near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
    if not names:
        return "(none)"
    if not near:
        return ", ".join(names)
    rest = [other for other in names if other not in near]
    return ", ".join([f"{near[0]} (did you mean this?)", *near[1:], *rest])

"""What is installed, what is missing and the exact line that helps; which targets can be opened here."""

from __future__ import annotations

import platform

from edgekd import registry
from edgekd.conversion.environments import EnvironmentState, list_environments
from edgekd.errors import EdgekdError
from edgekd.extras import ExtraRow, check_extras
from edgekd.records import Profile
from edgekd.records.base import Record
from edgekd.settings.profile_file import ProfileEntry, list_profiles
from edgekd.target import connect, hardware_text

_ARCHITECTURES = ("aarch64", "x86_64")


class TargetRow(Record, tag="edgekd.doctor_target/1", frozen=True, kw_only=True):
    """One profile: what it is, and whether it can be opened from here. `tried` is false when nobody tried to open it.

    `proven_on_hardware` says whether it ever ran on real hardware like the device that was opened (`None`: none was); `hardware` the same in words.
    """

    profile: str
    origin: str
    description: str = ""
    transport: str = ""
    runtime: str = ""
    precisions: tuple[str, ...] = ()
    threads: int = 0
    proven_on_hardware: bool | None = None
    hardware: str = ""
    tried: bool = False
    ready: bool = False
    simulated: str = ""
    device: dict[str, str] = {}
    problem: str = ""
    remedy: str = ""


class Diagnosis(Record, tag="edgekd.doctor/1", frozen=True, kw_only=True):
    """Everything that `edgekd doctor` prints. `problem` concerns the machine as a whole and is empty when it fits."""

    edgekd: str
    python: str
    machine: str
    extras: tuple[ExtraRow, ...]
    targets: tuple[TargetRow, ...]
    environments: tuple[EnvironmentState, ...] = ()
    problem: str = ""


def diagnose() -> Diagnosis:
    """The whole account. Opens every target once; imports no torch."""
    from edgekd import __version__

    return Diagnosis(
        edgekd=__version__,
        python=platform.python_version(),
        machine=f"{platform.system()} {platform.machine()}",
        extras=check_extras(),
        targets=check_targets(),
        environments=list_environments(),
        problem=architecture_problem(),
    )


def architecture_problem(system: str | None = None, machine: str | None = None) -> str:
    """Why edgekd's packages do not fit this machine, with what to do; empty when they do. The default is the machine at hand."""
    system, machine = system or platform.system(), machine or platform.machine()
    if system == "Linux" and machine in _ARCHITECTURES:
        return ""
    return (
        f"no wheels are known for {system} on {machine}: ONNX Runtime and torch are published for Linux on {' and '.join(_ARCHITECTURES)}; "
        "next step: run edgekd on such a machine and reach this one as a target, or build the packages from source"
    )


def check_targets(*, open_them: bool = True) -> tuple[TargetRow, ...]:
    """A row for every profile on the search path. With `open_them` each is opened and closed once, which is the only proof that it can be."""
    return tuple(_check_target(entry, open_them) for entry in list_profiles())


def _check_target(entry: ProfileEntry, open_it: bool) -> TargetRow:
    profile = entry.profile
    if profile is None:
        return TargetRow(profile=entry.name, origin=entry.origin, problem=entry.problem, remedy=f"correct {entry.path}")
    simulated, device, problem, remedy = "", {}, "", ""
    proven, hardware = None, hardware_text(profile)
    if open_it:
        try:
            with connect(profile) as target:
                simulated, device = target.simulated, dict(target.fingerprint.fields)
                proven, hardware = target.capabilities.proven_on_hardware, hardware_text(profile, target)
        except EdgekdError as error:
            problem, remedy = str(error), error.hint or ""
    else:
        problem = _unprovided(profile)
        remedy = "correct the name, or install the package that provides it" if problem else ""
    return TargetRow(
        profile=profile.name,
        origin=entry.origin,
        description=profile.description,
        transport=profile.transport.kind,
        runtime=profile.runtime.kind,
        precisions=tuple(item.value for item in profile.runtime.precisions),
        threads=profile.runtime.threads,
        proven_on_hardware=proven,
        hardware=hardware,
        tried=open_it,
        ready=open_it and not problem,
        simulated=simulated,
        device=device,
        problem=problem,
        remedy=remedy,
    )


def _unprovided(profile: Profile) -> str:
    """Which part of a profile no plug-in provides, without importing any; empty when all are known."""
    parts = (("transport", "transports", profile.transport.kind), ("runtime", "runtimes", profile.runtime.kind))
    return "; ".join(f"no plug-in provides the {part} {name!r}" for part, group, name in parts if name not in registry.table(group))

"""What is installed, what is missing and the exact line that helps; which targets can be opened here."""

from __future__ import annotations

import configparser
import importlib.metadata
import importlib.util
import platform
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from edgekd import registry
from edgekd.conversion.environments import EnvironmentState, list_environments
from edgekd.errors import ConfigError, EdgekdError
from edgekd.records import Profile
from edgekd.records.base import Record
from edgekd.settings.profile_file import ProfileEntry, list_profiles
from edgekd.target import connect, hardware_text

_MODULES = {"scikit-learn": "sklearn", "tensorflow-cpu": "tensorflow"}
"""Distributions whose module is called otherwise; the rest only turn `-` into `_`."""

_DEVELOPMENT = frozenset({"dev", "testing"})
_ARCHITECTURES = ("aarch64", "x86_64")
_REQUIREMENT = re.compile(r"^\s*([A-Za-z0-9._-]+)\s*(?:\[[^\]]*\])?\s*\(?([^;)]*)\)?\s*(?:;\s*(.*))?$")
_EXTRA = re.compile(r"""extra\s*==\s*['"]([^'"]+)['"]""")
_MACHINE = re.compile(r"""platform_machine\s*==\s*['"]([^'"]+)['"]""")


class PackageRow(Record, tag="edgekd.doctor_package/1", frozen=True, kw_only=True):
    """One package of an extra. `version` is empty when it is not installed; `problem` is empty when all is well."""

    package: str
    wanted: str
    version: str = ""
    problem: str = ""


class ExtraRow(Record, tag="edgekd.doctor_extra/1", frozen=True, kw_only=True):
    """One extra with its packages. `remedy` is the line that installs what is missing, empty when nothing is."""

    extra: str
    packages: tuple[PackageRow, ...]
    remedy: str = ""

    @property
    def complete(self) -> bool:
        return not self.remedy


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


def declared_extras() -> dict[str, tuple[str, ...]]:
    """Extra to its requirements, as installed, else as written in the checkout's `setup.cfg`; those for development are left out.

    Raises:
        ConfigError: neither is there: the package was copied by hand.
    """
    try:
        requirements = importlib.metadata.distribution("edgekd").requires or []
    except importlib.metadata.PackageNotFoundError:
        return _from_setup_cfg(_checkout() / "setup.cfg")
    found: dict[str, list[str]] = {}
    for text in requirements:
        marker = _EXTRA.search(text)
        if marker:
            found.setdefault(marker[1], []).append(text)
    return {name: tuple(texts) for name, texts in sorted(found.items()) if name not in _DEVELOPMENT}


def check_extras(declared: Mapping[str, Iterable[str]] | None = None) -> tuple[ExtraRow, ...]:
    """A row for every extra, its packages looked up without importing any; the default is what edgekd declares.

    Packages for machines of another architecture are left out.
    """
    rows = []
    for extra, requirements in (declared_extras() if declared is None else declared).items():
        packages = tuple(check_package(text) for text in requirements if not _for_another_machine(text))
        missing = any(row.problem for row in packages)
        rows.append(ExtraRow(extra=extra, packages=packages, remedy=install_line(extra) if missing else ""))
    return tuple(rows)


def _for_another_machine(requirement: str) -> bool:
    match = _MACHINE.search(requirement)
    return match is not None and match[1] != platform.machine()


def check_package(requirement: str) -> PackageRow:
    """Whether a requirement such as `onnx>=1.17` is met, from metadata alone.

    Raises:
        ConfigError: the text is no requirement, or uses a comparison other than `>=`, `>`, `<=`, `<`, `==`, `!=`.
    """
    match = _REQUIREMENT.match(requirement)
    if not match:
        raise ConfigError("this is not a requirement", found=requirement, allowed="for example onnx>=1.17")
    package, wanted = match[1], match[2].replace(" ", "")
    module = _MODULES.get(package, package.replace("-", "_"))
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        if importlib.util.find_spec(module) is None:
            return PackageRow(package=package, wanted=wanted, problem="not installed")
        return PackageRow(package=package, wanted=wanted, version="unknown (from another distribution)")
    if importlib.util.find_spec(module) is None:
        return PackageRow(package=package, wanted=wanted, version=version, problem=f"installed, but its module {module} is not there")
    if not version_fits(version, wanted):
        return PackageRow(package=package, wanted=wanted, version=version, problem=f"{version} does not fit {wanted}")
    return PackageRow(package=package, wanted=wanted, version=version)


def version_fits(version: str, wanted: str) -> bool:
    """Whether `1.32.0` fits `>=1.20,<2`: compared number by number, what follows the numbers (`+cpu`, `rc1`) does not count.

    Raises:
        ConfigError: another comparison than `>=`, `>`, `<=`, `<`, `==`, `!=`.
    """
    have = _numbers(version)
    for part in filter(None, wanted.split(",")):
        match = re.match(r"^(>=|<=|==|!=|>|<)(\d[\w.+!-]*)$", part)
        if not match:
            raise ConfigError("this comparison of versions is not understood", found=part, allowed=">=, >, <=, <, ==, !=")
        limit = _numbers(match[2])
        width = max(len(have), len(limit))
        left, right = have + (0,) * (width - len(have)), limit + (0,) * (width - len(limit))
        fits = {">=": left >= right, ">": left > right, "<=": left <= right, "<": left < right, "==": left == right, "!=": left != right}
        if not fits[match[1]]:
            return False
    return True


def install_line(extra: str) -> str:
    """The line that installs an extra for the Python that runs: from the package index, or from the checkout at hand."""
    checkout = _checkout()
    if (checkout / "setup.cfg").is_file():
        return f'{sys.executable} -m pip install -e "{checkout}[{extra}]"'
    return f'{sys.executable} -m pip install "edgekd[{extra}]"'


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


def _checkout() -> Path:
    return Path(__file__).resolve().parent.parent


def _from_setup_cfg(path: Path) -> dict[str, tuple[str, ...]]:
    if not path.is_file():
        raise ConfigError(
            "how edgekd was installed cannot be told: it has neither metadata nor a checkout around it", hint='pip install "edgekd[x86]"', subject=str(path)
        )
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(path, encoding="utf-8")
    section = parser["options.extras_require"]
    return {name: tuple(filter(None, text.split("\n"))) for name, text in sorted(section.items()) if name not in _DEVELOPMENT}


def _numbers(version: str) -> tuple[int, ...]:
    head = re.match(r"^\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in head[0].split(".")) if head else ()

"""The extras of edgekd: what each adds and how large it is, what of it is installed, and the line that installs the rest."""

from __future__ import annotations

import configparser
import importlib.metadata
import importlib.util
import platform
import re
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

from edgekd.errors import ConfigError
from edgekd.records.base import Record

_MODULES = {"scikit-learn": "sklearn", "tensorflow-cpu": "tensorflow"}
"""Distributions whose module is called otherwise; the rest only turn `-` into `_`."""

_DEVELOPMENT = frozenset({"dev", "testing"})
_REQUIREMENT = re.compile(r"^\s*([A-Za-z0-9._-]+)\s*(?:\[([^\]]*)\])?\s*\(?([^;)]*)\)?\s*(?:;\s*(.*))?$")
_EXTRA = re.compile(r"""extra\s*==\s*['"]([^'"]+)['"]""")
_MACHINE = re.compile(r"""platform_machine\s*==\s*['"]([^'"]+)['"]""")

ABOUT: Mapping[str, str] = {
    "x86": "ONNX Runtime on the CPU: bench, validate, gate, int8 and fp16 ONNX",
    "jetson": "Q/DQ and fp16 ONNX files for TensorRT, compared on the host; TensorRT itself comes with JetPack",
    "litert": "LiteRT on the CPU: bench, validate and gate of TFLite files",
    "android": "TFLite files from torch, int8 ones among them, and LiteRT to compare them; needs distill too",
    "tensorflow": "Keras files and SavedModels as sources",
    "distill": "torch: training students, exporting them to ONNX",
    "demo": "scikit-learn's handwritten digits for `edgekd demo`",
    "wandb": "training curves in Weights & Biases",
    "all": "everything above but demo and wandb",
}
"""What an extra is for, in the order in which they are shown."""


class PackageRow(Record, tag="edgekd.doctor_package/1", frozen=True, kw_only=True):
    """One package of an extra. `version` is empty when it is not installed; `problem` is empty when all is well."""

    package: str
    wanted: str
    version: str = ""
    problem: str = ""


class ExtraSize(Record, tag="edgekd.extra_size/1", frozen=True, kw_only=True):
    """What an extra added to an environment that held edgekd alone, as `benchmarks/extras.py` measured it: megabytes on disk, packages, seconds."""

    size_mb: float
    packages: int
    seconds: float


class ExtraSizes(Record, tag="edgekd.extra_sizes/1", frozen=True, kw_only=True):
    """The sizes of all extras, and what they were measured on. `base_mb` is edgekd with what it always needs."""

    measured_on: str
    date: str
    base_mb: float
    extras: dict[str, ExtraSize]


class ExtraRow(Record, tag="edgekd.doctor_extra/2", frozen=True, kw_only=True):
    """One extra with its packages. `remedy` is the line that installs what is missing, empty when nothing is.

    `size_mb` is what it adds on disk where nothing of it is installed; `None` for an extra that was not measured.
    """

    extra: str
    packages: tuple[PackageRow, ...]
    about: str = ""
    size_mb: float | None = None
    remedy: str = ""

    @property
    def complete(self) -> bool:
        return not self.remedy


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
    known = declared_extras() if declared is None else declared
    sizes = extra_sizes().extras
    rows = []
    for extra in sorted(known, key=lambda name: (list(ABOUT).index(name) if name in ABOUT else len(ABOUT), name)):
        packages = tuple(dict.fromkeys(check_package(text) for text in _flat(extra, known) if not _for_another_machine(text)))
        missing = any(row.problem for row in packages)
        size = sizes[extra].size_mb if extra in sizes else None
        rows.append(ExtraRow(extra=extra, packages=packages, about=ABOUT.get(extra, ""), size_mb=size, remedy=install_line(extra) if missing else ""))
    return tuple(rows)


def _flat(extra: str, known: Mapping[str, Iterable[str]]) -> list[str]:
    """The requirements of an extra, with those of the extras of edgekd that it names in place of their names."""
    found = []
    for text in known[extra]:
        match = _REQUIREMENT.match(text)
        if match and match[1] == "edgekd":
            found += [inner for name in (match[2] or "").split(",") if name.strip() for inner in _flat(name.strip(), known)]
        else:
            found.append(text)
    return found


@cache
def extra_sizes() -> ExtraSizes:
    """The sizes that ship with this version."""
    return ExtraSizes.load(Path(__file__).parent / "extras.json")


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
    package, wanted = match[1], match[3].replace(" ", "")
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

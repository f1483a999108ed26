"""Environments of their own for converters whose pinned packages exclude the rest: made from hashed lists, whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import importlib.resources
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from msgspec.structs import replace

from edgekd.errors import ConfigError, EnvironmentFailed, InputError, MissingEnvironment, StorageError, near_names
from edgekd.records.base import Record
from edgekd.records.measure import NonNegativeFloat
from edgekd.records.model import NonNegative
from edgekd.storage import sha256_bytes, write_atomic

STAMP = "edgekd-environment.json"
"""The file in an environment that says what it was made from."""

Say = Callable[[str], None]
"""Told what is being done, one line at a time."""

_HEADER = re.compile(r"^# (purpose|python|machines|size_mb): (.+)$", re.MULTILINE)
_PYTHON = re.compile(r"^3\.(\d+) to 3\.(\d+)$")
_PIP_MEDDLING = (
    "PIP_TARGET",
    "PIP_PREFIX",
    "PIP_ROOT",
    "PIP_USER",
    "PIP_CONSTRAINT",
    "PIP_REQUIREMENT",
    "PIP_REQUIRE_VIRTUALENV",
    "PIP_NO_BINARY",
    "PIP_PYTHON",
)
_TIMEOUT_S = 3600.0


@dataclass(frozen=True)
class EnvironmentSpec:
    """What an environment is: `requirements` is the text of its pinned, hashed list, `digest` its SHA-256.

    `minors` are the first and last Python 3 minor version that the list fits, `machines` the architectures that have wheels for all
    of it, `size_mb` about what it takes on disk (10^6 bytes).
    """

    name: str
    purpose: str
    requirements: str
    digest: str
    minors: tuple[int, int]
    machines: tuple[str, ...]
    size_mb: int

    @property
    def pythons(self) -> str:
        """The Python versions in words."""
        low, high = self.minors
        return f"3.{low}" if low == high else f"3.{low} to 3.{high}"


class EnvironmentStamp(Record, tag="edgekd.environment_stamp/1", frozen=True, kw_only=True):
    """What lies in an environment, written last: an environment without it was not made by edgekd. `size_bytes` without links."""

    name: str
    requirements: str
    python: str
    size_bytes: NonNegative
    seconds: NonNegativeFloat
    created_at: str


class EnvironmentState(Record, tag="edgekd.environment_state/1", frozen=True, kw_only=True):
    """How an environment stands: `ready`, `absent`, `stale` (made from another list) or `broken`. `remedy` is empty when it is ready."""

    name: str
    purpose: str
    folder: str
    state: str
    pythons: str
    machines: tuple[str, ...]
    expected_mb: NonNegative
    python: str = ""
    size_bytes: NonNegative = 0
    seconds: NonNegativeFloat = 0.0
    created_at: str = ""
    problem: str = ""
    remedy: str = ""


def cache_folder() -> Path:
    """Where edgekd keeps what belongs to the user and can be made again: `$XDG_CACHE_HOME/edgekd`, by default `~/.cache/edgekd`."""
    told = os.environ.get("XDG_CACHE_HOME", "")
    base = Path(told) if told and Path(told).is_absolute() else Path.home() / ".cache"
    return base / "edgekd"


def environments_folder(path: Path | None = None) -> Path:
    """The folder that holds the environments: `path`, or `environments` in the user's cache folder."""
    return cache_folder() / "environments" if path is None else Path(path).absolute()


def known_environments() -> dict[str, EnvironmentSpec]:
    """Every environment that edgekd can make, by name."""
    lists = importlib.resources.files("edgekd.converters") / "environments"
    names = sorted(item.name for item in lists.iterdir() if item.name.endswith(".txt"))
    return {name.removesuffix(".txt"): parse_list(name.removesuffix(".txt"), (lists / name).read_text(encoding="utf-8")) for name in names}


def parse_list(name: str, text: str) -> EnvironmentSpec:
    """The environment that a requirement file describes; its head holds `# purpose:`, `# python:`, `# machines:` and `# size_mb:`.

    Raises:
        InputError: a line of the head is missing or cannot be read.
    """
    head = dict(_HEADER.findall(text))
    range_ = _PYTHON.match(head.get("python", ""))
    if set(head) != {"purpose", "python", "machines", "size_mb"} or range_ is None or not head["size_mb"].isdigit():
        raise InputError(
            f"the list of packages of {name!r} has no proper head", found=head, allowed="# purpose, # python: 3.10 to 3.11, # machines, # size_mb", subject=name
        )
    machines = tuple(head["machines"].replace(",", " ").split())
    return EnvironmentSpec(name, head["purpose"], text, sha256_bytes(text.encode()), (int(range_[1]), int(range_[2])), machines, int(head["size_mb"]))


def spec_of(name: str, known: Mapping[str, EnvironmentSpec] | None = None) -> EnvironmentSpec:
    """The environment called `name`.

    Raises:
        ConfigError: there is none; offers near names.
    """
    specs = known_environments() if known is None else known
    if name not in specs:
        raise ConfigError(f"there is no environment called {name!r}", found=name, allowed=near_names(name, specs), subject=name)
    return specs[name]


def create_line(name: str, path: Path | None = None) -> str:
    """The command that makes an environment, for messages."""
    return f"edgekd env create {name}" + (f" --path {path}" if path is not None else "")


def environment_state(spec: EnvironmentSpec, path: Path | None = None) -> EnvironmentState:
    """How the environment stands below `path` (default: the user's cache folder); runs nothing."""
    folder = environments_folder(path) / spec.name
    line = create_line(spec.name, path)
    state = EnvironmentState(
        name=spec.name, purpose=spec.purpose, folder=str(folder), state="absent", pythons=spec.pythons, machines=spec.machines, expected_mb=spec.size_mb
    )
    if not folder.exists():
        return replace(state, problem="not made yet", remedy=line)
    try:
        stamp = EnvironmentStamp.load(folder / STAMP)
    except InputError as error:
        return replace(state, state="broken", problem=error.what, remedy=f"remove {folder}, then: {line}")
    state = replace(state, python=stamp.python, size_bytes=stamp.size_bytes, seconds=stamp.seconds, created_at=stamp.created_at)
    if stamp.requirements != spec.digest:
        problem = f"made from another list of packages ({stamp.requirements[:12]}, now {spec.digest[:12]})"
        return replace(state, state="stale", problem=problem, remedy=line)
    if not os.access(folder / "bin" / "python", os.X_OK):
        return replace(state, state="broken", problem="its Python is gone: the interpreter that it was made with was removed", remedy=line)
    return replace(state, state="ready")


def list_environments(path: Path | None = None) -> tuple[EnvironmentState, ...]:
    """How every known environment stands, sorted by name."""
    return tuple(environment_state(spec, path) for spec in known_environments().values())


def environment_python(name: str, *, purpose: str, path: Path | None = None) -> Path:
    """The interpreter of a ready environment.

    Raises:
        MissingEnvironment: it was not made, is stale or broken; names the line that makes it. ConfigError: an unknown name.
    """
    state = environment_state(spec_of(name), path)
    if state.state != "ready":
        raise MissingEnvironment(name, found=f"{state.state}: {state.problem}", purpose=purpose, hint=state.remedy)
    return Path(state.folder) / "bin" / "python"


def remove_environment(spec: EnvironmentSpec, path: Path | None = None) -> int:
    """Remove an environment; the bytes that it had. Nothing happens, and 0 is given, if it is not there.

    Raises:
        ConfigError: the folder was not made by edgekd. StorageError: it cannot be removed.
    """
    home = environments_folder(path)
    folder = home / spec.name
    if not folder.exists():
        return 0
    with _locked(home, spec.name, lambda _: None):
        if not (folder / STAMP).is_file():
            raise ConfigError("this folder was not made by `edgekd env create`", found=str(folder), hint="remove it by hand if it is yours", subject=folder)
        size = EnvironmentStamp.load(folder / STAMP).size_bytes
        doomed = Path(tempfile.mkdtemp(prefix=f".{spec.name}.", dir=home))
        os.replace(folder, doomed / spec.name)
        shutil.rmtree(doomed)
    return size


def create_environment(
    spec: EnvironmentSpec, path: Path | None = None, *, python: str | None = None, again: bool = False, say: Say = lambda _: None
) -> EnvironmentState:
    """The environment, made now unless it is ready already (`again` makes it anew): a `venv` with exactly the listed packages.

    It is built beside its place and renamed into it, so that what stands there is whole; a stale one is replaced at the end. Two
    processes do not make one environment: the second waits for the first and takes its result. `python` names an interpreter; the
    default is the one at hand if it fits, else the newest on the path that does. pip reads the user's own settings (index, proxy).

    Raises:
        ConfigError: no interpreter fits, or this machine has no wheels. StorageError: the disk is too small or not writable.
        EnvironmentFailed: venv or pip failed; with its last lines.
    """
    home = environments_folder(path)
    machine = platform.machine()
    if machine not in spec.machines:
        raise ConfigError(
            f"the environment {spec.name!r} has no wheels for this machine",
            found=machine,
            allowed=", ".join(spec.machines),
            hint="make it on such a machine",
            subject=spec.name,
        )
    with _locked(home, spec.name, say):
        state = environment_state(spec, path)
        if state.state == "ready" and not again:
            return state
        folder = home / spec.name
        if folder.exists() and not (folder / STAMP).is_file():
            raise ConfigError(
                "a folder that edgekd did not make stands in the way", found=str(folder), hint="remove it, or give another --path", subject=folder
            )
        interpreter = find_python(spec, python)
        _require_space(home, spec)
        for leftover in home.glob(f".{spec.name}.*"):
            if leftover.is_dir():
                shutil.rmtree(leftover)
        say(f"making {spec.name} with {interpreter} in {folder}: about {spec.size_mb} MB")
        _build(spec, folder, interpreter, say)
    return environment_state(spec, path)


def find_python(spec: EnvironmentSpec, python: str | None = None) -> Path:
    """An interpreter whose version the list fits: `python` if given, else the one at hand, else the newest on the path.

    Raises:
        ConfigError: there is none.
    """
    low, high = spec.minors
    wanted = [python] if python is not None else [sys.executable, *(f"python3.{minor}" for minor in range(high, low - 1, -1))]
    seen = []
    for name in wanted:
        found = shutil.which(name)
        version = _version(found) if found else None
        if version and low <= version[0] <= high:
            return Path(str(found))
        seen.append(f"{name}: {f'Python {version[1]}' if version else 'not there'}")
    raise ConfigError(
        f"no Python fits the environment {spec.name!r}",
        found=", ".join(seen),
        allowed=f"Python {spec.pythons}",
        hint=f"install one, and name it: {create_line(spec.name)} --python /path/to/python3.{high}",
        subject=spec.name,
    )


def _version(python: str) -> tuple[int, str] | None:
    """The minor and the whole version of a Python 3 interpreter; nothing if it does not run."""
    code = "import sys; print(sys.version_info[0], sys.version_info[1], sys.version.split()[0])"
    try:
        done = subprocess.run([python, "-I", "-c", code], capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    words = done.stdout.split()
    return (int(words[1]), words[2]) if done.returncode == 0 and len(words) == 3 and words[0] == "3" else None


def _require_space(home: Path, spec: EnvironmentSpec) -> None:
    free = shutil.disk_usage(home).free / 1e6
    wanted = spec.size_mb * 1.6  # the wheels lie beside what is unpacked while pip works
    if free < wanted:
        raise StorageError(
            f"there is not enough room for the environment {spec.name!r}",
            found=f"{free:.0f} MB free in {home}",
            allowed=f"about {wanted:.0f} MB",
            hint="free some space, or give another --path",
            subject=home,
        )


def _build(spec: EnvironmentSpec, folder: Path, interpreter: Path, say: Say) -> None:
    """Make the environment beside `folder` and put it there."""
    begun = time.monotonic()
    work = Path(tempfile.mkdtemp(prefix=f".{spec.name}.", dir=folder.parent))
    built = work / spec.name
    try:
        lines = work / "requirements.txt"
        write_atomic(lines, spec.requirements.encode())
        _run([str(interpreter), "-I", "-m", "venv", str(built)], spec, "venv", "install the module venv of that Python (Debian: python3-venv)")
        say(f"installing {sum('==' in line and not line.startswith('#') for line in spec.requirements.splitlines())} packages with pip")
        pip = [str(built / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "--quiet", "--progress-bar", "off"]
        _run(
            [*pip, "--require-hashes", "--no-deps", "--only-binary", ":all:", "-r", str(lines)],
            spec,
            "pip",
            "check the network and the package index, then run it again",
        )
        _relocate(built, folder)
        size = sum(item.stat().st_size for item in built.rglob("*") if item.is_file() and not item.is_symlink())
        version = _version(str(built / "bin" / "python"))
        stamp = EnvironmentStamp(
            name=spec.name,
            requirements=spec.digest,
            python=version[1] if version else "",
            size_bytes=size,
            seconds=round(time.monotonic() - begun, 1),
            created_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        stamp.save(built / STAMP)
        os.sync()
        if folder.exists():
            os.replace(folder, work / "old")
        os.replace(built, folder)
    except OSError as error:
        raise StorageError(
            f"{folder} could not be made", found=error.strerror or str(error), hint="free some space, or check its permissions", subject=folder
        ) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _run(words: list[str], spec: EnvironmentSpec, what: str, hint: str) -> None:
    """Run a command whose output nobody sees unless it fails; it is ended with its children when this process is interrupted."""
    variables = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON") and key not in _PIP_MEDDLING}
    with tempfile.TemporaryFile() as log:
        child = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=variables, start_new_session=True)
        try:
            code = child.wait(timeout=_TIMEOUT_S)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, 9)
            child.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                raise EnvironmentFailed(f"{what} did not finish", found=f"{_TIMEOUT_S:.0f} s", hint=hint, subject=spec.name) from error
            raise
        if code == 0:
            return
        log.seek(0)
        text = log.read().decode(errors="replace")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("WARNING: ")] or text.split("\n")
    mismatch = any("DO NOT MATCH THE HASHES" in line for line in lines)
    raise EnvironmentFailed(
        f"{what} failed while making the environment {spec.name!r}",
        found=" | ".join(lines[-6:])[-1500:] or f"status {code}",
        hint="a package is not the one that was tested: use the official index, and do not go on if it is that one" if mismatch else hint,
        subject=spec.name,
    )


def _relocate(built: Path, folder: Path) -> None:
    """Make the scripts of an environment name the place that it is going to, instead of the one where it was built."""
    before, after = str(built).encode(), str(folder).encode()
    for path in [*sorted((built / "bin").iterdir()), built / "pyvenv.cfg"]:
        if path.is_symlink() or not path.is_file():
            continue
        data = path.read_bytes()
        if before in data and b"\0" not in data[:4096]:
            path.write_bytes(data.replace(before, after))


@contextlib.contextmanager
def _locked(home: Path, name: str, say: Say) -> Iterator[None]:
    """Hold the lock of one environment; the kernel frees it when the process that holds it ends."""
    try:
        home.mkdir(parents=True, exist_ok=True)
        handle = os.open(home / f".{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise StorageError(f"{home} cannot be written", found=error.strerror, hint="check its permissions, or give another --path", subject=home) from error
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"another process is making or removing {name}; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)

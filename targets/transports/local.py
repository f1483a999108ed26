"""The way to the machine at hand, with the same promises as a way to a device far off: hashes, deadlines, detached jobs."""

from __future__ import annotations

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from edgekd.contracts import Completed, EndState, JobState
from edgekd.errors import DeviceError, DeviceTimeout, InputError, ProfileError
from edgekd.records import Profile
from edgekd.storage import copy_file, sha256_file, write_atomic

from .._owner import owner_state, owner_text, start_ticks

_START_S = 30.0
_KILL_S = 5.0
_SUPERVISOR = Path(__file__).resolve().parent / "_supervise.py"


class LocalTransport:
    """The `local` transport. `workdir` is the profile's `transport.workdir`, else `edgekd-<uid>` in the system's temporary folder.

    The work folder is private (mode 0700) and stays after `close`, so that a later process finds the jobs of a killed one.
    The files of a job lie below `jobs/<job>`; `remove("jobs/<job>")` forgets an ended job.
    """

    name = "local"

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self._root: Path | None = None
        self._read: dict[str, tuple[int, tuple[str, ...]]] = {}

    def open(self) -> None:
        """Make the work folder.

        Raises:
            ProfileError: the folder belongs to somebody else, or is a link.
        """
        asked = self.profile.transport.workdir
        root = Path(asked).expanduser().absolute() if asked else Path(tempfile.gettempdir()) / f"edgekd-{os.getuid()}"
        try:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
            found = root.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
                raise ProfileError("the work folder is not a folder of this user", found=str(root), hint="set transport.workdir to a folder of your own")
            root.chmod(0o700)
            (root / "jobs").mkdir(exist_ok=True)
        except OSError as error:
            raise ProfileError(
                "the work folder cannot be made", found=f"{root}: {error.strerror}", hint="set transport.workdir to a writable folder"
            ) from error
        self._root = root

    def close(self) -> None:
        """Forget the work folder; jobs go on."""
        self._root = None
        self._read.clear()

    @property
    def workdir(self) -> str:
        """The absolute path of the work folder.

        Raises:
            DeviceError: the transport is not open.
        """
        if self._root is None:
            raise DeviceError("the transport is not open", hint="use it between open() and close()", subject=self.name)
        return str(self._root)

    def _path(self, remote: str) -> Path:
        parts = Path(remote).parts
        if not parts or Path(remote).is_absolute() or ".." in parts:
            raise InputError("a path on the device must lie below its work folder", found=remote, allowed="a relative path without '..'", subject=remote)
        return Path(self.workdir).joinpath(*parts)

    # ------------------------------------------------------------------------------------------ commands and files

    def run(self, argv: Sequence[str], *, timeout_s: float, stdin: bytes = b"") -> Completed:
        """Run a command and wait for it; at the deadline, and when this call is interrupted, its process group is killed.

        A program that cannot be started is `exited` with 127.
        """
        words = _words(argv)
        try:
            process = subprocess.Popen(words, cwd=self.workdir, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)
        except OSError as error:
            return Completed(EndState.EXITED, 127, b"", f"{words[0]}: {error.strerror}".encode())
        with process:
            try:
                out, err = process.communicate(stdin, timeout=timeout_s)
            except subprocess.TimeoutExpired as expired:
                _kill_group(process.pid, signal.SIGKILL)
                try:
                    out, err = process.communicate(timeout=_KILL_S)
                except subprocess.TimeoutExpired:  # a process that left the group holds the pipes
                    out, err = expired.stdout or b"", expired.stderr or b""
                    for pipe in (process.stdout, process.stderr):
                        if pipe is not None:
                            pipe.close()
                return Completed(EndState.TIMEOUT, signal.SIGKILL, out, err)
            except BaseException:
                _kill_group(process.pid, signal.SIGKILL)
                raise
        if process.returncode < 0:
            return Completed(EndState.SIGNALLED, -process.returncode, out, err)
        return Completed(EndState.EXITED, process.returncode, out, err)

    def push(self, local: Path, remote: str) -> None:
        """Copy a file into the work folder, verified by hash, whole or not at all.

        Raises:
            InputError: `local` is no file, or `remote` leaves the work folder.
        """
        target = self._path(remote)
        if not local.is_file():
            raise InputError("the file to send does not exist", found=str(local), hint="check the path", subject=str(local))
        expected = sha256_file(local)
        if not (target.is_file() and sha256_file(target) == expected):
            self._copy(local, target, expected)

    def pull(self, remote: str, local: Path) -> None:
        """Copy a file out of the work folder, verified by hash.

        Raises:
            DeviceError: there is no such file on the device.
        """
        source = self._path(remote)
        if not source.is_file():
            raise DeviceError("the file does not exist on the device", found=remote, subject=remote)
        self._copy(source, local, sha256_file(source))

    def _copy(self, source: Path, target: Path, expected: str) -> None:
        part = target.with_name(f".{target.name}.{os.getpid()}.part")
        try:
            copy_file(source, part)
            if sha256_file(part) != expected:
                raise DeviceError("a file changed while it was copied", found=str(source), hint="try again", subject=str(source))
            os.replace(part, target)
        finally:
            part.unlink(missing_ok=True)

    def remove(self, remote: str) -> None:
        """Remove a file or folder of the work folder; it may be missing."""
        path = self._path(remote)
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)

    # ------------------------------------------------------------------------------------------ detached jobs

    def start(self, job: str, argv: Sequence[str]) -> None:
        """Start a job under a supervisor that outlives this process; returns when it runs.

        Raises:
            DeviceError: a job of this name exists, or the supervisor failed.
        """
        words = _words(argv)
        folder = self._folder(job)
        self._read.pop(job, None)
        try:
            folder.mkdir()
        except FileExistsError as error:
            raise DeviceError(f"a job called {job!r} exists already", hint="poll it, or remove it first", subject=job) from error
        write_atomic(folder / "owner.json", owner_text().encode())
        command = [sys.executable, "-I", "-S", str(_SUPERVISOR), str(folder), self.workdir, *words]
        try:
            begun = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, timeout=_START_S, start_new_session=True, check=False)
        except subprocess.TimeoutExpired as error:
            raise DeviceTimeout(f"the job {job!r} did not start", found=f"nothing within {_START_S:.0f} s", subject=job) from error
        if begun.returncode != 0:
            raise DeviceError(f"the supervisor of the job {job!r} failed", found=begun.stderr.decode(errors="replace")[-1000:], subject=job)

    def poll(self, job: str) -> JobState:
        """What became of a job. A supervisor that died without a word makes it `lost` (code -1).

        Raises:
            DeviceError: no job has this name.
        """
        folder = self._known(job)
        end = _json(folder / "end.json")
        if end is None and self._supervised(folder):
            return JobState(True, None, self._lines(job))
        end = end or _json(folder / "end.json") or {"state": "lost", "code": -1}
        out, err = ((folder / name).read_bytes() if (folder / name).exists() else b"" for name in ("stdout", "stderr"))
        return JobState(False, Completed(EndState(str(end["state"])), int(str(end["code"])), out, err), self._lines(job))

    def kill(self, job: str) -> None:
        """End a job and its children: a polite signal, and after five seconds one that cannot be refused.

        Raises:
            DeviceError: no job has this name.
        """
        folder = self._known(job)
        record = _json(folder / "pid.json")
        if record is None or not record["pgid"]:
            return
        pgid = int(str(record["pgid"]))
        started = start_ticks(pgid)
        if started is not None and started != record["start"]:
            return  # the number belongs to another process by now
        _kill_group(pgid, signal.SIGTERM)
        deadline = time.monotonic() + _KILL_S
        while _json(folder / "end.json") is None and self._supervised(folder) and time.monotonic() < deadline:
            time.sleep(0.01)
        _kill_group(pgid, signal.SIGKILL)
        while _json(folder / "end.json") is None and self._supervised(folder) and time.monotonic() < deadline + _KILL_S:
            time.sleep(0.01)

    def reap(self) -> tuple[str, ...]:
        """End and forget the jobs whose host process died on this machine; those of another container are left alone."""
        names = []
        for folder in sorted((Path(self.workdir) / "jobs").iterdir()):
            owner = folder / "owner.json"
            if owner.is_file() and owner_state(owner.read_text(encoding="utf-8")) == "dead":
                self.kill(folder.name)
                self.remove(f"jobs/{folder.name}")
                names.append(folder.name)
        return tuple(names)

    def _folder(self, job: str) -> Path:
        if not job or any(not (letter.isalnum() or letter in "-_.") for letter in job) or job.startswith("."):
            raise InputError("a job's name is made of letters, digits, '-', '_' and '.'", found=job, subject=job)
        return Path(self.workdir) / "jobs" / job

    def _known(self, job: str) -> Path:
        folder = self._folder(job)
        if not folder.is_dir():
            self._read.pop(job, None)
            raise DeviceError(f"there is no job called {job!r}", hint="it was removed, or never started", subject=job)
        return folder

    def _supervised(self, folder: Path) -> bool:
        record = _json(folder / "pid.json")
        if record is None:  # being started, by a host that still lives
            return owner_state((folder / "owner.json").read_text(encoding="utf-8")) in ("self", "alive") if (folder / "owner.json").is_file() else False
        return start_ticks(int(str(record["supervisor"]))) == record["supervisor_start"]

    def _lines(self, job: str) -> tuple[str, ...]:
        path = self._folder(job) / "stdout"
        offset, lines = self._read.get(job, (0, ()))
        if not path.exists() or path.stat().st_size < offset:
            offset, lines = 0, ()
        if path.exists():
            with path.open("rb") as stream:
                stream.seek(offset)
                whole = stream.read().rpartition(b"\n")[0]
            if whole:
                offset, lines = offset + len(whole) + 1, lines + tuple(whole.decode(errors="replace").split("\n"))
        self._read[job] = (offset, lines)
        return lines


def _words(argv: Sequence[str]) -> list[str]:
    if isinstance(argv, str) or not argv or any("\0" in word for word in argv):
        raise InputError("a command is a list of words, the program first", found=argv, hint='for example ["uname", "-m"]')
    return list(argv)


def _kill_group(group: int, number: signal.Signals) -> None:
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return


def _json(path: Path) -> dict[str, object] | None:
    try:
        value: dict[str, object] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return value

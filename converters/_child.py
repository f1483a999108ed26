"""Runs a converter's worker in another Python as a process of its own, and turns every way it can fail into one clear error."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edgekd.conversion.environments import cache_folder
from edgekd.errors import ConfigError, StorageError, WorkerFailed
from edgekd.storage import write_atomic

WORKERS = Path(__file__).with_name("workers")
"""The folder of the worker programs."""

RESULT_TYPE = "edgekd.worker_result/1"
_COLOUR = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_POLL_S = 0.1
_GRACE_S = 2.0
_LOG_LIMIT = 256 << 20
_RESULT_LIMIT = 64 << 20
_KEPT_LOGS = 20
_TAIL_LINES = 40
_TAIL_SHOWN = 5


@dataclass(frozen=True)
class Limits:
    """What a worker may take: wall time in seconds, resident memory of all its processes together in MB (10^6 bytes)."""

    timeout_s: float = 1800.0
    memory_mb: float = 8000.0


def limits_of(options: Mapping[str, str | int | float | bool]) -> Limits:
    """The limits in a request's options `timeout_s` and `memory_mb`.

    Raises:
        ConfigError: one is no positive number.
    """
    found = {}
    for name, default in (("timeout_s", Limits.timeout_s), ("memory_mb", Limits.memory_mb)):
        value = options.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
            raise ConfigError(f"the option {name} is no positive number", found=value, allowed="for example 600", subject=name)
        found[name] = float(value)
    return Limits(**found)


def run_worker(
    script: Path,
    request: Mapping[str, Any],
    *,
    python: Path,
    work: Path,
    converter: str,
    limits: Limits | None = None,
    logs: Path | None = None,
    blame: re.Pattern[str] | None = None,
) -> dict[str, Any]:
    """What the worker `script` answers to `request`, both JSON objects. Models and arrays cross as files in `work`, its current folder.

    The worker is a session of its own with few environment variables, no terminal and proxies that lead nowhere, so that a library
    that looks for the network fails at once. Whatever it prints goes to a log below `logs` (default: `logs` in edgekd's cache folder),
    which is kept only when it failed. When the deadline passes, memory runs out or this process is interrupted, all processes of
    its session are ended by their numbers; the kernel ends the worker if this process dies. Linux only. `blame` finds the name of
    the operator in the log of a worker that refuses a model; it becomes the error's subject.

    Raises:
        WorkerFailed: the worker stopped with an error, died, hung, took too much memory, or left no readable result.
        StorageError: the work folder or the log cannot be written.
    """
    limit = limits or Limits()
    asked, answer = work / "request.json", work / "result.json"
    write_atomic(asked, json.dumps(dict(request), sort_keys=True).encode())
    answer.unlink(missing_ok=True)
    with _new_log(converter, logs or cache_folder() / "logs") as log:
        with log.open("wb") as sink:
            words = [str(python), "-s", "-u", "-B", str(WORKERS / "start.py"), str(script), str(asked), str(answer), str(os.getpid())]
            begun = time.monotonic()
            try:
                child = subprocess.Popen(
                    words, cwd=work, env=_variables(python, work), stdin=subprocess.DEVNULL, stdout=sink, stderr=subprocess.STDOUT, start_new_session=True
                )
            except OSError as error:
                raise _failed(converter, log, "crash", "could not be started", f"{python}: {error.strerror}", hint="make its environment anew") from error
        ended = _watch(child, limit, log)
        seconds = time.monotonic() - begun
        if ended == "timeout":
            raise _failed(
                converter,
                log,
                ended,
                f"did not finish within {limit.timeout_s:g} s and was ended",
                hint="give it longer with the option timeout_s, or a smaller model",
            )
        if ended == "memory":
            raise _failed(
                converter,
                log,
                ended,
                f"took more than {limit.memory_mb:g} MB of memory and was ended",
                hint="allow more with the option memory_mb, or convert a smaller model",
            )
        if ended == "noise":
            raise _failed(converter, log, ended, f"printed more than {_LOG_LIMIT >> 20} MiB and was ended", hint="read what it repeats")
        return _result(converter, child.returncode, answer, log, seconds, blame)


def _result(converter: str, code: int, answer: Path, log: Path, seconds: float, blame: re.Pattern[str] | None) -> dict[str, Any]:
    """The worker's result, once it has ended by itself."""
    if code < 0:
        name = signal.Signals(-code).name if -code in set(signal.Signals) else str(-code)
        hint = (
            "SIGKILL without a limit passed means that the system ran out of memory"
            if name == "SIGKILL"
            else "the library crashed on this model: take another road"
        )
        raise _failed(converter, log, "crash", f"died by signal {name} after {seconds:.1f} s", hint=hint)
    if not answer.is_file():
        raise _failed(
            converter,
            log,
            "rubbish" if code == 0 else "error",
            f"ended with status {code} and left no result",
            hint="make its environment anew, and read the log",
        )
    if answer.stat().st_size > _RESULT_LIMIT:
        raise _failed(
            converter, log, "rubbish", "left no readable result", f"{answer.stat().st_size} bytes", hint="make its environment anew, and read the log"
        )
    try:
        told = json.loads(answer.read_bytes())
    except ValueError as error:
        raise _failed(converter, log, "rubbish", "left no readable result", f"no JSON: {error}", hint="make its environment anew, and read the log") from error
    if not isinstance(told, dict) or told.get("type") != RESULT_TYPE:
        raise _failed(converter, log, "rubbish", "left no readable result", f"{str(told)[:200]}", hint="make its environment anew, and read the log")
    error_told, result = told.get("error"), told.get("result")
    if isinstance(error_told, dict) and isinstance(error_told.get("message"), str):
        blamed = blame.findall("\n".join(log_tail(log))) if blame else []
        operator = str(error_told.get("subject") or (blamed[-1] if blamed else ""))
        failure = _failed(
            converter,
            log,
            "error",
            "refused the model" + (f", at {operator}" if operator else "") + f": {error_told['message']}",
            hint=str(error_told.get("hint") or "replace the operator, or take another road"),
            subject=operator,
        )
        with log.open("a", encoding="utf-8") as stream:
            stream.write("\n" + str(error_told.get("traceback", "")))
        raise failure
    if not isinstance(result, dict):
        raise _failed(converter, log, "rubbish", "left no readable result", f"{str(told)[:200]}", hint="make its environment anew, and read the log")
    return result


def _failed(converter: str, log: Path, reason: str, what: str, found: str | None = None, *, hint: str, subject: str = "") -> WorkerFailed:
    lines = log_tail(log)
    shown = " | ".join(lines[-_TAIL_SHOWN:])[-800:]
    told = "; ".join(part for part in (found, f"its last words: {shown}" if shown else "it printed nothing") if part)
    return WorkerFailed(
        f"the process of {converter} {what}", reason=reason, log=log, tail="\n".join(lines), found=told, hint=hint, subject=subject or converter
    )


def log_tail(log: Path) -> list[str]:
    """The last 40 lines of a log that hold something, without control characters."""
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - 65536))
        text = stream.read().decode("utf-8", errors="replace")
    text = _COLOUR.sub("", text)
    clean = ("".join(sign for sign in line if sign.isprintable()).strip()[:400] for line in text.replace("\r", "\n").split("\n"))
    return [line for line in clean if line][-_TAIL_LINES:]


@contextlib.contextmanager
def _new_log(converter: str, folder: Path) -> Iterator[Path]:
    """A new file for what the worker prints: removed when the block ends well, kept otherwise; only the newest 20 stay."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f"{time.strftime('%Y%m%dT%H%M%S')}-{converter}-", suffix=".log", dir=folder)
    except OSError as error:
        raise StorageError(
            f"no log can be written in {folder}", found=error.strerror, hint="free some space, or check its permissions", subject=folder
        ) from error
    os.close(handle)
    log = Path(name)
    for old in sorted(folder.glob("*.log"))[:-_KEPT_LOGS]:
        old.unlink(missing_ok=True)
    yield log
    log.unlink(missing_ok=True)


def _variables(python: Path, work: Path) -> dict[str, str]:
    """The environment of a worker: its own programs first on the path, nothing of the user's settings, no way to the network."""
    scratch = work / "tmp"
    scratch.mkdir(exist_ok=True)
    nowhere = "http://127.0.0.1:9"
    variables = {
        "PATH": f"{python.parent}:/usr/local/bin:/usr/bin:/bin",
        "HOME": str(work),
        "TMPDIR": str(scratch),
        "LANG": "C.UTF-8",
        "PYTHONHASHSEED": "0",
        "PYTHONNOUSERSITE": "1",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "CUDA_VISIBLE_DEVICES": "-1",
        "NO_COLOR": "1",
        **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"), nowhere),
    }
    if "LD_LIBRARY_PATH" in os.environ:
        variables["LD_LIBRARY_PATH"] = os.environ["LD_LIBRARY_PATH"]
    return variables


def _watch(child: subprocess.Popen[bytes], limit: Limits, log: Path) -> str:
    """Wait for the worker; empty if it ended by itself, else why it was ended: `timeout`, `memory` or `noise`. No process stays."""
    with contextlib.suppress(OSError):
        Path(f"/proc/{child.pid}/oom_score_adj").write_text("1000", encoding="ascii")
    deadline = time.monotonic() + limit.timeout_s
    try:
        while not _has_ended(child.pid):
            if time.monotonic() > deadline:
                return "timeout"
            if session_memory(child.pid) > limit.memory_mb * 1e6:
                return "memory"
            if log.stat().st_size > _LOG_LIMIT:
                return "noise"
            time.sleep(_POLL_S)
        return ""
    finally:
        _end_session(child.pid)
        child.wait()


def _has_ended(pid: int) -> bool:
    """Whether our child ended; it stays a zombie, so that its number belongs to nobody else while its session is ended."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _processes(session: int) -> dict[int, int]:
    """The living processes of a session with the bytes each holds in memory."""
    page = os.sysconf("SC_PAGE_SIZE")
    found = {}
    for name in os.listdir("/proc"):
        if not name.isdigit():
            continue
        try:
            with open(f"/proc/{name}/stat", "rb") as stream:
                fields = stream.read().rpartition(b")")[2].split()
        except OSError:
            continue
        # proc(5), counted from the state (field 3): session is field 6, rss field 24
        if len(fields) > 21 and int(fields[3]) == session and fields[0] not in (b"Z", b"X"):
            found[int(name)] = int(fields[21]) * page
    return found


def session_memory(session: int) -> int:
    """Bytes that all processes of a session hold in memory together; pages that two share count twice."""
    return sum(_processes(session).values())


def _end_session(session: int) -> None:
    """End every process of the session: asked first, then made to."""
    asked = time.monotonic()
    for number in (signal.SIGTERM, signal.SIGKILL):
        for pid in _processes(session):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        while _processes(session):
            if number is signal.SIGTERM and time.monotonic() - asked > _GRACE_S:
                break
            if number is signal.SIGKILL:
                for pid in _processes(session):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, number)
            time.sleep(_POLL_S / 2)


@contextlib.contextmanager
def work_folder(converter: str) -> Iterator[Path]:
    """A private folder for one conversion, gone afterwards.

    Raises:
        StorageError: it cannot be made.
    """
    try:
        made = tempfile.mkdtemp(prefix=f"edgekd.{converter}.")
    except OSError as error:
        raise StorageError("no folder for temporary files can be made", found=error.strerror, hint="free some space", subject=tempfile.gettempdir()) from error
    with contextlib.ExitStack() as stack:
        stack.callback(_remove, made)
        yield Path(made)


def _remove(folder: str) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def own_python() -> Path:
    """The interpreter that runs this process."""
    return Path(sys.executable)

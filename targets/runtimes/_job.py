"""The host's side of the on-device runner, shared by every runtime that measures with it: files over, jobs started, lines read back."""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from edgekd.artifact import StoredArtifact
from edgekd.contracts import Array, BenchmarkRequest, EndState, Tensors, Transport
from edgekd.errors import DeviceBusy, DeviceError, DeviceTimeout, LinkLost, ModelError, RunnerFailed, UnsupportedModel
from edgekd.records import Launch, LaunchProtocol, Profile
from edgekd.storage import sha256_bytes, sha256_file, write_atomic

from .._owner import owner_state, owner_text

_PROGRAMS = Path(__file__).resolve().parent.parent
_MODELS_CAP_MB = 2048.0
_STALE = timedelta(hours=24)
_START_S = 60.0
"""What a process may take to start, load a model and run it once, beyond what the protocol says, in seconds."""

Line = dict[str, Any]


def device_python(profile: Profile) -> str:
    """The interpreter that runs the runner: the profile's, else this one on the local machine and `python3` elsewhere."""
    return profile.transport.python or (sys.executable if profile.transport.kind == "local" else "python3")


def launch_limit_s(protocol: LaunchProtocol) -> float:
    """How long one launch may take before it counts as hung, in seconds."""
    return max(protocol.warmup_max_s, protocol.warmup_min_s) + protocol.max_time_s + _START_S


def job_deadline_s(protocol: LaunchProtocol, launches: int, lock_wait_s: float) -> float:
    """How long a benchmark job may take before the host gives it up, in seconds."""
    return lock_wait_s + launches * (launch_limit_s(protocol) + protocol.gap_s) + _START_S


class RunnerJobs:
    """Runs jobs of `targets/runner.py` on the device of `transport` with the backend in `targets/runner_<backend>.py`.

    Models lie in `models/<hash>` and are sent once; the files of a job lie in `work/<job>` and are removed with it.
    """

    def __init__(self, profile: Profile, transport: Transport, backend: str, package: str) -> None:
        self.profile = profile
        self.transport = transport
        self.backend = backend
        self.package = package
        self._runner = ""
        self._sent: set[str] = set()

    def install(self) -> None:
        """Send the runner and its parts, the backend's among them, into a folder named by their hashes."""
        files = tuple(_PROGRAMS / name for name in ("runner.py", "runner_device.py", f"runner_{self.backend}.py"))
        folder = f"runner-{sha256_bytes(''.join(map(sha256_file, files)).encode())[:16]}"
        for path in files:
            self.transport.push(path, f"{folder}/{path.name}")
        self._runner = f"{folder}/runner.py"

    # ------------------------------------------------------------------------------------------ files

    def send_model(self, model: StoredArtifact) -> str:
        """The model's entry on the device, after checking its files against their hashes and sending what is missing there.

        Raises:
            BundleError: a file is missing or was changed.
        """
        model.verify()
        folder = f"models/{model.record.content_hash()[:32]}"
        if folder not in self._sent:
            for name in model.record.files:
                self.transport.push(model.folder / name, f"{folder}/{name}")
            self._sent.add(folder)
        return f"{folder}/{model.record.entry}"

    def send_tensors(self, work: str, tensors: Tensors) -> dict[str, str]:
        """Each tensor's `.npy` in the job's folder, named by hash."""
        paths = {}
        for name, value in tensors.items():
            buffer = io.BytesIO()
            np.save(buffer, np.ascontiguousarray(value), allow_pickle=False)
            paths[name] = f"{work}/{sha256_bytes(buffer.getvalue())[:32]}.npy"
            self._send(buffer.getvalue(), paths[name])
        return paths

    def _send(self, data: bytes, remote: str) -> None:
        with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
            path = Path(folder) / "file"
            write_atomic(path, data)
            self.transport.push(path, remote)

    def fetch(self, remote: str) -> Array:
        """The array in a `.npy` of the device.

        Raises:
            RunnerFailed: the file is no array of numbers.
        """
        with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
            path = Path(folder) / "array.npy"
            self.transport.pull(remote, path)
            try:
                return np.asarray(np.load(path, allow_pickle=False))
            except ValueError as error:
                raise RunnerFailed("an output of the runner cannot be read", found=str(error), subject=remote) from error

    # ------------------------------------------------------------------------------------------ short jobs

    def _base(self, kind: str) -> Line:
        return {"kind": kind, "backend": self.backend, "threads": self.profile.runtime.threads, "options": dict(self.profile.runtime.options)}

    @contextmanager
    def folder(self, kind: str) -> Iterator[str]:
        """A fresh folder on the device for the files of one job, removed afterwards."""
        work = f"work/{kind}-{os.getpid()}-{uuid.uuid4().hex[:12]}"
        try:
            yield work
        finally:
            self.transport.remove(work)

    def call(self, kind: str, work: str, timeout_s: float, **fields: object) -> list[Line]:
        """The lines of a job that is waited for; `work` is its folder.

        Raises:
            DeviceTimeout, LinkLost, RunnerFailed: the device or the way to it failed.
            UnsupportedModel: the runtime refused the model; ModelError: it did not run.
            DeviceError: the device lacks the runtime.
        """
        self._send(json.dumps({**self._base(kind), **fields}, sort_keys=True).encode(), f"{work}/job.json")
        done = self.transport.run([device_python(self.profile), self._runner, f"{work}/job.json"], timeout_s=timeout_s)
        if done.state is EndState.TIMEOUT:
            raise DeviceTimeout(f"the runner's {kind} job took too long", found=f"no answer within {timeout_s:.0f} s", subject=kind)
        if done.state is EndState.LOST:
            raise LinkLost(f"the link broke during the runner's {kind} job", hint="try again", subject=kind)
        if done.state is EndState.SIGNALLED or done.code != 0:
            raise _died(kind, done.state, done.code, done.stderr)
        return self._answer(kind, done.stdout.decode(errors="replace").splitlines(), done.stderr)

    def _answer(self, kind: str, texts: Sequence[str], stderr: bytes) -> list[Line]:
        try:
            lines = [json.loads(text) for text in texts]
        except json.JSONDecodeError as error:
            raise RunnerFailed(f"the runner's {kind} job wrote what is no JSON", found=error.doc[:200], subject=kind) from error
        for line in lines:
            if line["kind"] == "busy":
                raise DeviceBusy(
                    "another benchmark holds the device", found=f"process {line['holder']} on the device", hint="wait for it, or raise measure.lock_wait_s"
                )
            if line["kind"] == "error":
                raise self._refused(kind, line)
        if not lines or lines[-1]["kind"] != "done":
            raise RunnerFailed(f"the runner's {kind} job stopped before its end", found=_tail(stderr), subject=kind)
        return lines[:-1]

    def _refused(self, kind: str, line: Line) -> Exception:
        subject = line.get("operator") or line.get("label") or self.backend
        if line["phase"] == "missing":
            return DeviceError(
                f"the device lacks what the runtime {self.backend} needs",
                found=line["message"],
                hint=f"on the device: {line['python']} -m pip install {self.package} numpy",
                subject=self.backend,
            )
        where = f" in launch {line['index']} of {line['label']!r}" if "index" in line else ""
        if line["phase"] == "load":
            return UnsupportedModel(f"{self.backend} refuses the model{where}", found=line["message"], subject=subject)
        if line["phase"] == "run":
            return ModelError(f"the model did not run{where}", found=line["message"], hint="compare its inputs with the artifact's IOSpec", subject=subject)
        return RunnerFailed(f"the runner's {kind} job failed{where}: {line['message']}", found=_tail(line.get("stderr", "").encode()), subject=subject)

    # ------------------------------------------------------------------------------------------ benchmarks

    def benchmark(self, request: BenchmarkRequest) -> tuple[Launch, ...]:
        """The launches of the schedule, run as one detached job.

        The job's name comes from the request, so that a host which was killed, or lost the link, finds its job again when it asks
        the same a second time; results older than a day are taken anew. An interrupt (Ctrl-C) ends the job.

        Raises:
            DeviceBusy, DeviceTimeout, LinkLost, RunnerFailed, UnsupportedModel, ModelError: see `call`.
        """
        try:
            return self._benchmark(request)
        except DeviceBusy:
            reaped = self.transport.reap()
            if not reaped:
                raise
            for job in reaped:
                self.transport.remove(f"work/{job}")
            return self._benchmark(request)  # the holder was a job of a dead host

    def _benchmark(self, request: BenchmarkRequest) -> tuple[Launch, ...]:
        labels = sorted(set(request.schedule))
        rotated = {label: {name: value[: request.protocol.rotation] for name, value in request.inputs[label].items()} for label in labels}
        lock_wait_s = self.profile.measure.lock_wait_s
        fields: Line = {
            **self._base("benchmark"),
            "runner": self._runner,
            "protocol": msgspec.to_builtins(request.protocol),
            "lock": str(self.profile.runtime.options.get("lock", "")),
            "lock_wait_s": lock_wait_s,
            "launch_limit_s": launch_limit_s(request.protocol),
            "first_index": request.first_index,
            "schedule": list(request.schedule),
            "sentinel_max_ns": request.sentinel_max_ns,
        }
        job = f"bench-{_request_hash(fields, request, rotated, labels)[:24]}"
        deadline = time.monotonic() + job_deadline_s(request.protocol, len(request.schedule), lock_wait_s)

        def start(name: str) -> None:
            models = {
                label: {
                    "model": self.send_model(request.models[label]),
                    "inputs": self.send_tensors(f"work/{name}", rotated[label]),
                    "state": fed_back(request.models[label]),
                }
                for label in labels
            }
            self._send(json.dumps({**fields, "models": models}, sort_keys=True).encode(), f"work/{name}/job.json")
            self.transport.start(name, [device_python(self.profile), self._runner, f"work/{name}/job.json"])

        state = self._owner_of(job)
        attached = state in ("self", "dead")
        if attached:
            self._send(owner_text().encode(), f"jobs/{job}/owner.json")
        elif state:
            job = f"{job}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        lines = self._wait(job, deadline) if attached else self._run(job, start, deadline)
        launches = _launches(lines, request)
        if attached and datetime.now(UTC) - datetime.fromisoformat(launches[0].started_at) > _STALE:
            launches = _launches(self._run(job, start, deadline), request)
        return launches

    def _run(self, job: str, start: Callable[[str], None], deadline: float) -> list[Line]:
        try:
            start(job)
        except KeyboardInterrupt:
            self._abandon(job)
            raise
        return self._wait(job, deadline)

    def _owner_of(self, job: str) -> str:
        """Who started a job of this name (see `owner_state`), or an empty text if there is none."""
        try:
            self.transport.poll(job)
        except (LinkLost, DeviceTimeout):
            raise
        except DeviceError:
            return ""
        with tempfile.TemporaryDirectory(prefix="edgekd-") as folder:
            path = Path(folder) / "owner.json"
            self.transport.pull(f"jobs/{job}/owner.json", path)
            return owner_state(path.read_text(encoding="utf-8"))

    def _wait(self, job: str, deadline: float) -> list[Line]:
        """The job's lines after its end; its files are removed then, and left where a later call can find them when the way fails."""
        pause = 0.02
        try:
            state = self.transport.poll(job)
            while state.running and time.monotonic() < deadline:
                time.sleep(pause)
                pause = min(0.5, pause * 1.3)
                state = self.transport.poll(job)
        except (LinkLost, DeviceTimeout):
            raise
        except BaseException:
            self._abandon(job)
            raise
        self._abandon(job)
        if state.running:
            raise DeviceTimeout("the benchmark on the device took longer than its protocol allows", found=f"{len(state.lines)} lines so far", subject=job)
        end = state.end
        if end is None or end.state is EndState.LOST:
            raise RunnerFailed("the runner vanished from the device", found=_tail(end.stderr if end else b""), hint="was it out of memory?", subject=job)
        if end.state is not EndState.EXITED or end.code != 0:
            raise _died("benchmark", end.state, end.code, end.stderr)
        return self._answer("benchmark", state.lines, end.stderr)

    def _abandon(self, job: str) -> None:
        with suppress(DeviceError):  # it may not have begun, or somebody may have removed it
            self.transport.kill(job)
        self.transport.remove(f"jobs/{job}")
        self.transport.remove(f"work/{job}")

    def probe(self) -> tuple[dict[str, str], Line]:
        """The fingerprint's fields and the state of the device; old models are cleared away there."""
        with self.folder("probe") as work:
            lines = self.call("probe", work, _START_S, tidy={"models": _MODELS_CAP_MB, "work": 0.0})
        found = {line["kind"]: line for line in lines}
        return found["fingerprint"]["fields"], found["snapshot"]["snapshot"]


def fed_back(model: StoredArtifact) -> dict[str, str]:
    """The inputs that hold state, each with the output that it is at the next step."""
    return {pair.input: pair.output for pair in model.record.iospec.state}


def _request_hash(fields: Mapping[str, object], request: BenchmarkRequest, rotated: Mapping[str, Tensors], labels: Sequence[str]) -> str:
    digest = hashlib.sha256(json.dumps({**fields, "seed": request.seed, "nonce": request.nonce}, sort_keys=True).encode())
    for label in labels:
        digest.update(f"{label} {request.models[label].record.content_hash()}".encode())
        for name, value in rotated[label].items():
            digest.update(f"{name} {value.dtype.str} {value.shape}".encode() + np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()


def _launches(lines: Sequence[Line], request: BenchmarkRequest) -> tuple[Launch, ...]:
    try:
        launches = tuple(msgspec.convert(line["launch"], Launch) for line in lines if line["kind"] == "launch")
    except msgspec.ValidationError as error:
        raise RunnerFailed("the runner's launch cannot be read", found=str(error)) from error
    if tuple(launch.label for launch in launches) != request.schedule:
        raise RunnerFailed("the runner's launches are not those of the schedule", found=[launch.label for launch in launches], allowed=request.schedule)
    return launches


def _tail(stderr: bytes) -> str:
    return stderr.decode(errors="replace").strip()[-2000:] or "no message"


def _died(kind: str, state: EndState, code: int, stderr: bytes) -> RunnerFailed:
    how = f"was ended by signal {code}" if state is EndState.SIGNALLED else f"exited with {code}"
    hint = "signal 9 often means that the device ran out of memory" if state is EndState.SIGNALLED and code == 9 else None
    return RunnerFailed(f"the runner's {kind} job {how}", found=_tail(stderr), hint=hint, subject=kind)

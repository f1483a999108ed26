"""The program that measures on the device; it is pushed there as data and run as `python runner.py JOB.json`.

Python 3.8, standard library only at import; nothing imports it and it imports nothing of edgekd. What one runtime alone needs stands
in `runner_<runtime>.py` beside it, under the same rules. It writes one JSON object per line, flushed and synced, each with a `kind`;
tensors are `.npy` files. Paths in a job are relative to the working folder.

Jobs (`kind`): `benchmark` starts one fresh process per launch (itself with `--launch SPEC.json`) in the order of `schedule` and
writes a `launch` line for each; `infer` writes an `outputs` line; `op_times` writes an `op_times` line; `check` creates a session
and writes a `check` line; `probe` writes `fingerprint` and `snapshot`; `snapshot` writes the latter alone. Instead of an answer
there may be a `busy` line (another benchmark holds the device) or an `error` line, whose `phase` is `missing` (a package), `load`,
`run` or `launch` (a launch's process died). The last line is `done` after a whole answer only.

Clocks, all `time.perf_counter_ns`: `init_ns` runs from the start of session creation to a ready session (the import of the runtime
is not in it), `first_ns` is the first inference, `samples_ns` are whole inferences with host buffers in and out, state among them. The garbage
collector is off while they are taken. `cpu_share` is the process's CPU time over wall time of the timed loop and over the number of
threads; with several threads the serial parts of a graph would lower it on an idle machine too, so that the share of the calling
thread, which works in every part, counts if it is larger. `steal_share` of the state after a launch covers the launch.
"""

# ruff: noqa: B905 (zip has no `strict` before Python 3.10)
from __future__ import annotations

import errno
import fcntl
import gc
import glob
import json
import os
import platform
import re
import resource
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

LOCK_NAME = "edgekd-device.lock"
_PRIME = (1 << 521) - 1
ISA = {name: name for name in ["avx", "avx2", "fma", "f16c", "avx_vnni", "avx512_bf16", "amx_int8", "amx_bf16", "neon", "i8mm", "bf16", "sve", "sve2"]}
ISA.update(avx512f="avx512", avx512_vnni="vnni", asimd="neon", asimddp="dotprod", asimdhp="fp16")
RUNTIME_ERRORS: list[type[Exception]] = [RuntimeError]
ARM_PARTS = {
    (0x41, 0xD03): "Cortex-A53", (0x41, 0xD04): "Cortex-A35", (0x41, 0xD05): "Cortex-A55", (0x41, 0xD07): "Cortex-A57", (0x41, 0xD08): "Cortex-A72",
    (0x41, 0xD09): "Cortex-A73", (0x41, 0xD0A): "Cortex-A75", (0x41, 0xD0B): "Cortex-A76", (0x41, 0xD0C): "Neoverse-N1", (0x41, 0xD0D): "Cortex-A77",
    (0x41, 0xD40): "Neoverse-V1", (0x41, 0xD41): "Cortex-A78", (0x41, 0xD42): "Cortex-A78AE", (0x41, 0xD44): "Cortex-X1", (0x41, 0xD46): "Cortex-A510",
    (0x41, 0xD47): "Cortex-A710", (0x41, 0xD48): "Cortex-X2", (0x41, 0xD49): "Neoverse-N2", (0x41, 0xD4F): "Neoverse-V2", (0x4E, 0x004): "Carmel",
}  # fmt: skip


class JobError(Exception):
    """What makes an `error` line: the phase and what the runtime said."""

    def __init__(self, phase: str, message: str, **fields: Any) -> None:
        super().__init__(message)
        self.fields = dict(fields, phase=phase, message=message)


def emit(kind: str, **fields: Any) -> None:
    """Write one line and make it durable where the output is a file."""
    sys.stdout.write(json.dumps(dict(fields, kind=kind), sort_keys=True) + "\n")
    sys.stdout.flush()
    try:
        os.fsync(sys.stdout.fileno())
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EROFS):  # pipes and terminals cannot be synced
            raise


def read_text(path: str) -> str:
    """The text of a file of the system, or an empty text where the device has none or hides it."""
    try:
        with open(path, encoding="utf-8", errors="replace") as stream:
            return stream.read()
    except OSError:
        return ""


def cpuinfo_values(text: str, key: str) -> list[str]:
    """Every value of a key in the text of `/proc/cpuinfo`, in order; keys are compared without case."""
    return [value.strip() for value in re.findall(rf"(?im)^{re.escape(key)}[ \t]*:(.*)$", text)]


def cpu_model(text: str) -> str:
    """The processor's name in the text of `/proc/cpuinfo`: the model name, or Arm's implementer and part for each kind of core."""
    names = set()
    for implementer, part in zip(cpuinfo_values(text, "CPU implementer"), cpuinfo_values(text, "CPU part")):
        numbers = [int(word, 16) if re.match(r"^0x[0-9a-fA-F]+$", word) else -1 for word in (implementer, part)]
        names.add(ARM_PARTS.get((numbers[0], numbers[1]), f"Arm implementer {implementer} part {part}"))
    if names:
        return " + ".join(sorted(names))
    for key in ("model name", "Hardware", "Processor", "cpu model"):
        values = cpuinfo_values(text, key)
        if values:
            return values[0]
    return "unknown"


def isa_text(text: str) -> str:
    """The instruction sets that all cores have, sorted, separated by spaces, from the text of `/proc/cpuinfo`; only those that `ISA` names."""
    cores = [set(value.split()) for value in cpuinfo_values(text, "flags") or cpuinfo_values(text, "Features")]
    common = set.intersection(*cores) if cores else set()
    return " ".join(sorted({ISA[flag] for flag in common if flag in ISA}))


def cpuinfo_mhz(text: str) -> float | None:
    """The largest clock in the text of `/proc/cpuinfo` in MHz, or `None`; idle cores clock down, so that the largest is the one at work."""
    values = [float(value) for value in cpuinfo_values(text, "cpu MHz") if re.match(r"^[0-9.]+$", value)]
    return max(values) if values else None


def stat_ticks(text: str) -> tuple[int, int] | None:
    """Stolen and total ticks of all processors in the text of `/proc/stat`, or `None`. Guest time is part of user time (man 5 proc)."""
    match = re.search(r"(?m)^cpu +([0-9 ]+)$", text)
    ticks = [int(word) for word in match.group(1).split()] if match else []
    return (ticks[7], sum(ticks[:8])) if len(ticks) >= 8 else None


def steal_share(before: tuple[int, int] | None, after: tuple[int, int] | None) -> float | None:
    """The share of processor time that the hypervisor took between two `stat_ticks`, in [0, 1], or `None`."""
    if before is None or after is None or after[1] <= before[1]:
        return None
    return min(1.0, max(0.0, (after[0] - before[0]) / float(after[1] - before[1])))


def memory_bytes(text: str, key: str) -> int | None:
    """A size in the text of `/proc/meminfo` or `/proc/self/status` in bytes, or `None`."""
    match = re.search(rf"(?m)^{re.escape(key)}:\s+([0-9]+) kB", text)
    return int(match.group(1)) * 1024 if match else None


def zone_celsius(text: str) -> float | None:
    """A thermal zone's temperature in degrees Celsius; `None` for a text that is no temperature of a working sensor (0 to 130)."""
    try:
        value = float(text)
    except ValueError:
        return None
    return next((celsius for celsius in (value, value / 1000.0) if 0.0 < celsius < 130.0), None)


def os_name(text: str) -> str:
    """The system's name in the text of `/etc/os-release`."""
    match = re.search(r'(?m)^PRETTY_NAME="?([^"\n]*)"?', text)
    return match.group(1) if match else platform.system()


def sentinel_ns(window_s: float = 0.15) -> int:
    """The shortest run of a fixed kernel within 150 ms, in nanoseconds: longer than a neighbour's burst, so slower means a slower machine.

    The kernel is a power modulo a prime: one loop of C over 70 bytes. Python's own loops differ by a tenth from process to process, with their addresses.
    """
    times: list[int] = []
    end = time.perf_counter_ns() + int(window_s * 1e9)
    while not times or time.perf_counter_ns() < end:
        start = time.perf_counter_ns()
        pow(3, _PRIME - 2, _PRIME)
        times.append(time.perf_counter_ns() - start)
    return min(times)


def snapshot(since: tuple[int, int] | None = None) -> dict[str, Any]:
    """The device's state now; `since` is an earlier `stat_ticks` from which the share of stolen time counts."""
    cpu = "/sys/devices/system/cpu/cpu[0-9]*/cpufreq/"
    clocks = [float(text) / 1000.0 for text in map(read_text, glob.glob(cpu + "scaling_cur_freq")) if text.strip().isdigit()]
    governors = sorted({text.strip() for text in map(read_text, glob.glob(cpu + "scaling_governor")) if text.strip()})
    zones = [zone_celsius(read_text(path)) for path in glob.glob("/sys/class/thermal/thermal_zone*/temp")]
    available = memory_bytes(read_text("/proc/meminfo"), "MemAvailable")
    return {
        "load_1m": os.getloadavg()[0],
        "frequency_mhz": max(clocks) if clocks else cpuinfo_mhz(read_text("/proc/cpuinfo")),
        "governor": " ".join(governors) or None,
        "temperature_c": max((zone for zone in zones if zone is not None), default=None),
        "steal_share": steal_share(since, stat_ticks(read_text("/proc/stat"))),
        "sentinel_ns": sentinel_ns(),
        "available_mb": None if available is None else available / 1e6,
    }


def fingerprint(job: dict[str, Any]) -> dict[str, str]:
    """What the device is, as texts."""
    cpuinfo, memory, backend = read_text("/proc/cpuinfo"), memory_bytes(read_text("/proc/meminfo"), "MemTotal"), open_backend(job)
    return {
        "cpu_model": cpu_model(cpuinfo), "isa": isa_text(cpuinfo), "cores": str(os.cpu_count() or 0), "machine": platform.machine(),
        "ram_mb": "unknown" if memory is None else f"{memory / 1e6:.0f}", "os": os_name(read_text("/etc/os-release")), "kernel": platform.release(),
        "python": platform.python_version(), "runtime": job["backend"], "runtime_version": backend.version,
        "threads": str(job["threads"]), **getattr(backend, "about", {}),
    }  # fmt: skip


def tidy(folder: str, cap_mb: float, keep_s: float = 86400.0) -> None:
    """Remove the folders below `folder` that were used longest ago until the rest is below `cap_mb`; those used within `keep_s` stay."""
    paths = glob.glob(os.path.join(glob.escape(folder), "*"))
    entries = []
    for path in paths:
        try:
            size = sum(os.path.getsize(item) for item in glob.glob(glob.escape(path) + "/**", recursive=True))
            entries.append((os.path.getmtime(path), size, path))
        except FileNotFoundError:  # another process removes it, or a part of it, meanwhile
            continue
    total = sum(size for _, size, _ in entries)
    for used, size, path in sorted(entries):
        if total <= cap_mb * 1e6 or time.time() - used < keep_s:
            break
        shutil.rmtree(path, ignore_errors=True)
        total -= size


def open_backend(job: dict[str, Any]) -> Any:
    """The runtime of a job: `Backend(job)` in `runner_<backend>.py` beside this file.

    Making it raises `ImportError` where the device lacks a package and gives `version` and `errors`, the exceptions of the runtime.
    `load(model, profile_prefix=None)` creates a session; then there are `inputs` (name, shape), `outputs` (names) and `run(names, feed)`,
    where no names mean all outputs. `op_table(runs)` gives the times per node of a session with a prefix, `failing_operator(message)`
    the operator that made the runtime refuse a model, or an empty text. There may be `about`, more fields of the fingerprint, and after
    `load` `facts`, what else the runtime tells of the model.
    """
    try:
        path = os.path.join(os.path.dirname(os.path.abspath(__file__)), f"runner_{job['backend']}.py")
        backend = runpy.run_path(path)["Backend"](job)
    except ImportError as error:
        raise JobError("missing", str(error), python=sys.executable) from error
    RUNTIME_ERRORS.extend(backend.errors)
    return backend


def load_model(backend: Any, model: str, profile_prefix: str | None = None) -> Any:
    """The backend with a session of the model."""
    try:
        backend.load(model, profile_prefix)
    except tuple(RUNTIME_ERRORS) as error:
        raise JobError("load", str(error), operator=backend.failing_operator(str(error))) from error
    return backend


def make_feeds(inputs: list[tuple[str, list[Any]]], arrays: dict[str, Any]) -> tuple[list[dict[str, Any]], int, int]:
    """The feeds of a model for arrays with a leading sample axis, with the batch size and the number of samples.

    One feed per sample where the model's first axis is 1 or a symbol (that is how it is deployed); a fixed batch of B takes B
    samples a feed, the last ones repeated where they do not suffice. An input without a batch axis takes one sample a feed.
    """
    if {name for name, _ in inputs} != set(arrays):
        raise JobError("run", f"the model's inputs are {[name for name, _ in inputs]}, given are {sorted(arrays)}")
    counts = {len(array) for array in arrays.values()}
    if len(counts) != 1 or 0 in counts:
        raise JobError("run", f"inputs must hold the same number of samples, at least one; found {sorted(counts)}")
    samples = counts.pop()
    batch = max((shape[0] for name, shape in inputs if len(shape) == arrays[name].ndim and isinstance(shape[0], int)), default=1)
    feeds = []
    for start in range(0, samples, batch):
        rows = [min(index, samples - 1) for index in range(start, start + batch)]
        part: Any = slice(start, start + batch) if start + batch <= samples else rows
        feeds.append({name: arrays[name][part] if len(shape) == arrays[name].ndim else arrays[name][start] for name, shape in inputs})
    return feeds, batch, samples


def fed_back(state: dict[str, str], outputs: list[str]) -> list[tuple[str, int]]:
    """The inputs in a job's `state`, each with the place in `outputs` of what it is at the next inference; handing an array on copies nothing."""
    missing = sorted(set(state.values()) - set(outputs))
    if missing:
        raise JobError("run", f"the model has no output {missing} to feed back; it has {outputs}")
    return [(name, outputs.index(output)) for name, output in state.items()]


def load_arrays(paths: dict[str, str]) -> dict[str, Any]:
    """The arrays in `.npy` files; nothing is unpickled."""
    import numpy

    return {name: numpy.load(path, allow_pickle=False) for name, path in paths.items()}


def warm_up(step: Callable[[int], int], protocol: dict[str, Any]) -> tuple[int, float, float | None]:
    """Run until the medians of the last five windows neither fall nor rise; the number of runs, seconds, and the slope reached.

    A window lasts a fifth of `warmup_min_s` and at least three runs. The slope is Theil and Sen's, the median over all pairs of windows, as a share of
    the smallest median per window: one window that a neighbour disturbed does not move it.
    """
    begin = window_begin = time.perf_counter()
    runs, drift = 0, None
    window: list[float] = []
    medians: list[float] = []
    while time.perf_counter() - begin < protocol["warmup_max_s"]:
        window.append(step(runs))
        runs += 1
        now = time.perf_counter()
        if len(window) < 3 or now - window_begin < protocol["warmup_min_s"] / 5.0:
            continue
        medians, window, window_begin = [*medians[-4:], statistics.median(window)], [], now
        if len(medians) == 5:
            slopes = [(medians[late] - medians[early]) / (late - early) for late in range(5) for early in range(late)]
            drift = abs(statistics.median(slopes)) / float(max(1, min(medians)))
            if drift < protocol["warmup_drift"] and now - begin >= protocol["warmup_min_s"]:
                break
    return runs, time.perf_counter() - begin, drift


def launch(job: dict[str, Any]) -> dict[str, Any]:
    """One launch in this process: load, first inference, warm-up, timed loop; its facts as a dictionary."""
    protocol, clock = job["protocol"], time.perf_counter_ns
    backend, arrays = open_backend(job), load_arrays(job["inputs"])
    started_at, ticks = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), stat_ticks(read_text("/proc/stat"))
    before = snapshot()
    os.utime(os.path.dirname(job["model"]) or ".")
    begin = clock()
    load_model(backend, job["model"])
    init_ns = clock() - begin
    feeds, _, _ = make_feeds(backend.inputs, arrays)
    run, places = backend.run, fed_back(job.get("state", {}), backend.outputs)
    held: dict[str, Any] = {}

    def step(index: int) -> int:
        feed = dict(feeds[index % len(feeds)], **held) if held else feeds[index % len(feeds)]
        start = clock()
        values = run(None, feed)
        spent = clock() - start
        held.update([(name, values[place]) for name, place in places])
        return spent

    first_ns = step(0)
    runs, warm_s, drift = warm_up(step, protocol)
    gc.collect()
    gc.disable()
    samples: list[int] = []
    switches, process, thread = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw, time.process_time(), time.thread_time()
    begin = end = clock()
    stop_min, stop_max = begin + int(protocol["min_time_s"] * 1e9), begin + int(protocol["max_time_s"] * 1e9)
    while end < stop_max and (end < stop_min or len(samples) < protocol["min_samples"]):
        samples.append(step(len(samples)))
        end = clock()
    wall = max(1e-9, (end - begin) / 1e9)
    share = max((time.process_time() - process) / (wall * job["threads"]), (time.thread_time() - thread) / wall)
    switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw - switches
    return {
        "samples_ns": samples, "init_ns": init_ns, "first_ns": first_ns, "warmup_runs": runs, "warmup_s": warm_s, "warmup_drift": drift,
        "cpu_share": min(1.0, share), "switches_per_s": switches / wall, "peak_memory_bytes": memory_bytes(read_text("/proc/self/status"), "VmHWM"),
        "before": before, "after": snapshot(since=ticks), "started_at": started_at,
    }  # fmt: skip


def take_lock(path: str, wait_s: float) -> tuple[int | None, str]:
    """The open lock file when this process holds it, else the holder's process id as text, after at most `wait_s` seconds.

    One file for all users of the device: anybody may open it, nobody follows a link, and the lock goes when its holders end.
    """
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        handle = os.open(path, flags)
    except FileNotFoundError:
        os.umask(0)
        handle = os.open(path, flags | os.O_CREAT, 0o666)
        os.umask(0o077)
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                holder = os.pread(handle, 32, 0).decode("ascii", "replace").strip()
                return None, holder or "unknown"
            time.sleep(0.05)
            continue
        os.ftruncate(handle, 0)
        os.pwrite(handle, b"%d\n" % os.getpid(), 0)
        return handle, ""


def run_benchmark(job: dict[str, Any], folder: str) -> bool:
    """Start the launches one after another under the device's lock; a launch that fails ends the job with an `error` line."""
    shared = "/tmp" if os.path.isdir("/tmp") and os.access("/tmp", os.W_OK) else tempfile.gettempdir()
    handle, holder = take_lock(job["lock"] or os.path.join(shared, LOCK_NAME), job["lock_wait_s"])
    if handle is None:
        emit("busy", holder=holder)
        return False
    protocol, spec = job["protocol"], os.path.join(folder, "launch.json")
    for offset, label in enumerate(job["schedule"]):
        if offset and protocol["gap_s"]:
            time.sleep(protocol["gap_s"])
        with open(spec, "w", encoding="utf-8") as stream:
            json.dump(dict(job["models"][label], **{key: job[key] for key in ("backend", "threads", "options", "protocol")}), stream)
        argv = [sys.executable, os.path.abspath(__file__), "--launch", spec]
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, pass_fds=(handle,))
        try:
            out, err = process.communicate(timeout=job["launch_limit_s"])
        except subprocess.TimeoutExpired:
            process.kill()
            out, err = process.communicate()
            err += b"\nstopped after its limit"
        lines = out.decode("utf-8", "replace").splitlines()
        subject = {"label": label, "index": job["first_index"] + offset}
        if process.returncode != 0 or not lines:
            message = f"the launch's process ended with status {process.returncode}"
            raise JobError("launch", message, stderr=err.decode("utf-8", "replace")[-4000:], **subject)
        answer = json.loads(lines[0])
        if answer.pop("kind") != "launch":
            raise JobError(answer.pop("phase"), answer.pop("message"), **dict(answer, **subject))
        emit("launch", launch=dict(answer["launch"], **subject))
    return True


def run_infer(job: dict[str, Any], folder: str) -> bool:
    """All samples through one session; outputs, the first axis holding the samples, as `.npy` in the job's folder.

    With `state`, each `steps` samples are one sequence: the first starts from the arrays of the state, the others from what the step before gave.
    """
    import numpy

    backend = load_model(open_backend(job), job["model"])
    unknown = [name for name in job["outputs"] if name not in backend.outputs]
    if unknown:
        raise JobError("run", f"the model has no output {unknown}; it has {backend.outputs}")
    arrays, state, steps = load_arrays(job["inputs"]), job.get("state", {}), job.get("steps", 1)
    arrays.update({name: numpy.repeat(arrays[name][:1], max(map(len, arrays.values())), axis=0) for name in state})
    feeds, batch, samples = make_feeds(backend.inputs, arrays)
    places = fed_back(state, job["outputs"])
    held: dict[str, Any] = {}
    batched = any(len(shape) == arrays[name].ndim for name, shape in backend.inputs)
    parts: dict[str, list[Any]] = {name: [] for name in job["outputs"]}
    for index, feed in enumerate(feeds):
        values = backend.run(job["outputs"], dict(feed, **held) if index % steps else feed)
        held = {name: values[place] for name, place in places}
        for name, value in zip(job["outputs"], values):
            if not isinstance(value, numpy.ndarray) or value.dtype.hasobject:
                raise JobError("run", f"output {name} is no tensor of numbers")
            whole = batched and value.ndim > 0 and value.shape[0] == batch
            if batch > 1 and not whole:
                raise JobError("run", f"output {name} of shape {value.shape} has no batch axis of {batch}")
            parts[name].append(value if whole else value[None])
    files = {}
    for number, (name, part) in enumerate(parts.items()):
        if len({value.shape for value in part}) > 1:
            raise JobError("run", f"output {name} differs in shape between samples: {sorted({value.shape for value in part})}")
        files[name] = os.path.join(folder, f"output_{number}.npy")
        numpy.save(files[name], numpy.concatenate(part, axis=0)[:samples], allow_pickle=False)
    emit("outputs", files=files)
    return True


def run_op_times(job: dict[str, Any], folder: str) -> bool:
    """The runtime's own times per node; a tenth more runs than asked, at least five, warm up and do not count."""
    backend = load_model(open_backend(job), job["model"], os.path.join(folder, "profile"))
    feeds, _, _ = make_feeds(backend.inputs, load_arrays(job["inputs"]))
    for index in range(job["runs"] + max(5, job["runs"] // 10)):
        backend.run(None, feeds[index % len(feeds)])
    emit("op_times", ops=backend.op_table(job["runs"]))
    return True


def run_check(job: dict[str, Any], folder: str) -> bool:
    """Create a session, as the only sure answer to whether the runtime takes the model."""
    backend = load_model(open_backend(job), job["model"])
    emit("check", inputs=[name for name, _ in backend.inputs], outputs=backend.outputs, facts=getattr(backend, "facts", {}))
    return True


def run_state(job: dict[str, Any], folder: str) -> bool:
    """The state now, and for a probe what the device is."""
    if job["kind"] == "probe":
        for name, cap_mb in job["tidy"].items():
            tidy(name, cap_mb)
        emit("fingerprint", fields=fingerprint(job))
    ticks = stat_ticks(read_text("/proc/stat"))
    time.sleep(0.1)
    emit("snapshot", snapshot=snapshot(since=ticks))
    return True


JOBS: dict[str, Callable[[dict[str, Any], str], Any]] = {
    "benchmark": run_benchmark, "infer": run_infer, "op_times": run_op_times, "check": run_check, "probe": run_state, "snapshot": run_state,
    "launch": lambda job, folder: emit("launch", launch=launch(job)),
}  # fmt: skip


def main(words: list[str]) -> int:
    """Run the job in the file named last; 0 when the answer is on the output, an `error` or `busy` line included."""
    path = words[-1]
    with open(path, encoding="utf-8") as stream:
        job = json.load(stream)
    try:
        if JOBS["launch" if words[0] == "--launch" else job["kind"]](job, os.path.dirname(path) or "."):
            emit("done")
    except JobError as error:
        emit("error", **error.fields)
    except tuple(RUNTIME_ERRORS) as error:
        emit("error", phase="run", message=f"{type(error).__name__}: {error}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The program that measures on the device; it is pushed there as data and run as `python runner.py JOB.json`.

Python 3.8, standard library only at import; nothing imports it and it imports nothing of edgekd. What it reads off the device stands in
`runner_device.py` beside it, what one runtime alone needs in `runner_<runtime>.py`, both under the same rules. It writes one JSON object per line, flushed
and synced, each with a `kind`; tensors are `.npy` files. Paths in a job are relative to the working folder.

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
With `sentinel_max_ns` in the job, the sentinel is looked at all along the timed loop, and an inference beside a slow look is set aside (`timed_loop`).
"""

# ruff: noqa: B905 (zip has no `strict` before Python 3.10)
from __future__ import annotations

import errno
import fcntl
import gc
import glob
import json
import os
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

HERE = os.path.dirname(os.path.abspath(__file__))
LOCK_NAME = "edgekd-device.lock"
_OF_A_LAUNCH = ("backend", "threads", "options", "protocol", "sentinel_max_ns")
RUNTIME_ERRORS: list[type[Exception]] = [RuntimeError]


_device = runpy.run_path(os.path.join(HERE, "runner_device.py"))
fingerprint, memory_bytes, read_text = _device["fingerprint"], _device["memory_bytes"], _device["read_text"]
look_ns, snapshot, stat_ticks = _device["look_ns"], _device["snapshot"], _device["stat_ticks"]


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
        path = os.path.join(HERE, f"runner_{job['backend']}.py")
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


def timed_loop(step: Callable[[int], int], protocol: dict[str, Any], slow_ns: int | None) -> dict[str, Any]:
    """The timed inferences, and with `slow_ns` how the sentinel was beside them.

    Then the inferences come in parts of `look_s` seconds with one run of the sentinel between two parts. A part counts if neither look beside it took
    longer than `slow_ns`; otherwise the machine was disturbed and the part is set aside, whatever its own times. While it is disturbed a part is a
    single inference, so that a calm moment is found soon. `min_samples` and `min_time_s` are asked of what counts, `max_time_s` of all. A launch that
    misses them because of what was set aside is invalid, and holds all its inferences. One so slow that `max_time_s` ends it before `min_samples` on a
    calm machine too must count more than half of its inferences.
    """
    clock = time.perf_counter_ns
    samples: list[int] = []
    everything: list[int] = []
    counted_ns, worst_ns = 0, None
    begin = end = clock()
    seen_ns = 0 if slow_ns is None else look_ns()
    while end - begin < protocol["max_time_s"] * 1e9 and (counted_ns < protocol["min_time_s"] * 1e9 or len(samples) < protocol["min_samples"]):
        start, before_ns = clock(), seen_ns
        part = [step(len(everything))]
        end = clock()
        while slow_ns is not None and before_ns <= slow_ns and end - start < protocol["look_s"] * 1e9:
            part.append(step(len(everything) + len(part)))
            end = clock()
        everything += part
        if slow_ns is not None:
            seen_ns = look_ns()
            if max(before_ns, seen_ns) > slow_ns:
                continue
            worst_ns = max(worst_ns or 0, before_ns, seen_ns)
        samples += part
        counted_ns += end - start
    found: dict[str, Any] = {"samples_ns": samples}
    if slow_ns is not None:
        taken, aside, least_s = len(everything), len(everything) - len(samples), min(protocol["min_time_s"], protocol["max_time_s"])
        needed = protocol["min_samples"] if taken >= protocol["min_samples"] else taken // 2 + 1
        found.update(sentinel_ns=worst_ns, set_aside=aside)
        if aside and (len(samples) < needed or counted_ns < least_s * 1e9):
            seen = f"{len(samples)} of {taken} inferences ({counted_ns / 1e9:.2f} of {(end - begin) / 1e9:.2f} s) were beside a calm sentinel"
            found.update(samples_ns=everything, invalid=f"slowed: {seen}, {needed} ({least_s:g} s) needed")
    return found


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
    switches, process, thread = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw, time.process_time(), time.thread_time()
    begin = clock()
    timed = timed_loop(step, protocol, job.get("sentinel_max_ns"))
    wall = max(1e-9, (clock() - begin) / 1e9)
    share = max((time.process_time() - process) / (wall * job["threads"]), (time.thread_time() - thread) / wall)
    switches = resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw - switches
    return {
        "init_ns": init_ns, "first_ns": first_ns, "warmup_runs": runs, "warmup_s": warm_s, "warmup_drift": drift,
        "cpu_share": min(1.0, share), "switches_per_s": switches / wall, "peak_memory_bytes": memory_bytes(read_text("/proc/self/status"), "VmHWM"),
        "before": before, "after": snapshot(since=ticks), "started_at": started_at, **timed,
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
            json.dump(dict(job["models"][label], **{key: job[key] for key in _OF_A_LAUNCH if key in job}), stream)
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
        backend = open_backend(job)
        about = dict(getattr(backend, "about", {}), runtime=job["backend"], runtime_version=backend.version, threads=str(job["threads"]))
        emit("fingerprint", fields=dict(fingerprint(), **about))
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

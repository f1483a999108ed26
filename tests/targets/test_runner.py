"""The on-device runner alone: what it may import, what it reads off a device, its lock, its launches."""

from __future__ import annotations

import ast
import itertools
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgekd.testing import two_headed, two_inputs

ROOT = Path(__file__).resolve().parents[2]
RUNNER = ROOT / "targets" / "runner.py"
DEVICE = ROOT / "targets" / "runner_device.py"
BACKEND = ROOT / "targets" / "runner_onnxruntime.py"
SUPERVISOR = ROOT / "targets" / "transports" / "_supervise.py"
WAIT_S = 30.0
PROTOCOL = {"warmup_min_s": 0.0, "warmup_max_s": 0.0, "warmup_drift": 0.1, "min_samples": 20, "min_time_s": 0.0, "max_time_s": 5.0, "gap_s": 0.0}

X86_VNNI = """processor\t: 0
vendor_id\t: AuthenticAMD
model name\t: AMD EPYC 9454P 48-Core Processor
cpu MHz\t\t: 2745.130
flags\t\t: fpu vme sse4_2 fma avx f16c avx2 avx512f avx512dq avx512_bf16 avx512_vnni
vmx flags\t: vnmi preemption_timer

processor\t: 1
model name\t: AMD EPYC 9454P 48-Core Processor
cpu MHz\t\t: 3801.002
flags\t\t: fpu vme sse4_2 fma avx f16c avx2 avx512f avx512dq avx512_bf16 avx512_vnni
"""
X86_HYBRID = """processor\t: 0
model name\t: 12th Gen Intel(R) Core(TM) i7-1260P
flags\t\t: fpu avx avx2 fma avx_vnni avx512f

processor\t: 1
model name\t: 12th Gen Intel(R) Core(TM) i7-1260P
flags\t\t: fpu avx avx2 fma avx_vnni
"""
ARM_PI5 = """processor\t: 0
BogoMIPS\t: 108.00
Features\t: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x4
CPU part\t: 0xd0b
CPU revision\t: 1

Revision\t: d04170
Model\t\t: Raspberry Pi 5 Model B Rev 1.0
"""
ARM_BIG_LITTLE = """processor\t: 0
Features\t: fp asimd evtstrm
CPU implementer\t: 0x41
CPU part\t: 0xd03

processor\t: 4
Features\t: fp asimd evtstrm asimddp i8mm
CPU implementer\t: 0x41
CPU part\t: 0xd41

processor\t: 5
Features\t: fp asimd evtstrm asimddp i8mm
CPU implementer\t: 0x99
CPU part\t: 0x7
"""
STAT = """cpu  7193 10 2738 228525 244 5 36 111 50 0
cpu0 702 0 696 117902 21 0 4 2 0 0
intr 12345 0 9
"""


@pytest.fixture(scope="module")
def runner() -> dict[str, Any]:
    return runpy.run_path(str(RUNNER), run_name="runner")


@pytest.fixture(scope="module")
def device() -> dict[str, Any]:
    return runpy.run_path(str(DEVICE))


@pytest.fixture(scope="module")
def backend() -> dict[str, Any]:
    return runpy.run_path(str(BACKEND))


def benchmark_job(tmp_path: Path, launches: int, **changes: Any) -> list[str]:
    """The command line of a benchmark of the two-headed model, without any transport."""
    model = two_headed(tmp_path / "model")
    paths = {}
    for name, value in two_inputs(3).items():
        paths[name] = str(tmp_path / f"{name}.npy")
        np.save(paths[name], value, allow_pickle=False)
    job = {
        "kind": "benchmark", "backend": "onnxruntime", "threads": 1, "options": {}, "protocol": PROTOCOL, "lock": str(tmp_path / "lock"), "lock_wait_s": 0.0,
        "launch_limit_s": 30.0, "first_index": 0, "schedule": ["x"] * launches, "models": {"x": {"model": str(model.entry), "inputs": paths}},
    }  # fmt: skip
    folder = tmp_path / f"job{len(list(tmp_path.glob('job*')))}"
    folder.mkdir()
    (folder / "job.json").write_text(json.dumps({**job, **changes}))
    return [sys.executable, str(RUNNER), str(folder / "job.json")]


def lines_of(words: list[str]) -> list[dict[str, Any]]:
    done = subprocess.run(words, capture_output=True, timeout=WAIT_S, check=True)
    return [json.loads(line) for line in done.stdout.splitlines()]


# ---- what it is


@pytest.mark.parametrize("path", [RUNNER, DEVICE, BACKEND, SUPERVISOR])
def test_shipped_program_is_python_3_8_and_imports_standard_library_only(path: Path) -> None:
    tree = ast.parse(path.read_text(), feature_version=(3, 8))
    names = set()
    for node in tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add((node.module or "").partition(".")[0])
    assert names <= set(sys.stdlib_module_names)
    assert "edgekd" not in path.read_text().replace("of edgekd", "").replace('"edgekd-device.lock"', "")


def test_nothing_imports_runner() -> None:
    for path in [*ROOT.glob("edgekd/**/*.py"), *ROOT.glob("targets/**/*.py"), *ROOT.glob("converters/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom):
                imported = [node.module or "", *(alias.name for alias in node.names)]
            elif isinstance(node, ast.Import):
                imported = [alias.name for alias in node.names]
            else:
                continue
            assert not any(name.rpartition(".")[2].startswith("runner") for name in imported), path


def test_runner_speaks_under_python_3_8_without_any_package(tmp_path: Path) -> None:
    candidates = [shutil.which("python3.8"), *map(str, Path.home().glob(".pyenv/versions/3.8.*/bin/python"))]
    for python in [candidate for candidate in candidates if candidate]:
        if subprocess.run([python, "-c", "import sys; sys.exit(sys.version_info[:2] != (3, 8))"], capture_output=True, check=False).returncode == 0:
            break
    else:
        pytest.skip("no Python 3.8 on this machine")
    (tmp_path / "job.json").write_text(json.dumps({"kind": "snapshot"}))
    assert [line["kind"] for line in lines_of([python, "-I", str(RUNNER), str(tmp_path / "job.json")])] == ["snapshot", "done"]
    (tmp_path / "job.json").write_text(json.dumps({"kind": "probe", "tidy": {}, "backend": "onnxruntime", "threads": 1, "options": {}}))
    refused = lines_of([python, "-I", "-S", str(RUNNER), str(tmp_path / "job.json")])[-1]
    assert (refused["kind"], refused["phase"]) == ("error", "missing")
    assert b"3.8" in subprocess.run([refused["python"], "--version"], capture_output=True, check=True).stdout


# ---- what it reads off a device


@pytest.mark.parametrize(
    ("text", "model", "isa"),
    [
        (X86_VNNI, "AMD EPYC 9454P 48-Core Processor", "avx avx2 avx512 avx512_bf16 f16c fma vnni"),
        (X86_HYBRID, "12th Gen Intel(R) Core(TM) i7-1260P", "avx avx2 avx_vnni fma"),
        (ARM_PI5, "Cortex-A76", "dotprod fp16 neon"),
        (ARM_BIG_LITTLE, "Arm implementer 0x99 part 0x7 + Cortex-A53 + Cortex-A78", "neon"),
        ("CPU implementer : junk\nCPU part : 0xd0b\n", "Arm implementer junk part 0xd0b", ""),
        ("Hardware\t: BCM2835\n", "BCM2835", ""),
        ("", "unknown", ""),
    ],
)
def test_cpuinfo_gives_model_and_common_instruction_sets(device: dict[str, Any], text: str, model: str, isa: str) -> None:
    assert device["cpu_model"](text) == model
    assert device["isa_text"](text) == isa


def test_cpuinfo_gives_largest_clock_or_nothing(device: dict[str, Any]) -> None:
    assert device["cpuinfo_mhz"](X86_VNNI) == 3801.002
    assert device["cpuinfo_mhz"](ARM_PI5) is None


def test_stat_gives_stolen_share_between_two_readings(device: dict[str, Any]) -> None:
    before = device["stat_ticks"](STAT)
    assert before == (111, 7193 + 10 + 2738 + 228525 + 244 + 5 + 36 + 111)
    after = device["stat_ticks"](STAT.replace(" 7193 ", " 7268 ").replace(" 111 ", " 136 "))
    assert device["steal_share"](before, after) == pytest.approx(0.25)
    assert device["steal_share"](before, before) is None
    assert device["stat_ticks"]("cpu  1 2 3 4\n") is None
    assert device["stat_ticks"]("") is None


@pytest.mark.parametrize(
    ("text", "celsius"), [("45500\n", 45.5), ("45\n", 45.0), ("-256000", None), ("0", None), ("130000", None), ("127500", 127.5), ("", None), ("n/a", None)]
)
def test_thermal_zone_ignores_what_no_working_sensor_says(device: dict[str, Any], text: str, celsius: float | None) -> None:
    assert device["zone_celsius"](text) == celsius


def test_memory_and_system_are_read_with_their_units(device: dict[str, Any]) -> None:
    assert device["memory_bytes"]("MemTotal:       1000 kB\nMemAvailable:    500 kB\n", "MemAvailable") == 512_000
    assert device["memory_bytes"]("VmHWM:\t     2 kB\n", "VmHWM") == 2048
    assert device["memory_bytes"]("", "MemTotal") is None
    assert device["os_name"]('NAME="x"\nPRETTY_NAME="Ubuntu 22.04.4 LTS"\n') == "Ubuntu 22.04.4 LTS"


@pytest.mark.parametrize(
    ("message", "operator"),
    [
        ("[ONNXRuntimeError] : 9 : NOT_IMPLEMENTED : Could not find an implementation for Conv(11) node with name 'c1'", "Conv"),
        ("[ONNXRuntimeError] : 1 : FAIL : Fatal error: made.up:Wobble(-1) is not a registered function/op", "Wobble"),
        ("No Op registered for Gelu2 with domain_version of 18", "Gelu2"),
        ("Protobuf parsing failed.", ""),
    ],
)
def test_message_of_runtime_gives_operator(backend: dict[str, Any], message: str, operator: str) -> None:
    assert backend["Backend"].failing_operator(message) == operator


def test_op_table_takes_median_of_last_runs_in_order(backend: dict[str, Any]) -> None:
    def event(name: str, duration: int, cat: str = "Node") -> dict[str, Any]:
        return {"cat": cat, "name": name, "dur": duration, "args": {"op_name": name[:4], "provider": "P", "node_index": "1"}}

    events = [event("Conv_kernel_time", 900), event("Relu_kernel_time", 80), event("Conv_fence_before", 5), event("model_run", 7, "Session")]
    events += [event("Conv_kernel_time", 30), event("Relu_kernel_time", 1), event("Conv_kernel_time", 40), event("Relu_kernel_time", 3)]
    events += [event("Conv_kernel_time", 50), event("Relu_kernel_time", 2)]
    assert backend["op_table"](events, 3) == [
        {"name": "Conv", "op_type": "Conv", "provider": "P", "time_ns": 40_000},
        {"name": "Relu", "op_type": "Relu", "provider": "P", "time_ns": 2_000},
    ]


def test_feeds_have_batch_one_or_the_fixed_batch(runner: dict[str, Any]) -> None:
    data = {"x": np.arange(5 * 2).reshape(5, 2)}
    feeds, batch, samples = runner["make_feeds"]([("x", ["batch", 2])], data)
    assert (len(feeds), batch, samples) == (5, 1, 5)
    assert feeds[3]["x"].tolist() == [[6, 7]]
    feeds, batch, samples = runner["make_feeds"]([("x", [2, 2])], data)
    assert (len(feeds), batch, samples) == (3, 2, 5)
    assert feeds[2]["x"].tolist() == [[8, 9], [8, 9]]
    feeds, _, _ = runner["make_feeds"]([("x", [2])], data)
    assert feeds[4]["x"].tolist() == [8, 9]


@pytest.mark.parametrize(
    ("windows", "limit", "runs"),
    [
        ([100] * 5, 0.05, 15),
        ([200, 150, 100, 100, 100, 100, 100], 0.05, 18),
        ([200, 180, 160, 140, 120, 100, 100, 100, 100, 100], 0.05, 27),
        ([100, 104, 100, 104, 100], 0.005, 15),
        ([100, 100, 150, 100, 100], 0.005, 15),
    ],
)
def test_warm_up_stops_when_medians_of_five_windows_have_no_slope(runner: dict[str, Any], windows: list[int], limit: float, runs: int) -> None:
    def step(index: int) -> int:
        return windows[min(index // 3, len(windows) - 1)]

    done, _, drift = runner["warm_up"](step, {"warmup_min_s": 0.0, "warmup_max_s": 30.0, "warmup_drift": limit})
    assert done == runs
    assert drift < limit


def test_warm_up_ends_at_its_longest_and_says_what_it_reached(runner: dict[str, Any]) -> None:
    done, seconds, drift = runner["warm_up"](lambda index: 1_000_000 - 1000 * (index // 3), {"warmup_min_s": 0.0, "warmup_max_s": 0.02, "warmup_drift": 0.0})
    assert done >= 15
    assert seconds >= 0.02
    assert drift is not None
    assert drift > 0.0
    assert runner["warm_up"](lambda index: 1, {"warmup_min_s": 1.0, "warmup_max_s": 0.0, "warmup_drift": 0.01})[::2] == (0, None)


LOOKING = PROTOCOL | {"look_s": 0.0, "min_samples": 4}


def looking(runner: dict[str, Any], monkeypatch: pytest.MonkeyPatch, looks: list[int], protocol: dict[str, Any] = LOOKING) -> dict[str, Any]:
    """The timed loop of a model whose inferences take 0, 1, 2, ... ns, with a sentinel that takes these times, the last one for ever."""
    seen = iter(looks)
    monkeypatch.setitem(runner["timed_loop"].__globals__, "sentinel_ns", lambda window_s: next(seen, looks[-1]))
    found: dict[str, Any] = runner["timed_loop"](lambda index: index, protocol, 100)
    return found


def test_inferences_beside_a_slow_sentinel_are_set_aside(runner: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    found = looking(runner, monkeypatch, [90, 95, 101, 150, 99, 100, 91, 90])
    assert found == {"samples_ns": [0, 4, 5, 6], "sentinel_ns": 100, "set_aside": 3}


def test_launch_that_never_finds_the_device_calm_is_invalid(runner: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    found = looking(runner, monkeypatch, [90, 90, 90, 101], LOOKING | {"max_time_s": 0.05})
    assert found["set_aside"] > 4
    assert found["samples_ns"] == list(range(found["set_aside"] + 2))  # what a rejected launch saw stays known
    assert re.fullmatch(r"slowed: 2 of \d+ inferences \(.* of 0\.05 s\) were beside a calm sentinel, 4 \(0 s\) needed", found["invalid"])
    assert looking(runner, monkeypatch, [101], LOOKING | {"max_time_s": 0.05})["sentinel_ns"] is None


def test_launch_must_count_its_least_time_and_more_than_half_of_a_slow_model(runner: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    short = looking(runner, monkeypatch, [90] * 6 + [101], LOOKING | {"min_time_s": 0.03, "max_time_s": 0.05})
    assert short["set_aside"] > 0
    assert "(0.03 s) needed" in short["invalid"]
    many = LOOKING | {"min_samples": 10**9, "max_time_s": 0.05}
    assert "invalid" not in looking(runner, monkeypatch, [101, *[90] * 10**6], many)
    assert looking(runner, monkeypatch, [90, 90, 101], many)["invalid"].startswith("slowed: 1 of ")


def test_parts_last_as_long_as_asked_and_one_inference_beside_a_slow_look(runner: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    found = looking(runner, monkeypatch, [101, 101, 101, 90, 90], LOOKING | {"look_s": 0.02, "min_samples": 20})
    assert found["set_aside"] == 3
    assert found["samples_ns"][0] == 3
    assert len(found["samples_ns"]) > 20  # a part is not cut short


def test_loop_without_looks_takes_what_is_asked(runner: dict[str, Any]) -> None:
    assert runner["timed_loop"](lambda index: index, LOOKING, None) == {"samples_ns": [0, 1, 2, 3]}


def test_tidy_removes_what_was_used_longest_ago(runner: dict[str, Any], tmp_path: Path) -> None:
    for age_days, name in enumerate(["today", "yesterday", "older", "oldest"]):
        (tmp_path / name).mkdir()
        (tmp_path / name / "m.onnx").write_bytes(bytes(1_000_000))
        used = time.time() - age_days * 2 * 86400
        os.utime(tmp_path / name, (used, used))
    runner["tidy"](str(tmp_path), 3.2)
    assert {path.name for path in tmp_path.iterdir()} == {"today", "yesterday", "older"}
    runner["tidy"](str(tmp_path), 0.0)
    assert {path.name for path in tmp_path.iterdir()} == {"today"}


# ---- its lock and its launches


def test_lock_excludes_second_benchmark_and_names_holder(tmp_path: Path) -> None:
    slow = {**PROTOCOL, "min_time_s": 20.0, "max_time_s": 20.0}
    with subprocess.Popen(benchmark_job(tmp_path, 1, protocol=slow), stdout=subprocess.DEVNULL, start_new_session=True) as holder:
        deadline = time.monotonic() + WAIT_S
        while not ((tmp_path / "lock").exists() and (tmp_path / "lock").read_text().strip()):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert lines_of(benchmark_job(tmp_path, 1)) == [{"kind": "busy", "holder": str(holder.pid)}]
        os.killpg(holder.pid, signal.SIGKILL)
    assert [line["kind"] for line in lines_of(benchmark_job(tmp_path, 1, lock_wait_s=10.0))] == ["launch", "done"]


def test_lock_is_held_by_launch_whose_parent_died(tmp_path: Path) -> None:
    slow = {**PROTOCOL, "min_time_s": 20.0, "max_time_s": 20.0}
    with subprocess.Popen(benchmark_job(tmp_path, 1, protocol=slow), stdout=subprocess.DEVNULL, start_new_session=True) as parent:
        child = child_of(parent.pid)
        parent.kill()
    assert lines_of(benchmark_job(tmp_path, 1))[0]["kind"] == "busy"
    os.kill(child, signal.SIGKILL)


def test_lock_is_open_to_other_users_and_follows_no_link(runner: dict[str, Any], tmp_path: Path) -> None:
    handle, _ = runner["take_lock"](str(tmp_path / "lock"), 0.0)
    assert (tmp_path / "lock").stat().st_mode & 0o777 == 0o666
    os.close(handle)
    (tmp_path / "target").write_text("keep")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with pytest.raises(OSError, match="link"):
        runner["take_lock"](str(tmp_path / "link"), 0.0)
    assert (tmp_path / "target").read_text() == "keep"


def child_of(pid: int) -> int:
    """The first child of a process, once it has one."""
    deadline = time.monotonic() + WAIT_S
    while not (words := Path(f"/proc/{pid}/task/{pid}/children").read_text().split()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return int(words[0])


def test_launch_that_dies_gives_error_line_after_those_that_lived(tmp_path: Path) -> None:
    slow = {**PROTOCOL, "min_time_s": 20.0, "max_time_s": 20.0}
    with subprocess.Popen(benchmark_job(tmp_path, 3, protocol=slow), stdout=subprocess.PIPE, start_new_session=True) as process:
        os.kill(child_of(process.pid), signal.SIGKILL)
        out, _ = process.communicate(timeout=WAIT_S)
    lines = [json.loads(line) for line in out.splitlines()]
    assert [(line["kind"], line["phase"], line["label"], line["index"]) for line in lines] == [("error", "launch", "x", 0)]
    assert "-9" in lines[0]["message"]


def test_launch_that_hangs_is_ended_at_its_limit(tmp_path: Path) -> None:
    slow = {**PROTOCOL, "min_time_s": 20.0, "max_time_s": 20.0}
    line = lines_of(benchmark_job(tmp_path, 1, protocol=slow, launch_limit_s=1.0))[0]
    assert (line["kind"], line["phase"]) == ("error", "launch")
    assert "limit" in line["stderr"]


def test_launches_are_fresh_processes_with_raw_samples(tmp_path: Path) -> None:
    lines = lines_of(benchmark_job(tmp_path, 2, first_index=7))
    assert [line["kind"] for line in lines] == ["launch", "launch", "done"]
    for offset, line in enumerate(lines[:2]):
        assert line["launch"]["index"] == 7 + offset
        assert len(line["launch"]["samples_ns"]) == PROTOCOL["min_samples"]
        assert all(isinstance(sample, int) for sample in line["launch"]["samples_ns"])
    assert lines[0]["launch"]["init_ns"] != lines[1]["launch"]["init_ns"]


@pytest.mark.parametrize(("sentinel_max_ns", "kept"), [(10**12, True), (1, False)])
def test_launch_looks_at_the_sentinel_where_a_limit_is_given(tmp_path: Path, sentinel_max_ns: int, kept: bool) -> None:
    protocol = PROTOCOL | {"look_s": 0.002, "max_time_s": 0.2}
    found = lines_of(benchmark_job(tmp_path, 1, protocol=protocol, sentinel_max_ns=sentinel_max_ns))[0]["launch"]
    assert found["samples_ns"]
    assert (found["sentinel_ns"] or 0) > 0 if kept else found["invalid"].startswith("slowed: 0 of ")
    assert (found["set_aside"] == 0) is kept


# ---- state

REMEMBERS = '''
import json
import numpy


class Backend:
    """A library whose model adds x to what it remembers, and writes down what it was given to remember."""

    version, errors = "1", (RuntimeError,)

    def __init__(self, job):
        self.seen = job["options"]["seen"]

    def load(self, model, profile_prefix=None):
        self.inputs, self.outputs = [("x", [1, 1]), ("memory", [1, 1])], ["total", "memory.next"]

    def run(self, names, feed):
        with open(self.seen, "a") as stream:
            stream.write(json.dumps([float(feed["x"][0, 0]), float(feed["memory"][0, 0])]) + "\\n")
        total = feed["x"] + feed["memory"]
        return [total, total % 97.0]
'''


def remembering_job(tmp_path: Path, kind: str, **fields: Any) -> list[str]:
    """The command line of a job on a library of its own beside a copy of the runner."""
    for path in (RUNNER, DEVICE):
        shutil.copy(path, tmp_path / path.name)
    (tmp_path / "runner_remembers.py").write_text(REMEMBERS)
    paths = {}
    for name, value in {"x": np.arange(1.0, 7.0).reshape(6, 1), "memory": np.full((1 if kind == "infer" else 6, 1), 10.0)}.items():
        paths[name] = str(tmp_path / f"{name}.npy")
        np.save(paths[name], value, allow_pickle=False)
    model = {"model": "model", "inputs": paths, "state": {"memory": "memory.next"}}
    job = {"kind": kind, "backend": "remembers", "threads": 1, "options": {"seen": str(tmp_path / "seen")}, **(model if kind == "infer" else {}), **fields}
    if kind == "benchmark":
        job |= {"protocol": PROTOCOL, "lock": str(tmp_path / "lock"), "lock_wait_s": 0.0, "launch_limit_s": 30.0, "first_index": 0}
        job |= {"schedule": ["x"], "models": {"x": {**model, **fields}}}
    (tmp_path / "job.json").write_text(json.dumps(job))
    return [sys.executable, str(tmp_path / "runner.py"), str(tmp_path / "job.json")]


def test_launch_feeds_the_state_back_over_all_its_inferences(tmp_path: Path) -> None:
    assert [line["kind"] for line in lines_of(remembering_job(tmp_path, "benchmark"))] == ["launch", "done"]
    seen = [json.loads(line) for line in (tmp_path / "seen").read_text().splitlines()]
    assert len(seen) > PROTOCOL["min_samples"]
    assert seen[0] == [1.0, 10.0]
    assert all(after[1] == (before[0] + before[1]) % 97.0 for before, after in itertools.pairwise(seen))
    assert {x for x, _ in seen} == {1.0, 2.0, 3.0, 4.0, 5.0, 6.0}


def test_infer_starts_every_sequence_from_the_given_state(tmp_path: Path) -> None:
    lines = lines_of(remembering_job(tmp_path, "infer", outputs=["total", "memory.next"], steps=3))
    assert [line["kind"] for line in lines] == ["outputs", "done"]
    np.testing.assert_array_equal(np.load(lines[0]["files"]["total"]).ravel(), [11.0, 13.0, 16.0, 14.0, 19.0, 25.0])


@pytest.mark.parametrize(("kind", "fields"), [("benchmark", {"state": {"memory": "gone"}}), ("infer", {"outputs": ["total"], "steps": 3})])
def test_a_state_without_its_output_is_an_error_that_names_it(tmp_path: Path, kind: str, fields: dict[str, Any]) -> None:
    (line,) = lines_of(remembering_job(tmp_path, kind, **fields))
    assert (line["kind"], line["phase"]) == ("error", "run")
    assert ("gone" if kind == "benchmark" else "memory.next") in line["message"]

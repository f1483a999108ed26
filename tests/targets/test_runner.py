"""The on-device runner alone: what it may import, what it makes of a job, its lock, its launches."""

from __future__ import annotations

import ast
import itertools
import json
import os
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


@pytest.fixture(scope="module")
def runner() -> dict[str, Any]:
    return runpy.run_path(str(RUNNER), run_name="runner")


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


# ---- what it makes of a job


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

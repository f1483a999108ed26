"""Ctrl-C in the command line: exit code 130, and the same command goes on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from edgekd.stages import STAGES

pytestmark = [pytest.mark.torch, pytest.mark.slow]

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
JOB = """\
teacher = "interrupted:teacher"
task = "classification"
target = "null"

[data]
train = "interrupted:train"
validation = "interrupted:validation"
test = "interrupted:test"

[budget]
latency_share = 0.5

[student]
fixed = "interrupted:net"

[options]
accept_simulated = true

[options.train]
epochs = 40
threads = 1
precision = "fp32"
teacher_outputs = "cached"
checkpoint_every_s = 0.0
"""
MODULE = """\
from pipeline_kit import classifier, make_data, make_teacher

def teacher():
    return make_teacher("classification")

def net():
    return classifier(8)

def train():
    return make_data("classification").train

def validation():
    return make_data("classification").validation

def test():
    return make_data("classification").test
"""


def start(folder: Path) -> subprocess.Popen[str]:
    """The command line in a process of its own, with Ctrl-C as a shell in the foreground leaves it."""
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from edgekd.cli.main import main; main()"
    command = [sys.executable, "-c", code, "compress", str(folder / "job.toml"), "--run-dir", str(folder / "run")]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.pathsep.join((str(ROOT), str(HERE)))}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def journal(folder: Path) -> list[tuple[str, str, str]]:
    return [(entry["stage"], entry["kind"], entry["key"]) for entry in map(json.loads, (folder / "run" / "events.jsonl").read_text().splitlines())]


def test_ctrl_c_exits_with_130_and_the_same_command_goes_on(tmp_path: Path) -> None:
    (tmp_path / "job.toml").write_text(JOB)
    (tmp_path / "interrupted.py").write_text(MODULE)
    child = start(tmp_path)
    deadline = time.monotonic() + 120
    while not list((tmp_path / "run" / "work").glob("distil-*/checkpoint-*")) and child.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    child.send_signal(signal.SIGINT)
    said = child.communicate(timeout=60)[1]
    assert child.returncode == 130, said
    assert "the same command continues" in said
    assert "Traceback" not in said
    first = journal(tmp_path)
    assert [stage for stage, kind, _ in first if kind == "finished"] == ["baseline", "search"]
    assert list((tmp_path / "run" / "work").glob("distil-*/checkpoint-*"))
    again = start(tmp_path)
    out, said = again.communicate(timeout=400)
    assert again.returncode in (0, 1), said
    assert "verdict" in out.lower()
    both = journal(tmp_path)
    assert both[: len(first)] == first
    assert [stage for stage, kind, _ in both[len(first) :] if kind == "reused"] == ["baseline", "search"]
    finished = Counter(key for _, kind, key in both if kind == "finished")
    assert set(finished.values()) == {1}
    assert len(finished) == len(STAGES)

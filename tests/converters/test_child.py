"""A converter's process of its own: every way it can fail ends in one clear error, and nothing stays behind or reaches the terminal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
from edgekd.converters._child import Limits, limits_of, run_worker, session_memory, work_folder  # type: ignore[import-not-found]

from edgekd.errors import ConfigError, ConversionRejected, WorkerFailed

ROOT = Path(__file__).resolve().parents[2]


class Child:
    """Runs a fake worker, given as the text of its program."""

    def __init__(self, folder: Path) -> None:
        self.work, self.logs = folder / "work", folder / "logs"
        self.work.mkdir()

    def run(self, program: str, *, timeout_s: float = 60.0, memory_mb: float = 2000.0, **request: Any) -> dict[str, Any]:
        """What the worker gives."""
        script = self.work / "fake_worker.py"
        script.write_text(textwrap.dedent(program), encoding="utf-8")
        found = run_worker(script, request, python=Path(sys.executable), work=self.work, converter="fake", limits=Limits(timeout_s, memory_mb), logs=self.logs)
        assert isinstance(found, dict)
        return found

    def fails(self, program: str, reason: str, **limits: float) -> WorkerFailed:
        """The error of a worker that fails for this reason; its log is there, and no process of it is left."""
        with pytest.raises(WorkerFailed) as raised:
            self.run(program, **limits)
        error = raised.value
        assert error.reason == reason, error
        assert isinstance(error, ConversionRejected)
        assert error.log.is_file()
        assert str(error.log) in str(error)
        assert "\n" not in str(error)
        assert error.hint
        pid = self.work / "pids"
        for number in pid.read_text().split() if pid.is_file() else []:
            assert not alive(int(number))
        return error


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except OSError:
        return False


@pytest.fixture
def child(tmp_path: Path) -> Child:
    return Child(tmp_path)


def test_a_worker_answers_and_its_chatter_reaches_nobody(child: Child, capfd: pytest.CaptureFixture[str]) -> None:
    program = """
        import os, sys
        def work(request):
            print("noise" * 1000)
            os.write(2, b"more noise")
            os.system("echo noise of a child")
            return {"sum": request["left"] + request["right"], "folder": os.getcwd()}
    """
    assert child.run(program, left=2, right=3) == {"sum": 5, "folder": str(child.work)}
    assert capfd.readouterr() == ("", "")
    assert list(child.logs.iterdir()) == []


def test_a_worker_sees_few_variables_and_no_network(child: Child, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEKD_TEST_SECRET", "token")
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    program = """
        import os, sys, urllib.error, urllib.request
        def work(request):
            try:
                urllib.request.urlopen("http://example.invalid/images.npy", timeout=20)
                reached = True
            except urllib.error.URLError as error:
                reached = "refused" not in str(error)
            return {"variables": dict(os.environ), "reached": reached, "terminal": sys.stdin.isatty(), "read": sys.stdin.read()}
    """
    found = child.run(program)
    assert not {"EDGEKD_TEST_SECRET", "PYTHONPATH"} & set(found["variables"])
    assert found["variables"]["HOME"] == str(child.work)
    assert found["variables"]["PYTHONHASHSEED"] == "0"
    assert (found["reached"], found["terminal"], found["read"]) == (False, False, "")


def test_a_crash_names_the_signal_and_the_last_words(child: Child) -> None:
    error = child.fails(
        """
        import os, signal
        def work(request):
            print("\\x1b[31mconverting node conv_7\\x1b[0m", flush=True)
            os.kill(os.getpid(), signal.SIGSEGV)
        """,
        "crash",
    )
    assert "SIGSEGV" in str(error)
    assert error.tail == "converting node conv_7"
    assert "its last words: converting node conv_7" in str(error)


def test_a_hang_is_ended_with_all_its_processes_when_the_deadline_passes(child: Child) -> None:
    begun = time.monotonic()
    error = child.fails(
        """
        import os, signal, subprocess, sys, time
        def work(request):
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            code = "import os, signal, time; os.setpgid(0, 0); signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
            inner = subprocess.Popen([sys.executable, "-c", code])
            with open("pids", "w") as stream:
                stream.write(f"{os.getpid()} {inner.pid}")
            time.sleep(600)
        """,
        "timeout",
        timeout_s=1.5,
    )
    assert len((child.work / "pids").read_text().split()) == 2
    assert "timeout_s" in str(error)
    assert time.monotonic() - begun < 60


def test_too_much_memory_is_ended_also_when_a_process_below_takes_it(child: Child) -> None:
    error = child.fails(
        """
        import subprocess, sys
        def work(request):
            subprocess.run([sys.executable, "-c", "import time; held = bytearray(b'x') * 400_000_000; time.sleep(600)"])
        """,
        "memory",
        memory_mb=200,
    )
    assert "200 MB" in str(error)
    assert "memory_mb" in str(error)


@pytest.mark.parametrize(
    ("program", "reason", "words"),
    [
        ("def work(request):\n    return 3\n", "rubbish", "3"),
        ("def work(request):\n    return {'x': object()}\n", "error", "not JSON serializable"),
        ("import os\ndef work(request):\n    os._exit(0)\n", "rubbish", "left no result"),
        ("import os\ndef work(request):\n    os._exit(7)\n", "error", "status 7"),
        ("import os\ndef work(request):\n    open('result.json', 'w').write('{rubbish')\n    os._exit(0)\n", "rubbish", "no JSON"),
        ("import os\ndef work(request):\n    open('result.json', 'w').write('[1]')\n    os._exit(0)\n", "rubbish", "[1]"),
        ("import sys\ndef work(request):\n    print('ERROR: op conv_7')\n    sys.exit(1)\n", "error", "ERROR: op conv_7"),
        ("import sys\ndef work(request):\n    sys.exit(0)\n", "error", "SystemExit"),
        ("def work(request):\n    raise ValueError('axis 3 is gone')\n", "error", "axis 3 is gone"),
        ("import no_such_package\n", "error", "no_such_package"),
        ("def work(request:\n", "error", "SyntaxError"),
        ("pass\n", "error", "work"),
    ],
)
def test_rubbish_and_refusals_are_told_apart(child: Child, program: str, reason: str, words: str) -> None:
    assert words in str(child.fails(program, reason))


def test_a_refusal_carries_its_subject_and_hint(child: Child) -> None:
    error = child.fails(
        """
        class Refused(Exception):
            subject, hint = "conv_7", "use a smaller kernel"
        def work(request):
            raise Refused("the kernel is too large")
        """,
        "error",
    )
    assert error.subject == "conv_7"
    assert "use a smaller kernel" in str(error)
    assert "the kernel is too large" in str(error)


def test_a_traced_error_of_tensorflow_is_told_by_its_last_line(child: Child) -> None:
    program = """
        def work(request):
            raise RuntimeError("in user code:\\n\\n    File 'a.py', line 3, in call\\n\\n    ValueError: GRU is not supported\\n")
    """
    assert "RuntimeError: ValueError: GRU is not supported" in str(child.fails(program, "error"))


def test_a_python_that_is_not_there_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(WorkerFailed, match="could not be started"):
        run_worker(tmp_path / "x.py", {}, python=tmp_path / "python", work=tmp_path, converter="fake", logs=tmp_path / "logs")


def test_a_result_of_an_earlier_worker_is_not_taken(child: Child) -> None:
    (child.work / "result.json").write_text(json.dumps({"type": "edgekd.worker_result/1", "result": {"old": 1}}), encoding="utf-8")
    child.fails("import os\ndef work(request):\n    os._exit(0)\n", "rubbish")


def test_only_the_newest_logs_are_kept(child: Child) -> None:
    child.logs.mkdir()
    for number in range(30):
        (child.logs / f"20200101T0000{number:02d}-fake-x.log").write_text("old", encoding="utf-8")
    error = child.fails("def work(request):\n    raise ValueError\n", "error")
    assert len(list(child.logs.iterdir())) <= 21
    assert error.log.is_file()


_PARENT = """
import sys
from pathlib import Path
from edgekd.converters._child import run_worker
work = Path(sys.argv[1])
run_worker(work / "fake_worker.py", {}, python=Path(sys.executable), work=work, converter="fake", logs=work / "logs")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_worker_ends_with_the_process_that_started_it(number: signal.Signals, tmp_path: Path) -> None:
    program = "import os, time\ndef work(request):\n    open('part', 'w').write(str(os.getpid()))\n    os.replace('part', 'pid')\n    time.sleep(600)\n"
    (tmp_path / "fake_worker.py").write_text(program, encoding="utf-8")
    parent = subprocess.Popen([sys.executable, "-c", _PARENT, str(tmp_path)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        assert wait_for(lambda: (tmp_path / "pid").is_file())
        worker = int((tmp_path / "pid").read_text())
        assert alive(worker)
        parent.send_signal(number)
        parent.wait(timeout=60)
        assert wait_for(lambda: not alive(worker))
    finally:
        parent.kill()
        parent.wait()


def wait_for(condition: Any) -> bool:
    for _ in range(600):
        if condition():
            return True
        time.sleep(0.1)
    return False


def test_memory_of_a_session_counts_its_own_processes_only() -> None:
    assert session_memory(os.getsid(0)) > 1_000_000
    assert session_memory(2**22 + 1) == 0


@pytest.mark.parametrize("options", [{"timeout_s": 0}, {"memory_mb": -1.0}, {"timeout_s": "soon"}, {"timeout_s": True}])
def test_limits_that_are_no_positive_numbers_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        limits_of(options)
    assert limits_of({"timeout_s": 5}) == Limits(timeout_s=5.0)


def test_a_work_folder_is_gone_afterwards() -> None:
    seen: list[Path] = []

    def interrupted() -> None:
        with work_folder("fake") as work:
            seen.append(work)
            (work / "file").write_text("x", encoding="utf-8")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not seen[0].exists()

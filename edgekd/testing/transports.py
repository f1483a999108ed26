"""What every transport must do, as a suite of tests that those of a new one subclass."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgekd.contracts import EndState, JobState, Transport
from edgekd.errors import DeviceError, InputError

WAIT_S = 20.0
"""How long a test waits for what should come at once, in seconds."""


class TransportContract:
    """Subclass it as `TestMyTransport` and write `make`; the tests come with it. The device needs `sh`, `cat`, `grep`, `printf`, `sleep` and `ls`."""

    def make(self, tmp_path: Path) -> Transport:
        """A new, unopened transport; every call leads to the same work folder of the same device."""
        raise NotImplementedError

    @pytest.fixture
    def transport(self, tmp_path: Path) -> Iterator[Transport]:
        transport = self.make(tmp_path)
        transport.open()
        yield transport
        transport.close()

    def ended(self, transport: Transport, job: str) -> JobState:
        deadline = time.monotonic() + WAIT_S
        while (state := transport.poll(job)).running:
            assert time.monotonic() < deadline, "the job did not end"
            time.sleep(0.02)
        return state

    def first_line(self, transport: Transport, job: str) -> str:
        deadline = time.monotonic() + WAIT_S
        while not (lines := transport.poll(job).lines):
            assert time.monotonic() < deadline, "the job wrote nothing"
            time.sleep(0.02)
        return lines[0]

    def gone(self, transport: Transport, pid: str) -> bool:
        """Whether a process of the device ends soon; a zombie that nobody has collected yet counts as ended."""
        ended = f"! kill -0 {int(pid)} 2>/dev/null || grep -q '^State:.Z' /proc/{int(pid)}/status"
        deadline = time.monotonic() + WAIT_S
        while transport.run(["sh", "-c", ended], timeout_s=WAIT_S).code != 0:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    # ---- commands

    def test_transport_fulfils_protocol(self, transport: Transport) -> None:
        assert isinstance(transport, Transport)
        assert Path(transport.workdir).is_absolute()

    def test_run_gives_output_of_both_streams(self, transport: Transport) -> None:
        done = transport.run(["sh", "-c", "echo out; echo err >&2"], timeout_s=WAIT_S)
        assert (done.state, done.code, done.stdout, done.stderr) == (EndState.EXITED, 0, b"out\n", b"err\n")

    @pytest.mark.parametrize("code", [1, 37, 255])
    def test_run_gives_exit_code_when_command_fails(self, transport: Transport, code: int) -> None:
        done = transport.run(["sh", "-c", f"exit {code}"], timeout_s=WAIT_S)
        assert (done.state, done.code) == (EndState.EXITED, code)

    def test_run_tells_signal_from_exit_code(self, transport: Transport) -> None:
        done = transport.run(["sh", "-c", "kill -9 $$"], timeout_s=WAIT_S)
        assert (done.state, done.code) == (EndState.SIGNALLED, 9)

    def test_run_exits_with_127_when_program_is_missing(self, transport: Transport) -> None:
        done = transport.run(["no-such-program-here"], timeout_s=WAIT_S)
        assert (done.state, done.code) == (EndState.EXITED, 127)
        assert b"no-such-program-here" in done.stderr

    def test_run_ends_command_and_children_at_deadline(self, transport: Transport) -> None:
        done = transport.run(["sh", "-c", "sleep 321 & echo $!; wait"], timeout_s=0.5)
        assert done.state is EndState.TIMEOUT
        assert self.gone(transport, done.stdout.decode())

    def test_run_passes_binary_through(self, transport: Transport) -> None:
        data = bytes(range(256)) * 300 + b"\r\n\x00\xff"
        assert transport.run(["cat"], timeout_s=WAIT_S, stdin=data).stdout == data

    def test_run_passes_words_as_they_are(self, transport: Transport) -> None:
        words = ["two words", "it's", 'say "hi"', "$HOME", "a;b", "*", "back\\slash", "", "ünïcode", "new\nline"]
        done = transport.run(["printf", "%s|", *words], timeout_s=WAIT_S)
        assert done.stdout.decode() == "".join(f"{word}|" for word in words)

    def test_run_starts_in_workdir(self, transport: Transport) -> None:
        done = transport.run(["sh", "-c", "pwd -P"], timeout_s=WAIT_S)
        same = transport.run(["sh", "-c", 'cd "$1" && pwd -P', "sh", transport.workdir], timeout_s=WAIT_S)
        assert done.stdout == same.stdout != b""

    def test_run_refuses_text_in_place_of_words(self, transport: Transport) -> None:
        with pytest.raises(InputError, match="list of words"):
            transport.run("echo hi", timeout_s=WAIT_S)

    # ---- files

    def test_push_and_pull_return_same_bytes(self, transport: Transport, tmp_path: Path) -> None:
        source, back = tmp_path / "source", tmp_path / "deep" / "back"
        source.write_bytes(bytes(range(256)) * 1000)
        transport.push(source, "some/folder/file.bin")
        transport.pull("some/folder/file.bin", back)
        assert back.read_bytes() == source.read_bytes()

    def test_push_sends_nothing_when_file_is_there(self, transport: Transport, tmp_path: Path) -> None:
        source = tmp_path / "source"
        source.write_bytes(b"first")
        number = ["ls", "-i", "kept"]
        transport.push(source, "kept")
        before = transport.run(number, timeout_s=WAIT_S).stdout
        transport.push(source, "kept")
        assert transport.run(number, timeout_s=WAIT_S).stdout == before
        source.write_bytes(b"other")
        transport.push(source, "kept")
        assert transport.run(["cat", "kept"], timeout_s=WAIT_S).stdout == b"other"

    def test_push_refuses_missing_file(self, transport: Transport, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="does not exist"):
            transport.push(tmp_path / "nothing", "x")

    def test_pull_leaves_old_file_when_remote_is_missing(self, transport: Transport, tmp_path: Path) -> None:
        old = tmp_path / "old"
        old.write_bytes(b"old")
        with pytest.raises(DeviceError, match="does not exist"):
            transport.pull("nothing", old)
        assert old.read_bytes() == b"old"

    @pytest.mark.parametrize("path", ["../out", "/etc/passwd", "a/../../b", ""])
    def test_paths_outside_workdir_are_refused(self, transport: Transport, tmp_path: Path, path: str) -> None:
        source = tmp_path / "source"
        source.write_bytes(b"x")
        with pytest.raises(InputError, match="below its work folder"):
            transport.push(source, path)
        with pytest.raises(InputError, match="below its work folder"):
            transport.remove(path)

    def test_remove_takes_files_and_folders_and_nothing(self, transport: Transport, tmp_path: Path) -> None:
        source = tmp_path / "source"
        source.write_bytes(b"x")
        transport.push(source, "gone/deep/file")
        transport.remove("gone/deep/file")
        transport.remove("gone")
        transport.remove("gone")
        assert transport.run(["ls", "gone"], timeout_s=WAIT_S).code != 0

    # ---- detached jobs

    def test_job_gives_lines_and_end(self, transport: Transport) -> None:
        transport.start("lines", ["sh", "-c", "printf 'one\\ntwo words\\ncut off'; echo bad >&2; exit 5"])
        state = self.ended(transport, "lines")
        assert state.lines == ("one", "two words")
        assert state.end is not None
        assert (state.end.state, state.end.code) == (EndState.EXITED, 5)
        assert (state.end.stdout, state.end.stderr) == (b"one\ntwo words\ncut off", b"bad\n")

    def test_job_reports_lines_while_it_runs(self, transport: Transport) -> None:
        transport.start("talks", ["sh", "-c", "echo first; sleep 300"])
        assert self.first_line(transport, "talks") == "first"
        state = transport.poll("talks")
        assert state.running
        assert state.end is None
        transport.kill("talks")

    def test_job_is_signalled_when_it_is_killed_from_outside(self, transport: Transport) -> None:
        transport.start("victim", ["sh", "-c", "kill -9 $$"])
        end = self.ended(transport, "victim").end
        assert end is not None
        assert (end.state, end.code) == (EndState.SIGNALLED, 9)

    def test_kill_ends_job_and_children(self, transport: Transport) -> None:
        transport.start("family", ["sh", "-c", "sleep 321 & echo $!; wait"])
        child = self.first_line(transport, "family")
        transport.kill("family")
        state = transport.poll("family")
        assert not state.running
        assert state.end is not None
        assert state.end.state is EndState.SIGNALLED
        assert self.gone(transport, child)

    def test_kill_does_nothing_when_job_has_ended(self, transport: Transport) -> None:
        transport.start("done", ["true"])
        self.ended(transport, "done")
        transport.kill("done")
        end = transport.poll("done").end
        assert end is not None
        assert (end.state, end.code) == (EndState.EXITED, 0)

    def test_job_name_is_free_again_after_removal(self, transport: Transport) -> None:
        transport.start("again", ["echo", "first"])
        self.ended(transport, "again")
        with pytest.raises(DeviceError, match="exists already"):
            transport.start("again", ["echo", "second"])
        transport.remove("jobs/again")
        with pytest.raises(DeviceError, match="no job called"):
            transport.poll("again")
        transport.start("again", ["echo", "third"])
        assert self.ended(transport, "again").lines == ("third",)

    def test_unknown_job_is_device_error(self, transport: Transport) -> None:
        with pytest.raises(DeviceError, match="no job called"):
            transport.poll("nobody")
        with pytest.raises(DeviceError, match="no job called"):
            transport.kill("nobody")

    def test_job_outlives_closed_transport(self, transport: Transport, tmp_path: Path) -> None:
        transport.start("outlives", ["sh", "-c", "echo early; sleep 0.5; echo late"])
        transport.close()
        other = self.make(tmp_path)
        other.open()
        state = self.ended(other, "outlives")
        other.close()
        transport.open()
        assert state.lines == ("early", "late")

    def test_job_names_its_owner(self, transport: Transport, tmp_path: Path) -> None:
        transport.start("owned", ["true"])
        transport.pull("jobs/owned/owner.json", tmp_path / "owner.json")
        assert set(json.loads((tmp_path / "owner.json").read_text())) == {"place", "pid", "start"}

    def test_reap_leaves_jobs_of_living_host(self, transport: Transport) -> None:
        transport.start("mine", ["sh", "-c", "echo up; sleep 300"])
        assert "mine" not in transport.reap()
        assert transport.poll("mine").running
        transport.kill("mine")

    def test_reap_ends_and_forgets_jobs_of_dead_host(self, transport: Transport, tmp_path: Path) -> None:
        transport.start("orphan", ["sh", "-c", "echo $$; sleep 321"])
        pid = self.first_line(transport, "orphan")
        transport.pull("jobs/orphan/owner.json", tmp_path / "owner.json")
        owner = json.loads((tmp_path / "owner.json").read_text())
        (tmp_path / "owner.json").write_text(json.dumps({**owner, "start": owner["start"] - 1}))  # an earlier process of this number: it is dead
        transport.push(tmp_path / "owner.json", "jobs/orphan/owner.json")
        assert transport.reap() == ("orphan",)
        assert self.gone(transport, pid)
        with pytest.raises(DeviceError, match="no job called"):
            transport.poll("orphan")

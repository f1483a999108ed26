"""The local transport passes the suite of transports, and keeps what is special about it."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from edgekd import registry
from edgekd.contracts import EndState, Transport
from edgekd.errors import DeviceError, InputError, ProfileError
from edgekd.records import Profile, TransportConfig
from edgekd.testing import TransportContract

ROOT = Path(__file__).resolve().parents[2]
WAIT_S = 20.0
HOST = """
import sys, time
from edgekd import registry
from edgekd.records import Profile, TransportConfig
transport = registry.load("transports", "local")(Profile(name="t", description="t", transport=TransportConfig(workdir=sys.argv[1])))
transport.open()
transport.start("left", ["sh", "-c", "echo $$; sleep 0.5; echo late; sleep 321"])
print("started", flush=True)
time.sleep(300)
"""


def local(workdir: Path | str) -> Transport:
    transport: Transport = registry.load("transports", "local")(Profile(name="t", description="t", transport=TransportConfig(workdir=str(workdir))))
    return transport


class TestLocalTransport(TransportContract):
    def make(self, tmp_path: Path) -> Transport:
        return local(tmp_path / "device")

    def test_workdir_is_private(self, transport: Transport) -> None:
        assert stat.S_IMODE(os.stat(transport.workdir).st_mode) == 0o700

    def test_workdir_is_made_for_this_user_when_profile_names_none(self) -> None:
        transport = local("")
        transport.open()
        assert os.stat(transport.workdir).st_uid == os.getuid()
        assert stat.S_IMODE(os.stat(transport.workdir).st_mode) == 0o700
        transport.close()

    def test_open_refuses_link_as_workdir(self, tmp_path: Path) -> None:
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to(tmp_path / "real")
        with pytest.raises(ProfileError, match=r"transport\.workdir"):
            local(tmp_path / "link").open()

    def test_open_refuses_file_as_workdir(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_bytes(b"")
        with pytest.raises(ProfileError, match=r"transport\.workdir"):
            local(tmp_path / "file").open()

    def test_closed_transport_refuses_work(self, tmp_path: Path) -> None:
        with pytest.raises(DeviceError, match="not open"):
            local(tmp_path).run(["true"], timeout_s=1.0)

    @pytest.mark.parametrize("name", ["", "a/b", "..", "a b", ".x"])
    def test_job_name_is_refused_when_it_could_leave_its_folder(self, transport: Transport, name: str) -> None:
        with pytest.raises(InputError, match="job's name"):
            transport.start(name, ["true"])

    def test_job_exits_with_127_when_program_is_missing(self, transport: Transport) -> None:
        transport.start("missing", ["no-such-program-here"])
        end = self.ended(transport, "missing").end
        assert end is not None
        assert (end.state, end.code) == (EndState.EXITED, 127)
        assert b"no-such-program-here" in end.stderr

    def test_job_is_lost_when_its_supervisor_dies(self, transport: Transport) -> None:
        transport.start("lost", ["sh", "-c", "echo $$; sleep 321"])
        pid = self.first_line(transport, "lost")
        record = json.loads((Path(transport.workdir) / "jobs" / "lost" / "pid.json").read_text())
        os.kill(record["supervisor"], signal.SIGKILL)
        end = self.ended(transport, "lost").end
        assert end is not None
        assert end.state is EndState.LOST
        transport.kill("lost")
        assert self.gone(transport, pid)

    def test_kill_spares_process_that_got_the_number_later(self, transport: Transport) -> None:
        transport.start("reused", ["true"])
        self.ended(transport, "reused")
        with subprocess.Popen(["sleep", "321"], start_new_session=True) as other:
            path = Path(transport.workdir) / "jobs" / "reused" / "pid.json"
            path.write_text(json.dumps({**json.loads(path.read_text()), "pgid": other.pid, "start": 1}))
            transport.kill("reused")
            time.sleep(0.1)
            assert other.poll() is None
            other.kill()

    def test_job_of_killed_host_goes_on_and_is_reaped(self, transport: Transport) -> None:
        host = subprocess.Popen([sys.executable, "-c", HOST, transport.workdir], stdout=subprocess.PIPE, cwd=ROOT, start_new_session=True)
        with host:
            assert host.stdout is not None
            assert host.stdout.readline() == b"started\n"
            os.killpg(host.pid, signal.SIGKILL)
        deadline = time.monotonic() + WAIT_S
        while len(lines := transport.poll("left").lines) < 2:
            assert time.monotonic() < deadline, "the job died with its host"
            time.sleep(0.02)
        assert lines[1] == "late"
        assert transport.reap() == ("left",)
        assert self.gone(transport, lines[0])

    def test_interrupted_run_leaves_no_process(self, transport: Transport, tmp_path: Path) -> None:
        script = HOST.replace('transport.start("left", ["sh", "-c", "echo $$; sleep 0.5; echo late; sleep 321"])', "").replace(
            "time.sleep(300)", 'transport.run(["sh", "-c", "echo $$ > pid; sleep 321"], timeout_s=300.0)'
        )
        with subprocess.Popen([sys.executable, "-c", script, transport.workdir], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=ROOT) as host:
            pid = Path(transport.workdir) / "pid"
            deadline = time.monotonic() + WAIT_S
            while not (pid.exists() and pid.read_text().strip()):
                assert time.monotonic() < deadline
                time.sleep(0.02)
            host.send_signal(signal.SIGINT)
            _, err = host.communicate(timeout=WAIT_S)
        assert b"KeyboardInterrupt" in err
        assert self.gone(transport, pid.read_text())

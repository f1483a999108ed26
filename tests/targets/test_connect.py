"""Connecting: what is open when, what is closed on an error, and what a wrong profile says."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import edgekd
from edgekd.errors import ConfigError, DeviceError, ProfileError
from edgekd.settings.profile_file import load_profile
from edgekd.target import LiveTarget, hardware_text

RECORDER = """
from edgekd.errors import DeviceError
from edgekd.records import Capabilities, Fingerprint, Format, Precision, Snapshot

CALLS = []


class Way:
    name = "recorder"
    workdir = "/"

    def __init__(self, profile):
        self.profile = profile

    def open(self):
        CALLS.append("transport open")
        if self.profile.transport.host == "unplugged":
            raise DeviceError("the wire is not there")

    def close(self):
        CALLS.append("transport close")

    run = push = pull = remove = start = poll = kill = reap = None


class Machine:
    name = "recorder"

    def __init__(self, profile, transport):
        self.profile = profile
        self.transport = transport

    def open(self):
        CALLS.append("runtime open")
        if self.profile.runtime.options.get("broken"):
            raise DeviceError("no runtime on the device")

    def close(self):
        CALLS.append("runtime close")
        if self.profile.runtime.options.get("stuck"):
            raise DeviceError("the runtime does not end")

    def capabilities(self):
        return Capabilities(formats=(Format.ONNX,), precisions=(Precision.FP32,), simulated="fake")

    def fingerprint(self):
        return Fingerprint(fields={"cpu_model": "wire", "runtime_version": "3"})

    def snapshot(self):
        return Snapshot()

    supports = compile = benchmark = infer = op_times = None
"""
PROFILE = """
description = "a fake wire"
identity = ["cpu_model", "runtime", "threads"]
transport.kind = "recorder"
runtime = { kind = "recorder", threads = 2, precisions = ["fp32"] }
"""


@pytest.fixture
def recorder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A third party's transport and runtime on disk, as pip leaves them, and a profile that names them."""
    (tmp_path / "edgekd_recorder.py").write_text(RECORDER, encoding="utf-8")
    info = tmp_path / "edgekd_recorder-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: edgekd-recorder\nVersion: 1.0\n", encoding="utf-8")
    entries = "[edgekd.transports]\nrecorder = edgekd_recorder:Way\n[edgekd.runtimes]\nrecorder = edgekd_recorder:Machine\n"
    (info / "entry_points.txt").write_text(entries, encoding="utf-8")
    (tmp_path / "wire.toml").write_text(PROFILE, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path / "wire.toml"
    sys.modules.pop("edgekd_recorder", None)


def calls() -> list[str]:
    found: list[str] = sys.modules["edgekd_recorder"].CALLS
    return found


def test_connect_opens_nothing_before_the_block(recorder: Path) -> None:
    target = edgekd.connect(recorder)
    assert (target.name, target.profile.runtime.threads, calls()) == ("wire", 2, [])
    with pytest.raises(ConfigError, match="before it is open"):
        _ = target.fingerprint
    with pytest.raises(ConfigError, match="before it is open"):
        _ = target.simulated
    with target as same:
        assert same is target
        assert calls() == ["transport open", "runtime open"]
        assert target.simulated == "fake"
    assert calls() == ["transport open", "runtime open", "runtime close", "transport close"]


def test_the_fingerprint_always_holds_runtime_version_and_threads(recorder: Path) -> None:
    with edgekd.connect(recorder) as target:
        assert target.fingerprint.fields == {"cpu_model": "wire", "runtime": "recorder", "runtime_version": "3", "threads": "2"}


def test_an_error_inside_the_block_closes_in_reverse(recorder: Path) -> None:
    def interrupted() -> None:
        with edgekd.connect(recorder):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert calls()[-2:] == ["runtime close", "transport close"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("transport.host=unplugged", ["transport open", "transport close"]),
        ("runtime.options.broken=true", ["transport open", "runtime open", "runtime close", "transport close"]),
    ],
)
def test_a_failed_open_leaves_nothing_open(recorder: Path, override: str, expected: list[str]) -> None:
    target = edgekd.connect(recorder, overrides=(override,))
    with pytest.raises(DeviceError):
        target.open()
    assert calls() == expected
    target.close()
    assert calls() == expected


def test_the_transport_is_closed_even_if_the_runtime_does_not_end(recorder: Path) -> None:
    target = edgekd.connect(recorder, overrides=("runtime.options.stuck=true",)).open()
    with pytest.raises(DeviceError, match="does not end"):
        target.close()
    assert calls()[-1] == "transport close"


def test_a_target_opens_again_after_closing_and_not_twice(recorder: Path) -> None:
    target = edgekd.connect(recorder)
    for _ in range(2):
        with target, pytest.raises(ConfigError, match="open already"):
            target.open()
    assert calls().count("transport open") == calls().count("transport close") == 2


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ('runtime.precisions=["int8"]', ("int8", "fp32", "runtime.precisions")),
        ('identity=["cpu_modle"]', ("cpu_modle", "cpu_model (did you mean this?)")),
        ("transport.kind=recoder", ("recoder", "recorder (did you mean this?)")),
        ("runtime.kind=onxruntime", ("onxruntime", "onnxruntime (did you mean this?)")),
    ],
)
def test_what_the_target_does_not_have_is_a_profile_error(recorder: Path, override: str, says: tuple[str, ...]) -> None:
    with pytest.raises(ProfileError) as caught:
        edgekd.connect(recorder, overrides=(override,)).open()
    for text in says:
        assert text in str(caught.value)


def test_connect_takes_a_record_and_overrides_it() -> None:
    target = edgekd.connect(load_profile("null"), overrides={"runtime.threads": 3})
    assert isinstance(target, LiveTarget)
    assert target.profile.runtime.threads == 3


def test_the_null_target_says_simulated() -> None:
    with edgekd.connect("null") as target:
        assert target.simulated == "null"
        assert target.runtime.name == "null"
        assert set(target.profile.identity) <= set(target.fingerprint.fields)


def test_proof_on_hardware_follows_from_the_device_and_not_from_the_profile_alone() -> None:
    with edgekd.connect("local") as target:
        fields = target.fingerprint.fields
        isa = fields["isa"].split()
        cases = {
            f"{fields['machine']} {' '.join(isa)}": True,
            fields["machine"]: True,
            f"{fields['machine']} no-such-set": False,
            "no-such-machine": False,
        }
    for fact, proven in cases.items():
        with edgekd.connect("local", overrides={"proven_on": ["another avx", fact]}) as target:
            assert target.capabilities.proven_on_hardware is proven
            text = hardware_text(target.profile, target)
        assert text.startswith("yes" if proven else "never ran on real hardware of this kind")
        assert proven or fields["machine"] in text
    with edgekd.connect("null", overrides={"proven_on": [fields["machine"]]}) as simulated:
        assert not simulated.capabilities.proven_on_hardware
        assert hardware_text(simulated.profile, simulated) == "never ran on real hardware"

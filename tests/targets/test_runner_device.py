"""What the on-device runner reads off a device, and what its ONNX Runtime back end reads off a profile and a message."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

TARGETS = Path(__file__).resolve().parents[2] / "targets"

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
def device() -> dict[str, Any]:
    return runpy.run_path(str(TARGETS / "runner_device.py"))


@pytest.fixture(scope="module")
def backend() -> dict[str, Any]:
    return runpy.run_path(str(TARGETS / "runner_onnxruntime.py"))


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

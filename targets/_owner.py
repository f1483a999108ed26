"""Who started a job on a device: enough to tell, on the host that did, whether that process still lives."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path


def start_ticks(pid: int) -> int | None:
    """When a process of this machine started, in clock ticks since boot (man 5 proc), or `None` if it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in "ZX" else int(fields[19])


def place() -> str:
    """What makes process numbers comparable: this host, this boot, this namespace of processes."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{socket.gethostname()} {boot} {os.readlink('/proc/self/ns/pid')}"


def owner_text() -> str:
    """This process as JSON text, for `jobs/<job>/owner.json` on the device."""
    return json.dumps({"place": place(), "pid": os.getpid(), "start": start_ticks(os.getpid())}, sort_keys=True)


def owner_state(text: str) -> str:
    """`self`, `alive`, `dead`, or `foreign` (another host or container, of which nothing is known here)."""
    owner = json.loads(text)
    if owner["place"] != place():
        return "dead" if owner["place"].split()[0] == place().split()[0] and owner["place"].split()[1] != place().split()[1] else "foreign"
    if owner["pid"] == os.getpid() and owner["start"] == start_ticks(os.getpid()):
        return "self"
    return "alive" if start_ticks(owner["pid"]) == owner["start"] else "dead"

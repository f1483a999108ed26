"""Starts one detached job and writes down how it ended; run as `python _supervise.py FOLDER CWD WORD...` with the standard library only.

The first process returns as soon as the job runs (0) or could not be set up (1). A second one, in a session of its own, waits for
the job. In FOLDER it leaves `pid.json` (process group of the job, this supervisor, when both started), `stdout`, `stderr` and, last
and whole, `end.json`: `{"state": "exited" | "signalled", "code": N}`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping


def write_whole(path: str, value: Mapping[str, object]) -> None:
    """Write JSON so that a reader sees all of it or no file."""
    with open(path + ".part", "w", encoding="utf-8") as stream:
        json.dump(value, stream)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(path + ".part", path)


def start_ticks(pid: int) -> int:
    """When a process started, in clock ticks since boot (man 5 proc)."""
    with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as stream:
        return int(stream.read().rpartition(")")[2].split()[19])


def supervise(folder: str, cwd: str, words: list[str], started: int) -> None:
    """Run the job to its end."""
    with open(os.path.join(folder, "stdout"), "wb") as out, open(os.path.join(folder, "stderr"), "wb") as err:
        try:
            job = subprocess.Popen(words, cwd=cwd, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True)
        except OSError as error:
            err.write(f"{words[0]}: {error.strerror}\n".encode())
            err.flush()
            write_whole(os.path.join(folder, "pid.json"), {"pgid": 0, "start": 0, "supervisor": os.getpid(), "supervisor_start": start_ticks(os.getpid())})
            write_whole(os.path.join(folder, "end.json"), {"state": "exited", "code": 127})
            os.write(started, b"1")
            return
    record = {"pgid": job.pid, "start": start_ticks(job.pid), "supervisor": os.getpid(), "supervisor_start": start_ticks(os.getpid())}
    write_whole(os.path.join(folder, "pid.json"), record)
    os.write(started, b"1")
    os.close(started)
    code = job.wait()
    write_whole(os.path.join(folder, "end.json"), {"state": "exited", "code": code} if code >= 0 else {"state": "signalled", "code": -code})


def main(words: list[str]) -> int:
    """0 once the job runs, 1 if its supervisor failed before."""
    reader, writer = os.pipe()
    if os.fork() == 0:
        os.close(reader)
        null = os.open(os.devnull, os.O_RDWR)
        for number in (0, 1, 2):
            os.dup2(null, number)
        supervise(words[0], words[1], words[2:], writer)
        return 0
    os.close(writer)
    return 0 if os.read(reader, 1) == b"1" else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

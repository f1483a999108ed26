"""Runs the resumable training in forked children and kills them (SIGKILL) at seeded moments; prints how many died before their end.

Usage: distill_killer.py FOLDER MARKER SEED KILLS, with the checkout on the module path.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from pathlib import Path

import lightning_fabric  # noqa: F401  (the children should not spend their short lives on importing)

import edgekd.distill.setup  # noqa: F401
from tests.distill.distill_cases import resumable


def killed(folder: Path, marker: Path, steps: int, delay_s: float) -> bool:
    """Start the training, kill it some time after a number of steps; whether it had not ended yet."""
    before = marker.stat().st_size if marker.exists() else 0
    child = os.fork()
    if child == 0:
        resumable(folder, marker)
        os._exit(0)
    while (marker.stat().st_size if marker.exists() else 0) < before + steps and os.waitpid(child, os.WNOHANG) == (0, 0):
        time.sleep(0.0005)
    time.sleep(delay_s)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    folder, marker = Path(sys.argv[1]), Path(sys.argv[2])
    chance = random.Random(int(sys.argv[3]))
    print(sum(killed(folder, marker, chance.randint(1, 10), chance.random() * 0.01) for _ in range(int(sys.argv[4]))))

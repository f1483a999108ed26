"""What every worker process runs: `python start.py WORKER.py REQUEST.json RESULT.json PARENT`, so that a worker is one function `work`.

`work(request)` takes the request's JSON object and gives the result's. An exception's `subject` and `hint` reach the user, if it has them.
"""

from __future__ import annotations

import ctypes
import json
import os
import runpy
import signal
import sys
import traceback
from typing import Any

TYPE = "edgekd.worker_result/1"
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_TRACED = "in user code:"


def end_with_parent(parent: int) -> None:
    """Ask the kernel to end this process when the one that started it dies, however it dies."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    if os.getppid() != parent:
        sys.exit("the process that wanted this work is gone")


def message_of(error: BaseException) -> str:
    """An error in one line, the innermost cause first. Behind TensorFlow's `in user code:` the last line says what happened."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    at = -1 if lines and lines[0] == _TRACED else 0
    return "{}: {}".format(type(error).__name__, (lines or ["(no message)"])[at][:600])


def answer(worker: str, request: dict[str, Any]) -> dict[str, Any]:
    """What the worker gave, or its error; libraries that leave by `sys.exit` have failed, whatever the code."""
    try:
        return {"type": TYPE, "result": runpy.run_path(worker, run_name="worker")["work"](request)}
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - whatever ends a library is told to the process that waits
        told = {name: str(getattr(error, name)) for name in ("subject", "hint") if getattr(error, name, None)}
        return {"type": TYPE, "error": {"message": message_of(error), "traceback": traceback.format_exc(), **told}}


def main(argv: list[str]) -> None:
    """Run the worker and write its answer whole."""
    worker, request, result, parent = argv
    end_with_parent(int(parent))
    with open(request, encoding="utf-8") as stream:
        asked = json.load(stream)
    told = json.dumps(answer(worker, asked), sort_keys=True)
    with open(result + ".part", "w", encoding="utf-8") as stream:
        stream.write(told)
    os.replace(result + ".part", result)


if __name__ == "__main__":
    main(sys.argv[1:])

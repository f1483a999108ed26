"""What identifies arrays and a stage's input (code and networks: `provenance`); never a repr, a date, a pickle or a commit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np

from edgekd.tree import to_numpy


def array_hash(arrays: Mapping[str, Any]) -> str:
    """The SHA-256 over names, dtypes, shapes and bytes of named arrays, independent of their order."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(to_numpy(arrays[name]))
        digest.update(f"{name}|{array.dtype.str}|{array.shape}|".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def stage_key(stage: str, version: int, parents: Mapping[str, str], inputs: Mapping[str, Any]) -> str:
    """The key under which a stage's output is stored: 32 hexadecimal digits.

    `parents` maps parent stages to their keys, `inputs` holds hashes, texts, numbers and records.
    """
    text = msgspec.json.encode({"stage": stage, "version": version, "parents": dict(parents), "inputs": dict(inputs)}, order="deterministic")
    return hashlib.sha256(text).hexdigest()[:32]

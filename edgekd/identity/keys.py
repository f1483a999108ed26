"""What identifies arrays and a stage's input (code and networks: `provenance`); never a repr, a date, a pickle or a commit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgekd.tree import to_numpy


def array_hash(arrays: Mapping[str, Any]) -> str:
    """The SHA-256 over names, dtypes, shapes and bytes of named arrays, independent of their order."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(to_numpy(arrays[name]))
        digest.update(f"{name}|{array.dtype.str}|{array.shape}|".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def item_digests(inputs: Mapping[str, Any]) -> NDArray[np.uint64]:
    """One 64-bit digest per item over dtypes, shapes and bytes of all its inputs in the order of their names, `(items,)`.

    The names themselves are left out: two splits may come from sources that name their input differently.
    """
    arrays = [np.ascontiguousarray(to_numpy(inputs[name])) for name in sorted(inputs)]
    heads = [f"{array.dtype.str}|{array.shape[1:]}|".encode() for array in arrays]
    out = bytearray()
    for position in range(len(arrays[0])):
        digest = hashlib.blake2b(digest_size=8)
        for head, array in zip(heads, arrays, strict=True):
            digest.update(head)
            digest.update(array[position].tobytes())
        out += digest.digest()
    return np.frombuffer(bytes(out), dtype=np.uint64)


def stage_key(stage: str, version: int, parents: Mapping[str, str], inputs: Mapping[str, Any]) -> str:
    """The key under which a stage's output is stored: 32 hexadecimal digits.

    `parents` maps parent stages to their keys, `inputs` holds hashes, texts, numbers and records.
    """
    text = msgspec.json.encode({"stage": stage, "version": version, "parents": dict(parents), "inputs": dict(inputs)}, order="deterministic")
    return hashlib.sha256(text).hexdigest()[:32]

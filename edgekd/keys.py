"""What identifies weights, code, data and a stage's input; never a repr, a date, a pickle or a commit."""

from __future__ import annotations

import hashlib
import inspect
import textwrap
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from edgekd.tree import to_numpy

if TYPE_CHECKING:
    import torch


def array_hash(arrays: Mapping[str, Any]) -> str:
    """The SHA-256 over names, dtypes, shapes and bytes of named arrays, independent of their order."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(to_numpy(arrays[name]))
        digest.update(f"{name}|{array.dtype.str}|{array.shape}|".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()


def state_hash(module: torch.nn.Module) -> str:
    """The hash of a module's parameters and buffers, with the names of its submodules' classes."""
    digest = hashlib.sha256(array_hash(module.state_dict()).encode())
    for name, child in module.named_modules():
        digest.update(f"{name}:{type(child).__module__}.{type(child).__qualname__}:{child.extra_repr()}\n".encode())
    return digest.hexdigest()


def source_hash(function: Callable[..., Any]) -> str:
    """The hash of a callable's source text, dedented; of its class if it is an object with `__call__`.

    A callable whose source cannot be read (typed at a prompt, compiled) is identified by module and name; `no-source:` marks it.
    """
    subject: Any = function
    while hasattr(subject, "__wrapped__"):
        subject = subject.__wrapped__
    if not (inspect.isfunction(subject) or inspect.ismethod(subject) or inspect.isclass(subject)):
        subject = type(subject)
    try:
        text = textwrap.dedent(inspect.getsource(subject))
    except (OSError, TypeError):
        return "no-source:" + hashlib.sha256(f"{subject.__module__}.{subject.__qualname__}".encode()).hexdigest()
    return hashlib.sha256(text.encode()).hexdigest()


def stage_key(stage: str, version: int, parents: Mapping[str, str], inputs: Mapping[str, Any]) -> str:
    """The key under which a stage's output is stored: 32 hexadecimal digits.

    `parents` maps parent stages to their keys, `inputs` holds hashes, texts, numbers and records.
    """
    text = msgspec.json.encode({"stage": stage, "version": version, "parents": dict(parents), "inputs": dict(inputs)}, order="deterministic")
    return hashlib.sha256(text).hexdigest()[:32]

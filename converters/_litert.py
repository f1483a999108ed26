"""What the LiteRT converters share: libraries kept quiet down to the file descriptors, and a host interpreter."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from edgekd.artifact import StoredArtifact
from edgekd.contracts import Array, Tensors
from edgekd.errors import ConversionRejected, DataError, MissingDependency, near_names

from ._onnx_io import Noise, captured, last_message

_TAIL = 2000
_PROGRESS = re.compile(r"^\(\d\d:\d\d\) \[|Decompositions( \(\+|$)|^MLIR Module|LeafSpec|XNNPACK delegate for CPU|_preserve_all_tensors|it/s\]|absl::|oneDNN")
"""Lines that say how far a library is, or that its authors will change something."""

RUN_ERRORS = (RuntimeError, ValueError, TypeError)
"""What the interpreter raises on a model or an input that it refuses."""


@contextlib.contextmanager
def quiet() -> Iterator[Noise]:
    """What a library prints, logs or warns inside the block is kept, not shown; that of its C++ parts too.

    File descriptors 1 and 2 are redirected for the whole process while the block runs. Everything is in `tail` afterwards.
    """
    with captured() as noise, warnings.catch_warnings(record=True) as seen, tempfile.TemporaryFile() as sink:
        warnings.simplefilter("always")
        for stream in (sys.__stdout__, sys.__stderr__):
            if stream is not None and not stream.closed:
                stream.flush()
        saved = [(fd, _duplicate(fd)) for fd in (1, 2)]
        for fd, copy in saved:
            if copy is not None:
                os.dup2(sink.fileno(), fd)
        try:
            yield noise
        finally:
            for fd, copy in saved:
                if copy is not None:
                    os.dup2(copy, fd)
                    os.close(copy)
            sink.seek(0)
            noise.printed.write(sink.read().decode(errors="replace"))
            noise.warnings += [str(item.message) for item in seen]


def _duplicate(fd: int) -> int | None:
    """A copy of a descriptor, or nothing where the process runs without it."""
    try:
        return os.dup(fd)
    except OSError:
        return None


def tail(noise: Noise) -> str:
    """The last lines of what a library said besides its progress, at most 2000 characters."""
    lines = [line.strip() for line in (*noise.printed.getvalue().splitlines(), *noise.warnings, *noise.errors)]
    telling = dict.fromkeys(line for line in lines if line and not _PROGRESS.search(line))
    return " | ".join(telling)[-_TAIL:]


def blame(error: BaseException, noise: Noise, limit: int = 600) -> str:
    """A library's error as one line, followed by what it said before, at most `limit` characters of it."""
    said = tail(noise)[-limit:]
    return last_message(error) + (f" [{said}]" if said else "")


def interpreter(model: StoredArtifact, *, taps: bool = False) -> Any:
    """An interpreter with allocated tensors, one thread. With `taps` every tensor can be read, at the price of memory.

    Raises:
        MissingDependency: ai-edge-litert is not installed.
        ConversionRejected: the runtime refuses the file.
    """
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError as error:
        raise MissingDependency("ai-edge-litert", "litert", purpose="running a TFLite model") from error
    with quiet() as noise:
        try:
            made = Interpreter(model_path=str(model.entry), num_threads=1, experimental_preserve_all_tensors=taps)
            made.allocate_tensors()
        except RUN_ERRORS as error:
            raise ConversionRejected("LiteRT cannot load the model", found=blame(error, noise), hint="convert it again", subject=str(model.entry)) from error
    return made


def host_infer(model: StoredArtifact, inputs: Tensors, taps: Sequence[str] = ()) -> dict[str, Array]:
    """Outputs and tapped tensors for all samples, `(samples, ...)`, by LiteRT in this process, one thread, one by one.

    Inputs are laid out as in the artifact's IOSpec. Taps are tensors of the file by name; quantized ones come as float32 values.

    Raises:
        DataError: an input is missing, has another shape, or whole numbers that do not fit the file's type.
        ConversionRejected: the runtime fails on the model.
    """
    runner = interpreter(model, taps=bool(taps))
    details = {item["name"]: item for item in runner.get_tensor_details()}
    unknown = sorted(set(taps) - set(details))
    if unknown:
        raise DataError(f"the model has no tensor {unknown[0]!r}", allowed=near_names(unknown[0], details)[:300], subject=unknown[0])
    feeds, wanted = _borders(runner)
    order = [tensor.name for tensor in model.record.iospec.outputs if tensor.name in wanted]
    wanted = {name: wanted[name] for name in (*order, *wanted)} | {name: details[name]["index"] for name in taps}
    by_index = {item["index"]: item for item in details.values()}
    by_index |= {item["index"]: item for item in (*runner.get_input_details(), *runner.get_output_details())}
    missing = sorted(set(feeds) - set(inputs))
    if missing:
        raise DataError(f"the input {missing[0]!r} is missing", found=sorted(inputs), hint="give one batch for every input", subject=missing[0])
    parts: dict[str, list[Array]] = {name: [] for name in wanted}
    ready = {name: _as_dtype(name, np.asarray(inputs[name]), by_index[index]["dtype"]) for name, index in feeds.items()}
    with quiet() as noise:
        for position in range(len(next(iter(ready.values())))):
            try:
                for name, index in feeds.items():
                    runner.set_tensor(index, np.ascontiguousarray(ready[name][position : position + 1]))
                runner.invoke()
                for name, index in wanted.items():
                    parts[name].append(_values(runner.get_tensor(index), by_index[index]))
            except RUN_ERRORS as error:
                raise ConversionRejected(
                    "LiteRT fails on the model", found=blame(error, noise), hint="check the shapes of its inputs", subject=str(model.entry)
                ) from error
    return {name: np.concatenate(pieces) for name, pieces in parts.items()}


def _borders(runner: Any) -> tuple[dict[str, int], dict[str, int]]:
    """Inputs and outputs by name, with their tensors: names of the first signature, or of the tensors where there is none."""
    signatures = runner._get_full_signature_list()
    if signatures:
        first = next(iter(signatures.values()))
        return dict(first["inputs"]), dict(first["outputs"])
    return {item["name"]: item["index"] for item in runner.get_input_details()}, {item["name"]: item["index"] for item in runner.get_output_details()}


def _as_dtype(name: str, array: Array, dtype: Any) -> Array:
    """The array in the file's type: whole numbers must keep their values, floats must be floats."""
    if array.dtype == dtype:
        return array
    same_kind = array.dtype.kind in "iub" and np.dtype(dtype).kind in "iub"
    cast = array.astype(dtype)
    if (same_kind and np.array_equal(cast, array)) or (array.dtype.kind == "f" and np.dtype(dtype).kind == "f"):
        return cast
    raise DataError(f"the input {name!r} has the wrong type", found=array.dtype.name, allowed=np.dtype(dtype).name, subject=name)


def _values(array: Array, detail: dict[str, Any]) -> Array:
    """A tensor's values with a sample axis; quantized ones as real numbers."""
    scales, zeros = detail["quantization_parameters"]["scales"], detail["quantization_parameters"]["zero_points"]
    if len(scales) == 1 and array.dtype.kind in "iu":
        array = ((array.astype(np.float32) - np.float32(zeros[0])) * np.float32(scales[0])).astype(np.float32)
    return array.copy() if array.ndim and array.shape[0] == 1 else array[None].copy()

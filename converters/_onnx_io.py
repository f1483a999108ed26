"""What the ONNX converters share: quiet libraries, versions of producers and a host session."""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import logging
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from edgekd.artifact import StoredArtifact
from edgekd.contracts import Array, Tensors
from edgekd.errors import ConversionRejected, DataError, MissingDependency
from edgekd.models.onnx_file import load_model, require_onnx
from edgekd.teachers import ort_errors


class Noise(logging.Handler):
    """Everything a library printed or logged while it was held: `text()` and the messages of errors it swallowed."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.printed = io.StringIO()
        self.errors: list[str] = []
        self.warnings: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the record."""
        (self.errors if record.levelno >= logging.ERROR else self.warnings).append(record.getMessage())


@contextlib.contextmanager
def captured() -> Iterator[Noise]:
    """What a library prints or logs inside the block is kept, not shown; handlers are as before afterwards.

    Python-level output only, for the whole process while the block runs.
    """
    noise = Noise()
    root = logging.getLogger()
    named = [item for item in logging.root.manager.loggerDict.values() if isinstance(item, logging.Logger) and item.handlers]
    saved = [(logger, logger.handlers[:]) for logger in (root, *named)]
    for logger, _ in saved:
        logger.handlers = [noise]
    try:
        with contextlib.redirect_stdout(noise.printed), contextlib.redirect_stderr(noise.printed):
            yield noise
    finally:
        for logger, handlers in saved:
            logger.handlers = handlers


def versions(*packages: str) -> dict[str, str]:
    """The installed versions of `packages`, by name; absent ones are left out."""
    found = {}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


def last_message(error: BaseException) -> str:
    """The innermost cause of a library's error, as one line without its stack."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    kept = [line for line in lines if not line.startswith(("File ", "Traceback", "⬆", "⬇", "While executing", "Original traceback"))]
    return f"{type(error).__name__}: {(kept or lines or [''])[0][:300]}"


def plain_session(model: Any) -> Any:
    """A session of a model in this process, unoptimized, one thread.

    Raises:
        MissingDependency: onnxruntime is not installed.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise MissingDependency("onnxruntime", "x86", purpose="running an ONNX model") from error
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def host_infer(model: StoredArtifact, inputs: Tensors, taps: Sequence[str] = ()) -> dict[str, Array]:
    """Outputs and tapped tensors for all samples, `(samples, ...)`, by onnxruntime in this process, unoptimized, one thread, one by one.

    Raises:
        MissingDependency: onnx or onnxruntime is not installed. DataError: an input is missing.
        ConversionRejected: onnxruntime does not load or run the model; names the operator or the input as its message does.
    """
    onnx = require_onnx("running an ONNX model")
    proto = load_model(model.entry)
    present = {item.name for item in proto.graph.output}
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in taps if name not in present)
    try:
        session = plain_session(proto)
        names = [item.name for item in session.get_outputs()]
        wanted = [item.name for item in session.get_inputs()]
        missing = sorted(set(wanted) - set(inputs))
        if missing:
            raise DataError(f"the input {missing[0]!r} is missing", found=sorted(inputs), hint="give one batch for every input", subject=missing[0])
        parts: dict[str, list[Array]] = {name: [] for name in names}
        for position in range(len(next(iter(inputs.values())))):
            feed = {name: np.ascontiguousarray(inputs[name][position : position + 1]) for name in wanted}
            for name, value in zip(names, session.run(names, feed), strict=True):
                part = np.asarray(value)
                parts[name].append(part if part.ndim and part.shape[0] == 1 else part[None])
    except ort_errors() as error:
        raise ConversionRejected(
            "onnxruntime does not run the model on this host", found=last_message(error), hint="check its operators and inputs", subject=str(model.entry)
        ) from error
    return {name: np.concatenate(pieces) for name, pieces in parts.items()}

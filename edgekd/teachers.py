"""One face for every kind of teacher: a torch module, an exported program, an ONNX file, or any callable."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.contracts import Array, Teacher, Tensors
from edgekd.errors import MissingDependency, ModelError
from edgekd.provenance import architecture_hash, code_hash
from edgekd.storage import sha256_file
from edgekd.tree import flatten_outputs, to_numpy

if TYPE_CHECKING:
    import torch

_CHUNK = 256


def _chunks(inputs: Tensors) -> list[dict[str, Array]]:
    count = len(next(iter(inputs.values())))
    return [{name: value[start : start + _CHUNK] for name, value in inputs.items()} for start in range(0, count, _CHUNK)]


def _joined(parts: Sequence[dict[str, Array]]) -> dict[str, Array]:
    import numpy as np

    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def forward_names(module: torch.nn.Module) -> tuple[str, ...]:
    """The names of a module's forward arguments that have no default, in order; empty when they cannot be told (`*args`)."""
    names = []
    for parameter in inspect.signature(module.forward).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            return ()
        if parameter.default is parameter.empty:
            names.append(parameter.name)
    return tuple(names)


class TorchTeacher:
    """A teacher that is a torch module; runs in evaluation mode and restores the mode it found."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.name = type(module).__name__
        self.module: torch.nn.Module | None = module
        self._module = module

    def outputs(self, inputs: Tensors) -> dict[str, Array]:
        import torch

        was_training = self._module.training
        self._module.eval()
        try:
            parts = []
            with torch.no_grad():
                for chunk in _chunks(inputs):
                    try:
                        raw = self._module(*(torch.from_numpy(value) for value in chunk.values()))
                    except (RuntimeError, TypeError, ValueError, IndexError) as error:
                        shapes = {name: tuple(value.shape) for name, value in chunk.items()}
                        raise ModelError(
                            f"the teacher {self.name} does not accept the data",
                            found=f"inputs {shapes}: {str(error).splitlines()[0]}",
                            hint="check the shape of the items and the order of the inputs",
                            subject=self.name,
                        ) from error
                    parts.append({name: to_numpy(value) for name, value in flatten_outputs(raw).items()})
        finally:
            self._module.train(was_training)
        return _joined(parts)

    def weights_hash(self) -> str:
        return architecture_hash(self._module)


class OnnxTeacher:
    """A teacher that is an ONNX file; runs on the host's CPU with ONNX Runtime, sample by sample if its batch axis is fixed at 1."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ModelError("the teacher's ONNX file does not exist", found=str(path), hint="check the path", subject=path)
        self.name = path.stem
        self.module: torch.nn.Module | None = None
        self.path = path
        self._session: Any = None

    def _open(self) -> Any:
        if self._session is None:
            try:
                import onnxruntime as ort
            except ImportError as error:
                raise MissingDependency("onnxruntime", "x86", purpose="an ONNX teacher") from error
            options = ort.SessionOptions()
            options.log_severity_level = 3
            options.intra_op_num_threads = 1
            try:
                self._session = ort.InferenceSession(str(self.path), options, providers=["CPUExecutionProvider"])
            except Exception as error:
                raise ModelError("the teacher's ONNX file cannot be run", found=str(error).splitlines()[0], subject=self.path) from error
        return self._session

    def outputs(self, inputs: Tensors) -> dict[str, Array]:
        session = self._open()
        specs = session.get_inputs()
        if sorted(spec.name for spec in specs) != sorted(inputs):
            raise ModelError("the data do not name the ONNX teacher's inputs", found=sorted(inputs), allowed=[spec.name for spec in specs])
        count = len(next(iter(inputs.values())))
        step = 1 if any(spec.shape and spec.shape[0] == 1 for spec in specs) else _CHUNK
        names = [output.name for output in session.get_outputs()]
        parts = []
        for start in range(0, count, step):
            feed = {name: value[start : start + step] for name, value in inputs.items()}
            try:
                parts.append(dict(zip(names, session.run(None, feed), strict=True)))
            except Exception as error:
                raise ModelError("the ONNX teacher does not accept the data", found=str(error).splitlines()[0], subject=self.path) from error
        return _joined(parts)

    def weights_hash(self) -> str:
        return sha256_file(self.path)


class CallableTeacher:
    """A teacher that is any callable from named arrays to outputs (an array, or a nesting of arrays)."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.name = getattr(function, "__name__", type(function).__name__)
        self.module: torch.nn.Module | None = None
        self._function = function

    def outputs(self, inputs: Tensors) -> dict[str, Array]:
        return _joined([{name: to_numpy(value) for name, value in flatten_outputs(self._function(chunk)).items()} for chunk in _chunks(inputs)])

    def weights_hash(self) -> str:
        return code_hash(self._function)


def as_teacher(teacher: Any) -> Teacher:
    """The teacher behind a torch module, a `torch.export.ExportedProgram`, the path of an ONNX file, or a callable.

    A callable gets a mapping of named arrays. An object that already fulfils `contracts.Teacher` is returned as it is.

    Raises:
        ModelError: it is none of these.
    """
    if isinstance(teacher, Teacher):
        return teacher
    if isinstance(teacher, (str, Path)):
        path = Path(teacher)
        if path.suffix != ".onnx":
            raise ModelError(
                "a teacher on file must be an ONNX file", found=str(path), allowed="*.onnx", hint="load other formats in Python and hand over the module"
            )
        return OnnxTeacher(path)
    if hasattr(teacher, "state_dict") and hasattr(teacher, "forward"):
        return TorchTeacher(teacher)
    if hasattr(teacher, "graph_signature") and callable(getattr(teacher, "module", None)):
        return TorchTeacher(teacher.module())
    if callable(teacher):
        return CallableTeacher(teacher)
    raise ModelError(
        "this cannot be a teacher", found=type(teacher).__name__, allowed="a torch module, an exported program, the path of an ONNX file, a callable"
    )

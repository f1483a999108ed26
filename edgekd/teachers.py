"""One face for every kind of teacher: a torch module, an exported program, an ONNX file, or any callable."""

from __future__ import annotations

import inspect
import uuid
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekd.contracts import Array, Teacher, Tensors
from edgekd.errors import MissingDependency, ModelError
from edgekd.identity.keys import array_hash
from edgekd.identity.provenance import architecture_hash, examine
from edgekd.models.onnx_file import file_hash
from edgekd.storage import sha256_bytes
from edgekd.tree import first_line, flatten_outputs, to_numpy

if TYPE_CHECKING:
    import torch

_CHUNK = 256
_PROCESS = uuid.uuid4().hex
"""Part of the identity of what nothing identifies: it is never found again by another process."""


MODEL_ERRORS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError, ArithmeticError)
"""What a user's model raises on inputs that it does not take, or an exporter on its way through it."""


@contextmanager
def accepted(kind: str, subject: str, inputs: Tensors, errors: tuple[type[Exception], ...] = MODEL_ERRORS) -> Iterator[None]:
    """A block in which a user's model runs on `inputs`; the model is called `kind` and `subject` in the message: the teacher Net.

    Raises:
        ModelError: it raises one of `errors`; shows the inputs.
    """
    try:
        yield
    except errors as error:
        shown = ", ".join(f"{key} {value.dtype} {tuple(value.shape)}" for key, value in inputs.items())
        raise ModelError(
            f"{kind} {subject} does not accept the data",
            found=f"inputs {shown}: {first_line(error)}",
            hint="check the shape and dtype of the items and the order of the inputs",
            subject=subject,
        ) from error


@contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """A block in which a module is in evaluation mode; afterwards every part has the mode it had."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def tensors_of(inputs: Tensors) -> tuple[torch.Tensor, ...]:
    """The inputs as tensors with memory of their own: a module may change them in place."""
    import torch

    return tuple(torch.from_numpy(value.copy()) for value in inputs.values())


def _run(name: str, inputs: Tensors, call: Callable[[dict[str, Array]], Any], *, batch: int = 0, errors: tuple[type[Exception], ...] = MODEL_ERRORS) -> Any:
    """Named outputs of all items, `(items, ...)`, by calling the model on a part at a time.

    A model whose batch is fixed gets parts of `batch` items, the last one filled up with its last item, which is cut off again.
    """
    import numpy as np

    count, step = len(next(iter(inputs.values()))), batch or _CHUNK
    parts: list[dict[str, Array]] = []
    for start in range(0, count, step):
        part = {key: value[start : start + step] for key, value in inputs.items()}
        taken = len(next(iter(part.values())))
        if taken < batch:
            part = {key: np.concatenate([value, np.repeat(value[-1:], batch - taken, axis=0)]) for key, value in part.items()}
        with accepted("the teacher", name, part, errors):
            raw = call(part)
        outputs = {key: to_numpy(value) for key, value in flatten_outputs(raw).items()}
        for key, value in outputs.items():
            if value.ndim == 0 or len(value) != max(taken, batch):
                raise ModelError(
                    f"the teacher's output {key!r} does not hold one entry per item",
                    found=f"shape {tuple(value.shape)} for {max(taken, batch)} items",
                    allowed="(items, ...)",
                    hint="leave it out of what the teacher returns",
                    subject=key,
                )
        parts.append({key: value[:taken] for key, value in outputs.items()})
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def forward_names(module: torch.nn.Module) -> tuple[str, ...]:
    """The names of a module's forward arguments that have no default, in order; empty when they cannot be told (`*args`)."""
    names = []
    for parameter in inspect.signature(module.forward).parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            return ()
        if parameter.default is parameter.empty:
            names.append(parameter.name)
    return tuple(names)


class AnsweringTeacher(ABC):
    """A teacher that is known by its content, and by its answers to a few items: whatever the content does not tell changes those."""

    name: str
    module: torch.nn.Module | None = None
    _content: str = ""
    _answers: str = ""

    @abstractmethod
    def outputs(self, inputs: Tensors) -> dict[str, Array]:
        """Named outputs of all items, `(items, ...)`."""

    @abstractmethod
    def _content_hash(self) -> str:
        """The hash of what the teacher is made of."""

    def answer(self, inputs: Tensors) -> None:
        """From now on the answers to these items are part of what identifies the teacher."""
        self._keep_content()  # before it runs: its state may change then
        self._answers = array_hash(self._repeatable(inputs))

    def _repeatable(self, inputs: Tensors) -> dict[str, Array]:
        """The outputs, bit by bit the same in each process."""
        return self.outputs(inputs)

    def _keep_content(self) -> str:
        self._content = self._content or self._content_hash()
        return self._content

    def weights_hash(self) -> str:
        """The hash of the content as it was when it was first asked for, and of the answers."""
        return sha256_bytes(" ".join([self._keep_content(), self._answers]).encode())


class _InTorch(AnsweringTeacher):
    def _repeatable(self, inputs: Tensors) -> dict[str, Array]:
        """With torch's generator seeded, and on one thread: how sums are split over threads changes their last bits."""
        import torch

        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                return self.outputs(inputs)
        finally:
            torch.set_num_threads(threads)


class TorchTeacher(_InTorch):
    """A teacher that is a torch module; runs in evaluation mode and restores the mode it found."""

    def __init__(self, module: torch.nn.Module) -> None:
        self.name = type(module).__name__
        self.module: torch.nn.Module | None = module
        self._module = module

    def outputs(self, inputs: Tensors) -> dict[str, Array]:
        import torch

        with evaluating(self._module), torch.no_grad():
            found: dict[str, Array] = _run(self.name, inputs, lambda part: self._module(*tensors_of(part)))
        return found

    def _content_hash(self) -> str:
        return architecture_hash(self._module)


class ExportedTeacher(_InTorch):
    """A teacher that is a `torch.export.ExportedProgram`; it runs as it was exported, in batches of the size it was exported with
    where that is fixed. It has no module: the graph has one mode and no layers to tap, so it cannot be measured on the target."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        self.name = "exported program"
        self.module: torch.nn.Module | None = None
        self._program = program
        self._graph = program.module()

    def outputs(self, inputs: Tensors) -> dict[str, Array]:
        import torch

        with torch.no_grad():
            found: dict[str, Array] = _run(self.name, inputs, lambda part: self._graph(*tensors_of(part)), batch=self._batch())
        return found

    def _batch(self) -> int:
        """The fixed size of the first axis of the inputs; 0 where it is free."""
        names = set(self._program.graph_signature.user_inputs)
        shapes = [node.meta["val"].shape for node in self._program.graph.nodes if node.op == "placeholder" and node.name in names]
        sizes = {int(shape[0]) for shape in shapes if len(shape) and isinstance(shape[0], int)}
        return max(sizes, default=0)

    def _content_hash(self) -> str:
        return sha256_bytes((architecture_hash(self._graph) + str(self._program.graph)).encode())


class OnnxTeacher(AnsweringTeacher):
    """A teacher that is an ONNX file; runs on the host's CPU with ONNX Runtime, in batches of the file's size where that is fixed."""

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
                self._session = ort_session(self.path, purpose="an ONNX teacher", log_level=3)
            except ort_errors() as error:
                raise ModelError("the teacher's ONNX file cannot be run", found=first_line(error), hint="export it again", subject=self.path) from error
        return self._session

    def outputs(self, inputs: Tensors) -> dict[str, Array]:
        session = self._open()
        specs = session.get_inputs()
        if sorted(spec.name for spec in specs) != sorted(inputs):
            raise ModelError("the data do not name the ONNX teacher's inputs", found=sorted(inputs), allowed=[spec.name for spec in specs])
        sizes = [spec.shape[0] for spec in specs if spec.shape and isinstance(spec.shape[0], int)]
        names = [output.name for output in session.get_outputs()]
        found: dict[str, Array] = _run(
            self.name,
            inputs,
            lambda part: dict(zip(names, session.run(None, part), strict=True)),
            batch=max(sizes, default=0),
            errors=(*MODEL_ERRORS, *ort_errors()),
        )
        return found

    def _content_hash(self) -> str:
        return file_hash(self.path)


def ort_session(path: Path, *, purpose: str, log_level: int) -> Any:
    """A session of a file in this process, as it runs on a host: one thread, ONNX Runtime's own optimizations.

    Raises:
        MissingDependency: onnxruntime is not installed. One of `ort_errors()`: it does not load the file.
    """
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise MissingDependency("onnxruntime", "x86", purpose=purpose) from error
    options = ort.SessionOptions()
    options.log_severity_level = log_level
    options.intra_op_num_threads = 1
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def ort_errors() -> tuple[type[Exception], ...]:
    """Whatever ONNX Runtime raises on a model that it does not load or run; nothing where it is not installed."""
    try:
        from onnxruntime.capi import onnxruntime_pybind11_state as states
    except ImportError:
        return ()
    return tuple(item for item in vars(states).values() if isinstance(item, type) and issubclass(item, Exception))


class CallableTeacher(AnsweringTeacher):
    """A teacher that is any callable from named arrays to outputs (an array, or a nesting of arrays).

    It may hold what cannot be hashed (a session, another library's model). Then it is known by its answers to a few items, given to `answer`;
    before that, as a teacher of this process only.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.name = getattr(function, "__name__", type(function).__name__)
        self.module: torch.nn.Module | None = None
        self._function = function
        self._content, self._hidden = examine(function)  # now: its state may change as it runs

    def outputs(self, inputs: Tensors) -> dict[str, Array]:
        found: dict[str, Array] = _run(self.name, inputs, self._function)
        return found

    def _content_hash(self) -> str:
        return self._content

    def weights_hash(self) -> str:
        """The hash of the callable with what it depends on, and of its answers."""
        return sha256_bytes(f"{super().weights_hash()} {_PROCESS}".encode()) if self._hidden and not self._answers else super().weights_hash()


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
        return ExportedTeacher(teacher)
    if callable(teacher):
        return CallableTeacher(teacher)
    raise ModelError(
        "this cannot be a teacher", found=type(teacher).__name__, allowed="a torch module, an exported program, the path of an ONNX file, a callable"
    )

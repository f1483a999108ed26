"""Records about models: what goes in and out, which files they are, how a student is rebuilt, how it is quantized."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

from msgspec import Meta

from edgekd.errors import InputError, ModelError
from edgekd.records.base import Record

Positive = Annotated[int, Meta(gt=0)]
NonNegative = Annotated[int, Meta(ge=0)]


class Precision(str, Enum):
    """The arithmetic an artifact is deployed in."""

    FP32 = "fp32"
    FP16 = "fp16"
    INT8 = "int8"


class Format(str, Enum):
    """The file format of an artifact. A SavedModel is a folder: all its files belong to the artifact, the entry is `saved_model.pb`."""

    ONNX = "onnx"
    TFLITE = "tflite"
    TENSORRT = "tensorrt"
    SAVED_MODEL = "saved_model"
    KERAS = "keras"


class TensorSpec(Record, tag="edgekd.tensor/1", frozen=True, kw_only=True):
    """One tensor: `shape` holds sizes, and names for symbolic axes, for example `("batch", 3, 32, 32)`."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    layout: str = ""
    value_range: tuple[float, float] | None = None
    normalization: str = ""

    def sizes(self, binding: dict[str, int]) -> tuple[int, ...]:
        """The shape with every symbol replaced by its size.

        Raises:
            ModelError: a symbol has no binding.
        """
        out = []
        for axis in self.shape:
            if isinstance(axis, str):
                if axis not in binding:
                    raise ModelError(
                        f"axis {axis!r} of {self.name!r} is dynamic and has no size",
                        found=f"shape {self.shape}, bindings {binding}",
                        hint=f"bind it, for example static_binding={{{axis!r}: 1}}",
                        subject=self.name,
                    )
                out.append(binding[axis])
            else:
                out.append(axis)
        return tuple(out)


class StatePair(Record, tag="edgekd.state/1", frozen=True, kw_only=True):
    """An output that is fed back as an input at the next step."""

    output: str
    input: str


class IOSpec(Record, tag="edgekd.io/1", frozen=True, kw_only=True):
    """What a model takes and gives. Outputs of any nesting are flattened to tensors named by their key path."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    state: tuple[StatePair, ...] = ()
    static_binding: dict[str, int] = {}

    def __post_init__(self) -> None:
        for kind, tensors in (("input", self.inputs), ("output", self.outputs)):
            names = [tensor.name for tensor in tensors]
            if not names:
                raise ModelError(f"a model without any {kind} cannot be deployed")
            if len(set(names)) != len(names):
                raise ModelError(f"two {kind}s share a name", found=names, hint=f"give every {kind} its own name")
        self._check_state()

    @property
    def state_inputs(self) -> tuple[str, ...]:
        """The inputs that hold state, in the order of the inputs."""
        held = {pair.input for pair in self.state}
        return tuple(tensor.name for tensor in self.inputs if tensor.name in held)

    @property
    def step_inputs(self) -> tuple[str, ...]:
        """The inputs that whoever runs the model gives at every step: all that hold no state, in order."""
        held = {pair.input for pair in self.state}
        return tuple(tensor.name for tensor in self.inputs if tensor.name not in held)

    def _check_state(self) -> None:
        inputs, outputs = {tensor.name: tensor for tensor in self.inputs}, {tensor.name: tensor for tensor in self.outputs}
        for pair in self.state:
            if pair.input not in inputs or pair.output not in outputs:
                raise ModelError(
                    f"the state {pair.input!r} joins an output and an input that the model does not both have",
                    found=f"{pair.output} -> {pair.input}",
                    allowed=f"outputs {', '.join(outputs)}; inputs {', '.join(inputs)}",
                    subject=pair.input,
                )
            fed, given = inputs[pair.input], outputs[pair.output]
            sizes = [(one, other) for one, other in zip(fed.shape, given.shape, strict=False) if isinstance(one, int) and isinstance(other, int)]
            if fed.dtype != given.dtype or len(fed.shape) != len(given.shape) or any(one != other for one, other in sizes):
                raise ModelError(
                    f"the state {pair.input!r} is fed back from an output that does not fit it",
                    found=f"{pair.output}: {given.dtype} {given.shape}",
                    allowed=f"{fed.dtype} {fed.shape}",
                    subject=pair.input,
                )
        if len({pair.input for pair in self.state}) != len(self.state):
            raise ModelError("one input is fed back from two outputs", found=[pair.input for pair in self.state], subject=self.state[0].input)
        if self.state and not self.step_inputs:
            raise ModelError("every input of the model is a state, so that nothing is given at a step", found=[pair.input for pair in self.state])


class Artifact(Record, tag="edgekd.artifact/1", frozen=True, kw_only=True):
    """A converted model: a set of files with their hashes, and what is in them. Paths are not part of it."""

    files: dict[str, str]
    entry: str
    format: Format
    precision: Precision
    iospec: IOSpec
    size_bytes: NonNegative
    opset: int = 0
    producers: dict[str, str] = {}
    parent: str = ""
    recipe: str = ""
    metadata: dict[str, str] = {}

    def __post_init__(self) -> None:
        if self.entry not in self.files:
            raise InputError("an artifact's entry must be one of its files", found=self.entry, allowed=sorted(self.files))
        for name in self.files:
            if name.startswith("/") or ".." in name.split("/"):
                raise InputError("an artifact's files stay inside its folder", found=name)

    def content_hash(self) -> str:
        """One hash over all files: what a measurement and a manifest refer to."""
        return Artifact(
            files=self.files,
            entry=self.entry,
            format=self.format,
            precision=self.precision,
            iospec=self.iospec,
            size_bytes=self.size_bytes,
        ).digest()


class CalibrationSpec(Record, tag="edgekd.calibration/1", frozen=True, kw_only=True):
    """Which inputs calibrated the activations, and how."""

    method: str
    size: Positive
    split: str
    data_hash: str


class QuantRecipe(Record, tag="edgekd.recipe/1", frozen=True, kw_only=True):
    """How a model is quantized; data, so that it can be hashed, stored and applied again.

    `scheme` is one of `u8s8`, `s8s8`, `u8s8_reduced`, `s8s8_tensorrt` (ONNX) or `static_int8`, `dynamic_int8`, `fp16` (TFLite); `float_ops` lists the nodes
    that stay in float, by name; `op_rules` maps kinds of operators to a scheme or `float` (TFLite).
    """

    scheme: str
    calibration: CalibrationSpec
    per_channel: bool = True
    float_ops: tuple[str, ...] = ()
    op_rules: dict[str, str] = {}


class Cut(Record, tag="edgekd.cut/1", frozen=True, kw_only=True):
    """The indices that stay along one dimension of one module's weight (written by the space `Pruned`)."""

    module: str
    dim: NonNegative
    indices: tuple[int, ...]


class Probe(Record, tag="edgekd.probe/1", frozen=True, kw_only=True):
    """A seeded input and the outputs it must give: `outputs` holds flat values per output tensor, rounded to 1e-6.

    `inputs` describes what is drawn, in the order of the module's arguments, uniform over each `value_range`.
    """

    input_seed: int
    inputs: tuple[TensorSpec, ...] = ()
    outputs: dict[str, tuple[float, ...]]
    tolerance: float = 1e-4


class StudentSpec(Record, tag="edgekd.student/1", frozen=True, kw_only=True):
    """What is needed to rebuild a student from its factory, which the caller hands in, and its weights.

    `factory` is `module:qualname`, or empty when it cannot be imported (a lambda, `__main__`); then
    `rebuildable` says why. `kwargs` are the factory's arguments; `keep` is empty unless the student was pruned.
    """

    kind: str
    factory: str = ""
    factory_hash: str = ""
    rebuildable: str = "yes"
    kwargs: dict[str, int | float | str | bool] = {}
    keep: tuple[Cut, ...] = ()
    state: dict[str, tuple[tuple[int, ...], str]] = {}
    probe: Probe | None = None

    def label(self) -> str:
        """A short name for tables: `width=16 depth=2`, or the space's kind."""
        return " ".join(f"{key}={value}" for key, value in sorted(self.kwargs.items())) or self.kind

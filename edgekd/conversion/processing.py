"""Pre- and post-processing of a source: built into the model where it is to lie inside, recorded either way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from edgekd.artifact import StoredArtifact
from edgekd.contracts import Array, Tensors
from edgekd.conversion.formats import TORCH
from edgekd.conversion.inputs import Source
from edgekd.errors import ConfigError, DataError, near_names
from edgekd.models.notes import HELD, annotate, carried, free_notes, labels_text, still_true
from edgekd.records import Format, HopParity, InputProcessing, IOSpec, OutputProcessing, Processing, TensorSpec
from edgekd.tree import flatten_outputs

if TYPE_CHECKING:
    import torch

_SLACK = 0.1
"""Share of the range by which inputs may leave it: resizing overshoots."""

_WIDE, _SMALL = 20.0, 0.05
"""Where raw values span more than the first, inputs that stay below this share of it are no pixels but normalised values."""


@dataclass(frozen=True)
class Processed:
    """A source with its processing; where it was built into a file, `parity` says how that compares with the file before, `notes` what was not checked."""

    source: Source
    parity: HopParity | None = None
    notes: tuple[str, ...] = ()


def load_processing(given: Processing | Path | str) -> Processing:
    """The record itself, or what a TOML or JSON file holds.

    Raises:
        ConfigError: the file is missing or malformed, a key is unknown, or a value is of the wrong type.
    """
    if isinstance(given, Processing):
        return given
    path = Path(given)
    if path.suffix == ".json":
        return Processing.load(path)
    from edgekd.settings.toml_file import load_toml, to_record

    return to_record(load_toml(path), Processing)


def file_notes(processing: Processing) -> dict[str, str]:
    """What goes into the file and the artifact's metadata."""
    notes = {"processing": processing.to_json().decode()}
    return {**notes, "labels": labels_text(processing.labels)} if processing.labels else notes


def checked_processing(processing: Processing, spec: IOSpec, formats: Sequence[str]) -> Processing:
    """The processing with its outputs named, after making sure that it fits the model and the formats of the road.

    Raises:
        ConfigError: an input or output does not exist or does not fit, or the suppression of boxes is to lie in a TFLite file.
    """
    inputs = {tensor.name: tensor for tensor in spec.inputs}
    outputs = {tensor.name: tensor for tensor in spec.outputs}
    for name, part in processing.inputs.items():
        if name not in inputs:
            raise ConfigError(f"the processing names an input that the model lacks: {name!r}", found=name, allowed=near_names(name, inputs), subject=name)
        _channel_axis(inputs[name], part)
        if not inputs[name].dtype.startswith("float"):
            raise ConfigError(f"the input {name!r} holds whole numbers, which are not normalised", found=inputs[name].dtype, subject=name)
    parts = []
    for out in processing.outputs:
        named = out
        if out.kind != "nms":
            if not out.output and len(outputs) > 1:
                raise ConfigError(f"{out.kind} must say for which output", allowed=", ".join(outputs), hint='output = "NAME"', subject=out.kind)
            named = msgspec.structs.replace(out, output=out.output or next(iter(outputs)))
            if named.output not in outputs:
                raise ConfigError(
                    f"the processing names an output that the model lacks: {named.output!r}", allowed=near_names(named.output, outputs), subject=named.output
                )
        elif out.where == "inside" and (formats[0] != Format.ONNX.value or formats[-1] != Format.ONNX.value):
            raise ConfigError(
                f"no road from {formats[0]} to {formats[-1]} holds a suppression of boxes that the runtime of the file is known to run",
                found="nms inside",
                allowed='nms inside an ONNX file that is made from an ONNX file, or where = "outside"',
                hint='write where = "outside" and suppress boxes in the application; or convert to ONNX, then build it into that file',
                subject="nms",
            )
        parts.append(named)
    return msgspec.structs.replace(processing, outputs=tuple(parts))


def processed(source: Source, processing: Processing, folder: Path, inputs: Tensors) -> Processed:
    """The source with the parts that lie inside built in, and its description saying what it takes then.

    An ONNX file that parts were built into is checked by ONNX's checker and compared, on `inputs` as the file takes them, with the file before.

    Raises:
        ConfigError: the format takes no parts inside, or a part does not fit. ModelError: the ONNX file's operator set is too old, or the part
            would change what the body of an If, Loop or Scan reads. ConversionRejected: ONNX Runtime does not run one of the two files.
    """
    before = source.iospec
    spec = described(before, processing)
    notes = file_notes(processing)
    if source.format == TORCH:
        return Processed(replace(source, iospec=spec, module=_module(source.module, before, processing) if processing.inside else source.module))
    if source.artifact is None or source.format not in HELD or (processing.inside and source.format != Format.ONNX.value):
        if processing.inside:
            raise ConfigError(
                f"processing cannot be built into a {source.format} file",
                found="where = inside",
                allowed="inside from a torch module or an ONNX file",
                hint='start from where the file comes from, or write where = "outside"',
                subject="processing",
            )
        return Processed(replace(source, iospec=spec))
    if not processing.inside:
        return Processed(replace(source, iospec=spec, artifact=annotate(source.artifact, folder, notes, iospec=spec)))
    return _onnx(source, source.artifact, processing, folder, inputs)


def _onnx(source: Source, artifact: StoredArtifact, processing: Processing, folder: Path, inputs: Tensors) -> Processed:
    """The ONNX file with the parts that lie inside."""
    from edgekd.models.onnx_artifact import read_notes, store_onnx
    from edgekd.models.onnx_file import iospec_of, load_model
    from edgekd.models.onnx_processing import normalise_input, process_outputs, require_opset, require_sound
    from edgekd.parity.processed import BuiltIn, compare_processed

    record = artifact.record
    model = load_model(artifact.entry)
    require_opset(model)
    tensors = {tensor.name: tensor for tensor in source.iospec.inputs}
    parts = {name: (part, _channel_axis(tensors[name], part)) for name, part in processing.inputs.items() if part.where == "inside"}
    places = {name: normalise_input(model, name, part, axis) for name, (part, axis) in parts.items()}
    origins, steps = process_outputs(model, [out for out in processing.outputs if out.where == "inside"])
    unchecked = require_sound(model)
    hop = f"{source.format} -> {source.format} with processing"
    parity = compare_processed(hop, artifact.entry, model, BuiltIn(parts, origins, steps), inputs, record.precision, folder / "compared")
    made = store_onnx(
        model,
        folder,
        "model.onnx",
        precision=record.precision,
        iospec=iospec_of(model, described(source.iospec, processing)),
        producers=record.producers,
        parent=record.content_hash(),
        recipe=record.recipe,
        metadata={**still_true(record.metadata), **_told(places)},
        notes={**free_notes(read_notes(model)), **carried(record.metadata), **file_notes(processing)},
    )
    return Processed(replace(source, artifact=made, iospec=made.record.iospec), parity, (unchecked,) if unchecked else ())


def _told(places: Mapping[str, str]) -> dict[str, str]:
    return {"normalisation_in": ", ".join(f"{name}: {place}" for name, place in places.items())} if places else {}


def _channel_axis(tensor: TensorSpec, part: InputProcessing) -> int:
    """The axis of the channels, after making sure that there are as many as means.

    Raises:
        ConfigError: there are others.
    """
    layout = part.layout or tensor.layout
    rank = len(tensor.shape)
    if layout and (len(layout) != rank or "C" not in layout):
        raise ConfigError(f"the layout does not fit the input {tensor.name!r}", found=layout, allowed=f"{rank} letters, one of them C", subject=tensor.name)
    axis = layout.index("C") if layout else min(1, rank - 1)
    size = tensor.shape[axis] if rank else 1
    if len(part.mean) > 1 and size != len(part.mean):
        raise ConfigError(
            f"the normalisation of {tensor.name!r} has {len(part.mean)} means for another number of channels",
            found=f"axis {axis} of {tensor.shape}",
            hint='say where the channels lie: layout = "NHWC"',
            subject=tensor.name,
        )
    return axis


def described(spec: IOSpec, processing: Processing, *, outputs: bool = True) -> IOSpec:
    """The description with normalization and value ranges of what the file takes and, with `outputs`, gives."""

    def taken(tensor: TensorSpec) -> TensorSpec:
        part = processing.inputs.get(tensor.name)
        if part is None:
            return tensor
        ends = part.raw_range if part.where == "inside" else part.normal_range
        return msgspec.structs.replace(tensor, normalization=part.text(), value_range=ends, layout=part.layout or tensor.layout)

    def given(tensor: TensorSpec) -> TensorSpec:
        for part in processing.outputs:
            if part.where == "inside" and part.output == tensor.name and part.kind in ("softmax", "sigmoid"):
                return msgspec.structs.replace(tensor, value_range=(0.0, 1.0))
            if part.where == "inside" and part.output == tensor.name and part.kind == "argmax":
                axis = part.axis % len(tensor.shape)
                return msgspec.structs.replace(tensor, dtype="int64", shape=(*tensor.shape[:axis], *tensor.shape[axis + 1 :]), layout="")
        return tensor

    return msgspec.structs.replace(spec, inputs=tuple(map(taken, spec.inputs)), outputs=tuple(map(given, spec.outputs)) if outputs else spec.outputs)


def _module(module: torch.nn.Module, spec: IOSpec, processing: Processing) -> torch.nn.Module:
    """The module with the parts that lie inside around it."""
    import torch

    from edgekd.models.onnx_processing import factors

    outputs: dict[str, OutputProcessing] = {part.output: part for part in processing.outputs if part.where == "inside"}

    class Processed(torch.nn.Module):
        """The module as `model`, behind the normalisation of its inputs and before what its outputs go through."""

        def __init__(self) -> None:
            super().__init__()
            self.model = module
            for position, tensor in enumerate(spec.inputs):
                part = processing.inputs.get(tensor.name)
                if part is not None and part.where == "inside":
                    shape = [1] * len(tensor.shape)
                    shape[_channel_axis(tensor, part)] = len(part.mean)
                    for what, values in zip(("scale", "shift"), factors(part), strict=True):
                        self.register_buffer(f"{what}_{position}", torch.tensor(values, dtype=torch.float32).reshape(shape))

        def forward(self, *args: torch.Tensor) -> dict[str, torch.Tensor]:
            """The outputs by name, on raw inputs."""
            fed = [
                value * self.get_buffer(f"scale_{at}") + self.get_buffer(f"shift_{at}") if hasattr(self, f"scale_{at}") else value
                for at, value in enumerate(args)
            ]
            return {name: _applied(value, outputs.get(name)) for name, value in flatten_outputs(self.model(*fed)).items()}

    made = Processed()
    made.training = module.training  # the module itself stays as it is
    return made


def _applied(value: Any, part: OutputProcessing | None) -> Any:
    """A torch tensor behind its processing."""
    if part is None:
        return value
    if part.kind == "sigmoid":
        return value.sigmoid()
    return value.softmax(part.axis) if part.kind == "softmax" else value.argmax(part.axis)


def require_range(arrays: Mapping[str, Array], processing: Processing, what: str) -> None:
    """Refuse inputs that are normalised where the file does it, or raw where it does not: what would be normalised twice, or never.

    Raises:
        DataError: names the input, its range and what was expected.
    """
    for name, part in processing.inputs.items():
        array = arrays[name]
        ends = part.raw_range if part.where == "inside" else part.normal_range
        low, high = float(np.min(array)), float(np.max(array))
        slack = _SLACK * (ends[1] - ends[0])
        inside = part.where == "inside"
        shrunk = inside and ends[1] - ends[0] > _WIDE and low < high and max(abs(low), abs(high)) < _SMALL * (ends[1] - ends[0])
        if low < ends[0] - slack or high > ends[1] + slack or shrunk:
            kind = "are normalised already, and the file would do it once more" if inside else "are not normalised as the processing says"
            raise DataError(
                f"the {what} of the input {name!r} {kind}",
                found=f"values from {low:.4g} to {high:.4g}",
                allowed=f"{'raw' if inside else 'normalised'} values from {ends[0]:.4g} to {ends[1]:.4g}",
                hint="give raw values" if inside else "normalise them, or state the value_range of the raw values",
                subject=name,
            )

"""The source of a road edited before the first hop: outputs cut, and in ONNX files what does nothing removed."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from edgekd.artifact import StoredArtifact
from edgekd.contracts import Array
from edgekd.conversion.formats import TORCH
from edgekd.conversion.inputs import Source
from edgekd.errors import ConfigError
from edgekd.models.notes import CARRIED, carried, still_true
from edgekd.records import Format, IOSpec
from edgekd.teachers import accepted, evaluating, tensors_of
from edgekd.tree import flatten_outputs

if TYPE_CHECKING:
    import torch


def edited(source: Source, outputs: Sequence[str] | None, folder: Path, example: Mapping[str, Array]) -> Source:
    """The source with these outputs only, in its own order, and without what only fed the others; all outputs with `None`.

    A module is wrapped; of an ONNX file also the nodes that do nothing and the weights that nothing reads go, whatever `outputs` says. The
    artifact's metadata count what was removed and name what was cut.

    Raises:
        ConfigError: there is no output of a name, an input then feeds nothing, or the format cannot be cut here.
        ConversionRejected: a TFLite file with several graphs.
    """
    if outputs is not None and (isinstance(outputs, str) or not all(isinstance(name, str) for name in outputs)):
        raise ConfigError("outputs are named in a sequence of texts", found=repr(outputs), allowed='for example ("logits",)', subject="outputs")
    if outputs is not None:
        source = replace(source, iospec=cut_spec(source.iospec, outputs))
    if source.format == TORCH:
        return source if outputs is None else replace(source, module=_kept_module(source.module, source.iospec, example))
    if source.artifact is not None and source.format == Format.ONNX.value:
        return _onnx(source, source.artifact, outputs, folder)
    if outputs is None:
        return source
    if source.artifact is not None and source.format == Format.TFLITE.value:
        return _tflite(source, source.artifact, outputs, folder)
    raise ConfigError(
        f"the outputs of a {source.format} model cannot be cut",
        found=", ".join(outputs),
        allowed="outputs of a torch module, an ONNX or a TFLite file",
        hint="convert it to tflite first, then cut that file",
        subject="outputs",
    )


def cut_spec(spec: IOSpec, outputs: Sequence[str] | None) -> IOSpec:
    """The description with these outputs only.

    Raises:
        ConfigError: there is no output of a name, or one is fed back as an input.
    """
    if outputs is None:
        return spec
    from edgekd.models.onnx_trim import check_outputs

    check_outputs(outputs, [tensor.name for tensor in spec.outputs])
    for pair in spec.state:
        if pair.output not in outputs:
            raise ConfigError(
                f"the output {pair.output!r} is fed back as the input {pair.input!r}: it cannot be cut",
                found=", ".join(outputs),
                hint=f"keep {pair.output} too",
                subject=pair.output,
            )
    return msgspec.structs.replace(spec, outputs=tuple(tensor for tensor in spec.outputs if tensor.name in outputs))


def _kept_module(module: torch.nn.Module, spec: IOSpec, example: Mapping[str, Array]) -> torch.nn.Module:
    """The module with only the outputs of `spec`, by their names."""
    import torch

    from edgekd.models.onnx_trim import require_fed

    kept = tuple(tensor.name for tensor in spec.outputs)

    class Kept(torch.nn.Module):
        """The module as `model`; gives some of its outputs."""

        def __init__(self) -> None:
            super().__init__()
            self.model = module

        def forward(self, *args: torch.Tensor) -> dict[str, torch.Tensor]:
            """The outputs that are kept, by name."""
            found = flatten_outputs(self.model(*args))
            return {name: found[name] for name in kept}

    wrapped = Kept()
    wrapped.training = module.training  # the module itself stays as it is
    (read, _), (still_read, judged) = (_read_inputs(one, spec, example) for one in (module, wrapped))
    if judged:
        require_fed([name for name in read if name not in still_read], kept)
    return wrapped


def _read_inputs(module: torch.nn.Module, spec: IOSpec, example: Mapping[str, Array]) -> tuple[list[str], bool]:
    """The float inputs that some output depends on, found by its gradient, and whether there are no others.

    There may be others where an output has no gradient (a label, a detached tensor), or the module cannot be differentiated. Inputs of whole
    numbers have no gradient and are not judged.

    Raises:
        ModelError: the module does not take the example.
    """
    import torch

    first = {tensor.name: example[tensor.name][:1] for tensor in spec.inputs}
    with evaluating(module), torch.enable_grad():
        values = dict(zip(first, tensors_of(first), strict=True))
        floats = {name: value.requires_grad_() for name, value in values.items() if value.is_floating_point()}
        with accepted("the module", type(module).__name__, first):
            outputs = list(flatten_outputs(module(*(value.clone() for value in values.values()))).values())
        made = [value.sum() for value in outputs if isinstance(value, torch.Tensor) and value.requires_grad]
        if not made or not floats:
            return [], False
        try:
            found = torch.autograd.grad(made, list(floats.values()), allow_unused=True)
        except RuntimeError:  # a step without a derivative, or one that writes over what another's derivative needs
            return [], False
    return [name for name, gradient in zip(floats, found, strict=True) if gradient is not None], len(made) == len(outputs)


def _onnx(source: Source, artifact: StoredArtifact, outputs: Sequence[str] | None, folder: Path) -> Source:
    from edgekd.models.onnx_artifact import read_notes, store_onnx
    from edgekd.models.onnx_file import iospec_of, load_model
    from edgekd.models.onnx_trim import Trimmed, keep_outputs, trim

    model = load_model(artifact.entry)
    before = [item.name for item in model.graph.output]
    cut = Trimmed() if outputs is None else keep_outputs(model, outputs)
    idle = trim(model)
    found = Trimmed(idle.idle_nodes, cut.dead_nodes + idle.dead_nodes, cut.weights + idle.weights)
    if found == Trimmed() and len(model.graph.output) == len(before):
        return source
    record = artifact.record
    made = store_onnx(
        model,
        folder,
        "model.onnx",
        precision=record.precision,
        iospec=iospec_of(model, source.iospec),
        producers=record.producers,
        parent=record.content_hash(),
        recipe=record.recipe,
        metadata={**still_true(record.metadata), **found.metadata(), **_cut(before, [item.name for item in model.graph.output])},
        notes={**{name: text for name, text in read_notes(model).items() if name in CARRIED}, **carried(record.metadata)},
    )
    return replace(source, artifact=made, iospec=made.record.iospec)


def _tflite(source: Source, artifact: StoredArtifact, outputs: Sequence[str], folder: Path) -> Source:
    from edgekd.models.notes import free_notes
    from edgekd.models.tflite_artifact import read_notes, store_tflite
    from edgekd.models.tflite_file import load_model, read_graph
    from edgekd.models.tflite_trim import keep_outputs

    model = load_model(artifact.entry)
    before = list(read_graph(model).outputs)
    found = keep_outputs(model, outputs)
    record = artifact.record
    made = store_tflite(
        model,
        folder,
        precision=record.precision,
        like=source.iospec,
        converter=record.metadata.get("converter", "import"),
        producers=record.producers,
        parent=record.content_hash(),
        recipe=record.recipe,
        metadata={**found.metadata(), **_cut(before, list(read_graph(model).outputs))},
        notes={**free_notes(read_notes(model)), **carried(record.metadata)},
    )
    return replace(source, artifact=made, iospec=made.record.iospec)


def _cut(before: Sequence[str], after: Sequence[str]) -> dict[str, str]:
    gone = [name for name in before if name not in after]
    return {"cut_outputs": json.dumps(gone)} if gone else {}

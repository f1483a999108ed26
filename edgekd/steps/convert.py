"""The convert stage: the trained student as a float file in the target's format, compared with its source on real inputs, on the target."""

from __future__ import annotations

from pathlib import Path

from edgekd.artifact import StoredArtifact
from edgekd.errors import ParityRejected
from edgekd.parity.blame import blame
from edgekd.records import Artifact, HopParity, LedgerRow, Precision, Record, StudentSpec
from edgekd.steps.context import Context, row


class ConvertOut(Record, tag="edgekd.stage_convert/1", frozen=True, kw_only=True):
    """The float artifact, stored in the stage's folder `float`."""

    artifact: Artifact
    parity: tuple[HopParity, ...]
    rows: tuple[LedgerRow, ...]


def run_convert(context: Context, folder: Path, spec: StudentSpec, weights: Path) -> ConvertOut:
    """Export the student and compare the file with it.

    Raises:
        ConversionRejected: the exporter refused the student, or the file holds too many transpositions.
        ParityRejected: the file computes something else; the message names the hop and the tensor, the subject is the `HopParity`.
    """
    place = folder / "float"
    place.mkdir()
    samples = context.options.parity_samples
    inputs = context.validation.all(samples).inputs
    if spec.kind == "fixed-onnx":
        source = getattr(context.space, "onnx")  # noqa: B009 - only the space Fixed of a file has it
        model = context.take_onnx(source, place)
        context.hold_transposes(model, None)
        from edgekd.teachers import OnnxTeacher

        run, hop = OnnxTeacher(source).outputs, "file -> onnx"
    else:
        from edgekd.rebuild import load_weights
        from edgekd.teachers import TorchTeacher

        module = context.space.build(spec, context.seed)
        load_weights(module, weights)
        module.eval()
        model = context.export(module, place)
        context.hold_transposes(model, lambda: module)
        run, hop = TorchTeacher(module).outputs, context.toolchain.export_hop
    reference = run(inputs)
    device = context.device_outputs(model, inputs)
    parity = context.hop(hop, reference, device, Precision.FP32)
    if not parity.passed:
        blamed = blame(
            parity,
            model,
            run,
            inputs,
            toolchain=context.toolchain,
            device=lambda given: context.device_outputs(model, given),
            compare=lambda name, expected, found: context.hop(name, expected, found, Precision.FP32),
        )
        _refuse(context, blamed)
    return ConvertOut(
        artifact=model.record,
        parity=(parity,),
        rows=(row(context, "convert", hop, "kept", f"parity on {parity.samples} real inputs", details=_facts(model)),),
    )


def _facts(model: StoredArtifact) -> dict[str, float | int | str | bool]:
    """What the ledger tells of the file's graph: the layout operators as counted, and what of batch norms was folded or left."""
    told = model.record.metadata
    facts: dict[str, float | int | str | bool] = {"opset": model.record.opset}
    for name in ("layout_ops", "transposes", "batch_norms_folded", "batch_normalizations"):
        if name in told:
            facts[name] = int(told[name])
    return facts


def _refuse(context: Context, parity: HopParity) -> None:
    bad = next(tensor for tensor in parity.tensors if not tensor.passed)
    where = "the target" if parity.hop == context.toolchain.device_hop else f"the exporter {context.toolchain.exporter}"
    raise ParityRejected(
        f"the student diverges at the hop {parity.hop!r}",
        found="; ".join((f"{bad.name}: {bad.reason}", *parity.findings)),
        hint=f"{where} computes something else; replace the operators before the tensor",
        subject=parity,
    )

"""Which quantization to try first, by what the network is made of and what the target runs it with; the measurement decides, not this table."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from edgekd.artifact import StoredArtifact
from edgekd.errors import UnsupportedModel
from edgekd.quantize.recipes import SCHEMES, candidate_schemes
from edgekd.quantize.structure import Kind, Structure, structure_of
from edgekd.records import Capabilities, Format, Precision

GPU, TENSORRT = "gpu", "tensorrt"
FP16 = "fp16"


@dataclass(frozen=True)
class Row:
    """One row of the table: for networks of these `kinds` (none: every kind) on files of `format`, run by `accelerator` (nothing: the processor),
    try `scheme`, with `op_rules` for the kinds of operators that the file has. `evidence` says where it was measured or stated."""

    kinds: frozenset[Kind]
    format: Format
    accelerator: str
    scheme: str
    reason: str
    evidence: str
    op_rules: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Proposal:
    """One way to quantize a file, with why it is proposed at this place. `op_rules` are as in `QuantRecipe`, sorted."""

    scheme: str
    reason: str
    evidence: str
    op_rules: tuple[tuple[str, str], ...] = ()

    @property
    def precision(self) -> Precision:
        """The arithmetic that it gives."""
        return Precision.FP16 if self.scheme == FP16 else Precision.INT8

    @property
    def label(self) -> str:
        """The scheme with its rules, as ledgers name it: `dynamic_int8 with CONV_2D static_int8`."""
        return self.scheme + (f" with {', '.join(f'{kind} {wish}' for kind, wish in self.op_rules)}" if self.op_rules else "")


_TFLITE, _ONNX = Format.TFLITE, Format.ONNX
_CONVOLUTIONS_STATIC = {"CONV_2D": "static_int8", "DEPTHWISE_CONV_2D": "static_int8", "TRANSPOSE_CONV": "static_int8"}

PROPOSALS: tuple[Row, ...] = (
    Row(
        frozenset(),
        _ONNX,
        TENSORRT,
        "s8s8_tensorrt",
        "TensorRT computes in int8 what stands between explicit Q/DQ pairs, by placement rules of its own",
        "NVIDIA's documentation of explicit quantization; no TensorRT has read these files",
    ),
    Row(
        frozenset(),
        _TFLITE,
        GPU,
        FP16,
        "the GPU delegate computes in floating point, int8 files too: fp16 halves the weights and costs no accuracy worth it",
        "TensorFlow's documentation of the GPU delegate, on quantized models; not measured by edgekd",
    ),
    Row(
        frozenset({Kind.TRANSFORMER}),
        _TFLITE,
        "",
        "dynamic_int8",
        "attention in static int8 falls out of the delegate; with dynamic range it stays in",
        "docs/matrix.md, ViT: 0.220 ms float, 0.114 dynamic, 0.294 static; transformer encoder: 0.156, 0.113, 0.494",
    ),
    Row(
        frozenset({Kind.DEPTHWISE}),
        _TFLITE,
        "",
        "static_int8",
        "XNNPACK does not take depthwise convolutions with dynamic range",
        "docs/matrix.md, MobileNetV2-like: 1.357 ms float, 0.652 static, 2.604 dynamic",
    ),
    Row(
        frozenset({Kind.RECURRENT}),
        _TFLITE,
        "",
        "dynamic_int8",
        "as fast as static int8 on unrolled steps, and its error does not add up over them",
        "docs/matrix.md, BiLSTM: 0.099 ms float, 0.066 dynamic at 46.9 dB, 0.068 static at 39.8 dB; GRU: 44.7 against 37.3 dB",
    ),
    Row(
        frozenset({Kind.CONVOLUTIONAL}),
        _TFLITE,
        "",
        "static_int8",
        "no quantizing at run time between convolutions",
        "docs/matrix.md, ResNet-20: 0.831 ms float, 0.238 static, 0.263 dynamic; U-Net: 1.846, 0.570, 0.703; detection head: 0.086, 0.038, 0.105",
    ),
    Row(
        frozenset({Kind.MIXED}),
        _TFLITE,
        "",
        "dynamic_int8",
        "each kind of operator in what is fast for it: convolutions static, the rest with dynamic range",
        "docs/matrix.md, the rows of MobileNetV2-like, ViT and BiLSTM; the mixture itself was not measured",
        _CONVOLUTIONS_STATIC,
    ),
    Row(
        frozenset({Kind.MIXED}),
        _TFLITE,
        "",
        "dynamic_int8",
        "what is not a convolution is slow or loses accuracy in static int8",
        "docs/matrix.md, the rows of ViT and BiLSTM",
    ),
)
"""In the order of preference within a kind and target. A target's own schemes that no row names follow, in the target's order."""


def propose(artifact: StoredArtifact, capabilities: Capabilities, structure: Structure | None = None) -> tuple[Proposal, ...]:
    """What to try for this float file on this target, the likeliest first; nothing that the target does not name among its capabilities.

    Every int8 scheme that the target has for the file's format is in it once at least, so that the table can order them and exclude none.
    """
    return propose_for(artifact.record.format, structure_of(artifact) if structure is None else structure, capabilities)


def propose_for(format: Format, found: Structure, capabilities: Capabilities) -> tuple[Proposal, ...]:
    """`propose` for a network of this structure in a file of this format, whether or not the file exists yet."""
    allowed = _schemes(format, capabilities)
    accelerator = TENSORRT if "s8s8_tensorrt" in allowed else capabilities.delegate
    made: list[Proposal] = []
    for row in PROPOSALS:
        fits = row.format is format and row.accelerator == accelerator and (not row.kinds or found.kind in row.kinds)
        rules = tuple(sorted((kind, wish) for kind, wish in row.op_rules.items() if kind in found.ops and wish in allowed))
        if fits and row.scheme in allowed and (rules or not row.op_rules):
            made.append(Proposal(row.scheme, row.reason, row.evidence, rules))
    named = {proposal.scheme for proposal in made if not proposal.op_rules}
    made += [Proposal(scheme, SCHEMES[scheme].why, "the target's own order") for scheme in allowed if scheme in SCHEMES and scheme not in named]
    return tuple(made)


def _schemes(format: Format, capabilities: Capabilities) -> tuple[str, ...]:
    """The target's schemes for such files in its order; fp16 too where the target computes in it and the quantizer of the format has it as a scheme."""
    fitting = tuple(name for name in capabilities.schemes if name in SCHEMES and SCHEMES[name].format == format.value)
    int8 = fitting if Precision.INT8 in capabilities.precisions else ()
    half = (FP16,) if Precision.FP16 in capabilities.precisions and format is Format.TFLITE else ()
    return (*int8, *half)


def int8_proposals(artifact: StoredArtifact, capabilities: Capabilities, structure: Structure | None = None) -> tuple[Proposal, ...]:
    """The proposals that make int8.

    Raises:
        UnsupportedModel: the target has no int8 scheme for its files.
    """
    return int8_proposals_for(artifact.record.format, structure_of(artifact) if structure is None else structure, capabilities)


def int8_proposals_for(format: Format, structure: Structure, capabilities: Capabilities) -> tuple[Proposal, ...]:
    """`int8_proposals` for a network of this structure in a file of this format, whether or not the file exists yet.

    Raises:
        UnsupportedModel: the target has no int8 scheme for its files.
    """
    candidate_schemes(capabilities)
    found = tuple(proposal for proposal in propose_for(format, structure, capabilities) if proposal.precision is Precision.INT8)
    if not found:
        raise UnsupportedModel(
            "the target computes no int8 of this file",
            found=f"a file of {format.value}; schemes {', '.join(capabilities.schemes)}",
            allowed=", ".join(precision.value for precision in capabilities.precisions),
            hint="deploy in float",
        )
    return found


def timed_proposals(proposals: tuple[Proposal, ...]) -> tuple[Proposal, ...]:
    """Those that a candidate is timed in: the first, and those of which only the network decides whether they are faster."""
    first, *others = proposals
    return (first, *(proposal for proposal in others if SCHEMES[proposal.scheme].by_network))


def proposed_text(structure: Structure, proposals: tuple[Proposal, ...]) -> str:
    """One line for the ledger: what the network is, and what is proposed in which order, each with its reason and evidence."""
    listed = "; ".join(f"{place}. {one.label}: {one.reason} ({one.evidence})" for place, one in enumerate(proposals, 1))
    return f"the network is {structure.text()}; proposed: {listed}"

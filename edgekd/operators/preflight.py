"""The preflight: before anything is trained, one real conversion for each distinct set of operators, asked of the target and compared."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from edgekd.artifact import StoredArtifact
from edgekd.contracts import StudentSpace, Target, Tensors
from edgekd.conversion.toolchain import toolchain_of
from edgekd.errors import ConfigError, ModelError, Rejected
from edgekd.operators.culprit import locate
from edgekd.operators.hop import Hop, refusal
from edgekd.operators.report import OperatorSet, PreflightReport
from edgekd.operators.sets import OperatorWatch, set_key
from edgekd.records import StudentSpec

if TYPE_CHECKING:
    import torch

    from edgekd.search import Candidate
    from edgekd.steps.context import Context

SAMPLES = 4
"""So many samples are compared with torch."""

Keep = Callable[[StudentSpec, "torch.nn.Module", Callable[["torch.nn.Module", Path], StoredArtifact]], StoredArtifact]
"""Converts a student by the given function, into a folder that outlives the call."""


class Watched:
    """Looks on while candidates are described: which operators and modules each one is made of."""

    def __init__(self) -> None:
        self._watches: dict[str, OperatorWatch] = {}

    def __call__(self, spec: StudentSpec, module: torch.nn.Module) -> OperatorWatch:
        watch = self._watches[spec.label()] = OperatorWatch(module)
        return watch

    def sets(self, candidates: Sequence[Candidate]) -> tuple[OperatorSet, ...]:
        """The distinct sets in the order of their first members; `tried` is the member with the least capacity."""
        groups: dict[str, list[Candidate]] = {}
        made: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {}
        for candidate in candidates:
            found = self._watches[candidate.label].found
            key = set_key(*found)
            made[key] = found
            groups.setdefault(key, []).append(candidate)
        return tuple(
            OperatorSet(
                key=key,
                operators=made[key][0],
                modules=made[key][1],
                members=tuple(candidate.label for candidate in group),
                tried=min(group, key=lambda candidate: candidate.capacity).label,
            )
            for key, group in groups.items()
        )


def examine_sets(
    sets: Sequence[OperatorSet], specs: Mapping[str, StudentSpec], *, build: Callable[[StudentSpec], torch.nn.Module], keep: Keep, hop: Hop, inputs: Tensors
) -> PreflightReport:
    """Every set with its answer: its smallest member is converted, asked of the target and run there once; where it fails, the culprit is looked for.

    `inputs` holds a few samples per input. `specs` maps the labels of members to their specs.

    Raises:
        MissingDependency, DeviceError: the converter or the target cannot be used at all.
    """
    answers: list[OperatorSet] = []
    conversions = 0
    for item in sets:
        spec = specs[item.tried]
        module = build(spec)
        module.eval()
        conversions += 1
        note = ""
        try:
            model = keep(spec, module, lambda source, folder: hop.convert(source, inputs, folder))
        except Rejected as error:
            trouble = refusal(error, module)
        else:
            found, note = hop.trouble(model, module, inputs)
            if found is None:
                answers.append(msgspec.structs.replace(item, note=note))
                continue
            trouble = found
            if found.parity is not None:
                item = msgspec.structs.replace(item, parity=hop.blamed(found.parity, model, module, inputs))
        culprit, tries = locate(module, inputs, hop, trouble)
        conversions += tries
        answers.append(msgspec.structs.replace(item, culprit=culprit, note=note))
    return PreflightReport(target=hop.target.name, format=hop.toolchain.name, simulated=hop.target.simulated, sets=tuple(answers), conversions=conversions)


def preflight(model_or_space: Any, *, target: Target, example: Any, seed: int = 0) -> PreflightReport:
    """Which operators of a network, or of a student space, the target cannot run; found by real conversions with untrained weights, before any training.

    `model_or_space` is a torch module, a factory without arguments, or a space (`edgekd.Family`). `example` is an array, several in order, a mapping
    by input name, or the path of a `.npy` file or of a folder of them: one sample or more, batch first.

    Students of equal operators and module kinds are one set, and the smallest of each set is converted by the target's own exporter, asked of
    the target, run there once and compared with torch. For a refused set the report names the module, the operator and what to use instead.

    Raises:
        ConfigError: the model is a file, or no module or space. DataError: the example cannot be used.
        MissingDependency, DeviceError: the converter or the target cannot be used at all.
    """
    from edgekd.search import describe_candidates

    space = _space(model_or_space)
    inputs, unbuildable = _inputs(space, example, seed)
    hop = Hop(target, toolchain_of(target.capabilities))
    watched = Watched()
    if inputs is None:
        return PreflightReport(target=target.name, format=hop.toolchain.name, simulated=target.simulated, sets=(), conversions=0, unbuildable=unbuildable)
    candidates, unbuildable = describe_candidates(space, inputs, seed, watched)
    with tempfile.TemporaryDirectory(prefix="edgekd.preflight.") as work:

        def keep(spec: StudentSpec, module: torch.nn.Module, convert: Callable[[torch.nn.Module, Path], StoredArtifact]) -> StoredArtifact:
            return convert(module, Path(tempfile.mkdtemp(dir=work)))

        report = examine_sets(
            watched.sets(candidates),
            {candidate.label: candidate.spec for candidate in candidates},
            build=lambda spec: space.build(spec, seed),
            keep=keep,
            hop=hop,
            inputs=inputs,
        )
    return msgspec.structs.replace(report, unbuildable=unbuildable)


def preflight_context(context: Context) -> PreflightReport:
    """`preflight` of a run's space on its target, with its validation data; nothing of the run is written."""
    return preflight(context.space, target=context.target, example=context.validation.all(SAMPLES).inputs, seed=context.seed)


def _space(given: Any) -> StudentSpace:
    from edgekd.spaces import Fixed

    if isinstance(given, (str, Path)) or getattr(given, "onnx", None) is not None:
        raise ConfigError(
            "the preflight looks at torch code, not at files",
            found=str(getattr(given, "onnx", given)),
            allowed="a torch module, a factory or a student space",
            hint="`edgekd bench FILE --target NAME` says whether a target runs a file",
            subject=given,
        )
    return given if isinstance(given, StudentSpace) else Fixed(given)


def _inputs(space: StudentSpace, example: Any, seed: int) -> tuple[dict[str, Any] | None, dict[str, str]]:
    """The example by input name, a few samples of it; the names are those of the first member that can be built. Nothing where none can."""
    from edgekd.conversion.inputs import example_arrays

    refused: dict[str, str] = {}
    for spec in space.candidates(seed):
        try:
            module = space.build(spec, seed)
        except (Rejected, ModelError) as error:
            refused[spec.label()] = str(error)
            continue
        arrays = {name: array[:SAMPLES] for name, array in example_arrays(module, example).items()}
        return {
            name: array.astype("float32") if array.dtype == "float64" else array for name, array in arrays.items()
        }, refused  # networks are exported in float32
    return None, refused

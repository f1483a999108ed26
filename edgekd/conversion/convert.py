"""One model from the format it has to the one that is wanted: the road is found, run hop by hop and compared on real inputs."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from edgekd.artifact import StoredArtifact
from edgekd.contracts import Array, Target, Tensors
from edgekd.conversion.bounds import check_limit, require_bound
from edgekd.conversion.editing import cut_spec, edited
from edgekd.conversion.formats import TORCH, FormatGraph, Route, load_graph
from edgekd.conversion.inputs import CHANNEL_LAST, Source, given_inputs, open_source, source_format
from edgekd.conversion.processing import checked_processing, described, file_notes, load_processing, processed, require_range
from edgekd.conversion.running import Options, Run, Say
from edgekd.errors import ConfigError, ParityRejected
from edgekd.models.notes import DROPPED, weights_hash
from edgekd.parity.compare import first_bad_hop, require_parity
from edgekd.records import Artifact, HopParity, IOSpec, Precision, Processing, QuantRecipe, Record
from edgekd.storage import copy_file, folder_atomic

if TYPE_CHECKING:
    import torch


class Conversion(Record, tag="edgekd.conversion/1", frozen=True, kw_only=True):
    """A converted model: where it lies, by which converters, and how every hop compares with the one before on the same inputs.

    `formats` are those passed, source first. A format that nothing runs on the host is compared together with the next one
    (`onnx -> saved_model -> tflite`). `recipe` is how int8 was made, with size and split of the
    calibration. `inputs` says what was compared on, `ran_on` which target ran each format, `notes` what was not compared.
    """

    out: str
    artifact: Artifact
    route: tuple[str, ...]
    formats: tuple[str, ...]
    parity: tuple[HopParity, ...]
    inputs: str
    ran_on: dict[str, str] = {}
    notes: tuple[str, ...] = ()
    recipe: QuantRecipe | None = None

    @property
    def passed(self) -> bool:
        """Whether every hop that was compared is within its tolerance."""
        return all(hop.passed for hop in self.parity)

    @property
    def transposes(self) -> int | None:
        """How many operators of the file move a whole tensor; `None` for formats that edgekd does not read."""
        return _number(self.artifact.metadata, "transposes")

    @property
    def layout_ops(self) -> int | None:
        """How many operators of the file change order or shape of axes only; `None` for formats that edgekd does not read."""
        return _number(self.artifact.metadata, "layout_ops")

    @property
    def stored(self) -> StoredArtifact:
        """The artifact with the folder that its files lie in."""
        place = Path(self.out)
        return StoredArtifact(self.artifact, place if place.is_dir() else place.parent)


def _number(metadata: Mapping[str, str], name: str) -> int | None:
    return int(metadata[name]) if name in metadata else None


def print_line(text: str) -> None:
    """A line of progress on standard error."""
    print(text, file=sys.stderr, flush=True)


def choose_route(
    source: str, to: str, precision: Precision | str, via: Sequence[str] = (), environments: Path | None = None, graph: FormatGraph | None = None
) -> tuple[Route, tuple[str, ...]]:
    """The best road that is ready on this machine, and lines that say which better ones are not, and what makes them so.

    Raises:
        ConfigError: there is no road, or none is ready; lists what exists, and the lines that install or make what is missing.
    """
    known = load_graph() if graph is None else graph
    found = known.routes(source, to, precision, via)
    if not found:
        raise known.no_route(source, to, Precision(precision), via)
    passed_over: list[str] = []
    for route in found:
        lines = route.missing(environments)
        if not lines:
            return route, tuple(passed_over)
        passed_over.append(f"{route} is not ready; to make it so: {'; '.join(lines)}")
    raise ConfigError(
        f"no road from {source} to {to} in {Precision(precision).value} is ready on this machine",
        found=" | ".join(passed_over[1:]) or None,
        allowed=str(found[0]),
        hint="; ".join(found[0].missing(environments)),
        subject=to,
    )


def convert(
    model: torch.nn.Module | StoredArtifact | Path | str,
    to: str,
    *,
    precision: Precision | str | None = None,
    calibration: Tensors | Array | Path | str | None = None,
    via: Sequence[str] = (),
    example: Any = None,
    out: Path | str,
    scheme: str | None = None,
    method: str = "minmax",
    target: Target | str | None = None,
    overrides: Sequence[str] = (),
    outputs: Sequence[str] | None = None,
    max_transposes: int | None = None,
    processing: Processing | Path | str | None = None,
    iospec: IOSpec | None = None,
    options: Options | None = None,
    environments: Path | str | None = None,
    samples: int = 32,
    allow_divergence: bool = False,
    seed: int = 0,
    progress: bool | Say = True,
) -> Conversion:
    """The model in another format and precision, written whole to `out`: a file, or a folder with `artifact.json`.

    `model` is a torch module, a file (.onnx, .tflite, .keras), a SavedModel folder, or an artifact; `iospec` describes a Keras file or a
    SavedModel, which do not tell. `example` holds real inputs, batch first (an array, a mapping by name, or a folder of .npy); every hop
    is compared on up to `samples` of them, else on those of `calibration`, else on seeded random numbers, which the result says.
    A batch axis is bound to 1. `precision` is that of the model by default, int8 needs `calibration`; its `scheme` is by default the first
    of the target that runs the last format. `target` runs the formats that it can; others run on `local` and `litert-local`.
    `options` go to converters by name, for example `{"tflite-from-torch": {"channel_last": True}}`; `environments` is a folder as in
    `edgekd env --path`. `outputs` names the outputs that stay: the others go, with what only fed them. `max_transposes` bounds the operators
    that move a whole tensor in the file at the end; by default a TFLite file from a torch module or an ONNX file may hold as many as these ask
    for, and those at the borders (`docs/graphs.md`); more are noted where `via` names the road. `processing` (a record, or a TOML or JSON file)
    says what lies before and behind the network, and which parts are built into the file: `example` and `calibration` are then raw.
    `progress` is a function of lines, or whether they go to standard error.

    Raises:
        ConfigError: no road exists or is ready, or an argument makes no sense. ModelError, DataError: the model or the inputs cannot be used.
        ConversionRejected: a converter refuses the model, or the file holds too many transpositions. UnsupportedModel: a runtime or target does.
        ParityRejected: a hop computes something else; nothing is written, unless `allow_divergence`.
    """
    say: Say = progress if callable(progress) else print_line if progress else _silent
    place, folder_of = Path(out), None if environments is None else Path(environments)
    own, kind = dict(options or {}), source_format(model)
    check_limit(max_transposes)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edgekd-convert-")))
        channel_last = any(values.get(CHANNEL_LAST) is True for values in own.values())
        source = open_source(model, kind, scratch / "source", iospec, example if example is not None else calibration, channel_last=channel_last)
        dropped = _dropped(source)
        origin = {"source": weights_hash(source.module)} if kind == TORCH else {}  # of the caller's own, before anything is wrapped around it
        told, built = None if processing is None else load_processing(processing), None
        if told is not None:
            told = checked_processing(told, cut_spec(source.iospec, outputs), (kind, to))
            source = replace(source, iospec=described(source.iospec, told, outputs=False))
        compared, compared_text = given_inputs(source, example, calibration, samples, seed)
        source = edited(source, outputs, scratch / "edited", compared)
        if told is not None:
            require_range(compared, told, "example" if example is not None else "calibration")
            built = processed(source, told, scratch / "processed", compared)
            source = built.source
        wanted = source.precision if precision is None and to == kind and not via else Precision.FP32 if precision is None else precision
        graph = load_graph()
        passed_over: tuple[str, ...] = ()
        if source.precision is not Precision.FP32 and (to != kind or wanted != source.precision or via):
            raise ConfigError("only a float32 model can be converted", found=source.precision.value, allowed="fp32", hint="start from the float model")
        if to == kind and wanted == source.precision and not via:
            graph.routes(kind, to, wanted)  # checks the names
            route = Route(kind, ())
        else:
            route, passed_over = choose_route(kind, to, wanted, via, folder_of, graph)
        _check_options(own, route)
        for line in passed_over:
            say(f"passed over: {line}")
        say(f"road: {route}")
        quantizes = any(edge.precision is Precision.INT8 for edge in route.edges)
        if quantizes != (calibration is not None):
            raise ConfigError(
                "int8 needs calibration inputs" if quantizes else "calibration inputs are for int8 only",
                found=f"precision {Precision(wanted).value}",
                hint="pass calibration=" if quantizes else "pass them as example=, to compare on them",
                subject="calibration",
            )
        run = Run(source, route, say, folder_of, own)
        run.inputs, run.inputs_text = compared, compared_text
        run.open_targets(stack, target, overrides)
        run.bound_transposes(max_transposes, named=bool(via))
        run.processing, run.file_notes = told, {**origin, **({} if told is None else file_notes(told))}
        run.take_up(None if built is None else built.parity, (*dropped, *(() if built is None else built.notes)))
        if calibration is not None:
            run.calibrate(calibration, scheme, method)
        made = run.convert(scratch)
        if made is None:
            raise ConfigError("the model is a torch module already", found=kind, hint="name another format", subject=to)
        if not route.edges and run.bound is not None:
            require_bound(made, run.bound, "")
        if not allow_divergence:
            _require(run.parity, route, None if built is None else built.parity)
        stored = write_artifact(made, place)
    say(f"written: {place}")
    return Conversion(
        out=str(place),
        artifact=stored.record,
        route=route.converters,
        formats=route.formats,
        parity=tuple(run.parity),
        inputs=run.inputs_text,
        ran_on=run.ran_on | {name: one.name + (f" (simulated: {one.simulated})" if one.simulated else "") for name, one in run.targets.items()},
        notes=(*passed_over, *run.notes),
        recipe=run.recipe,
    )


def _dropped(source: Source) -> tuple[str, ...]:
    """What of the notes in the source's file was not used."""
    dropped = "" if source.artifact is None else source.artifact.record.metadata.get(DROPPED, "")
    return (f"a note in the file was not used: {dropped}",) if dropped else ()


def _check_options(options: Options, route: Route) -> None:
    for name in options:
        if name not in route.converters:
            raise ConfigError(f"options are given for a converter that the road does not take: {name!r}", allowed=", ".join(route.converters), subject=name)


def _require(parity: Sequence[HopParity], route: Route, inside: HopParity | None) -> None:
    """Refuse a hop that differs, `inside` that of the processing; the message says how to get the file nevertheless."""
    try:
        require_parity(parity)
    except ParityRejected as error:
        bad = first_bad_hop(parity)
        instead = 'leave the processing outside (where = "outside")' if bad is inside else "take another road with via"
        raise ParityRejected(
            error.what,
            found=f"{error.found}; the road was {route}",
            hint=f"{instead}, or write it nevertheless with allow_divergence (--allow-divergence)",
            subject=bad,
        ) from error


def write_artifact(made: StoredArtifact, out: Path) -> StoredArtifact:
    """The artifact at `out`: a file where it is one and `out` has an ending, else a folder with `artifact.json`; whole or not at all.

    Raises:
        ConfigError: `out` has an ending, and the artifact is several files.
    """
    record = made.record
    if out.suffix and not out.is_dir():
        if len(record.files) > 1:
            raise ConfigError(
                "the artifact is more than one file",
                found=", ".join(sorted(record.files)[:5]),
                hint="give a folder as out",
                subject=str(out),
            )
        copy_file(made.entry, out)
        named = msgspec.structs.replace(record, files={out.name: record.files[record.entry]}, entry=out.name)
        return StoredArtifact(named, out.parent)
    if out.is_dir() and any(out.iterdir()) and not (out / "artifact.json").is_file():
        raise ConfigError("the folder holds other files", found=str(out), hint="name a new folder", subject=str(out))
    with folder_atomic(out) as work:
        made.copy_to(work)
        record.save(work / "artifact.json")
    return StoredArtifact(record, out)


def _silent(_: str) -> None:
    """No progress."""

"""One model from the format it has to the one that is wanted: the road is found, run hop by hop and compared on real inputs."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from edgekd.artifact import StoredArtifact
from edgekd.contracts import Array, CalibrationSet, ConvertRequest, Target, Tensors
from edgekd.conversion.formats import HOST_PROFILES, FormatGraph, Route, load_graph
from edgekd.conversion.inputs import CHANNEL_LAST, Source, given_inputs, open_source, refit, source_format
from edgekd.errors import ConfigError, ParityRejected, UnsupportedModel
from edgekd.parity.compare import BASE_DEPTH, compare_hop, first_bad_hop, require_parity
from edgekd.parity.graph import output_ranges
from edgekd.records import Artifact, HopParity, IOSpec, Precision, QuantRecipe, Record
from edgekd.storage import copy_file, folder_atomic

if TYPE_CHECKING:
    import torch

Say = Callable[[str], None]
Options = Mapping[str, Mapping[str, str | int | float | bool]]


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
    def stored(self) -> StoredArtifact:
        """The artifact with the folder that its files lie in."""
        place = Path(self.out)
        return StoredArtifact(self.artifact, place if place.is_dir() else place.parent)


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
    `edgekd env --path`. `progress` is a function of lines, or whether they go to standard error.

    Raises:
        ConfigError: no road exists or is ready, or an argument makes no sense. ModelError, DataError: the model or the inputs cannot be used.
        ConversionRejected: a converter refuses the model. UnsupportedModel: a runtime or target does.
        ParityRejected: a hop computes something else; nothing is written, unless `allow_divergence`.
    """
    say: Say = progress if callable(progress) else print_line if progress else _silent
    place, folder_of = Path(out), None if environments is None else Path(environments)
    own, kind = dict(options or {}), source_format(model)
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edgekd-convert-")))
        channel_last = any(values.get(CHANNEL_LAST) is True for values in own.values())
        source = open_source(model, kind, scratch / "source", iospec, example if example is not None else calibration, channel_last=channel_last)
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
        run = _Run(source, route, say, folder_of, own)
        run.inputs, run.inputs_text = given_inputs(source, example, calibration, samples, seed)
        run.open_targets(stack, target, overrides)
        if calibration is not None:
            run.calibrate(calibration, scheme, method)
        made = run.convert(scratch)
        if made is None:
            raise ConfigError("the model is a torch module already", found=kind, hint="name another format", subject=to)
        if not allow_divergence:
            _require(run.parity, route)
        stored = _write(made, place)
    say(f"written: {place}")
    return Conversion(
        out=str(place),
        artifact=stored.record,
        route=route.converters,
        formats=route.formats,
        parity=tuple(run.parity),
        inputs=run.inputs_text,
        ran_on={name: one.name + (f" (simulated: {one.simulated})" if one.simulated else "") for name, one in run.targets.items()},
        notes=(*passed_over, *run.notes),
        recipe=run.recipe,
    )


class _Run:
    """One road being run: the model as it stands after the last hop, and the outputs that the next one is compared with."""

    def __init__(self, source: Source, route: Route, say: Say, environments: Path | None, options: Options) -> None:
        self.source, self.route, self.say, self.environments, self.options = source, route, say, environments, options
        self.targets: dict[str, Target] = {}
        self.parity: list[HopParity] = []
        self.notes: list[str] = []
        self.inputs: Tensors = {}
        self.inputs_text = ""
        self.calibration: CalibrationSet | None = None
        self.recipe: QuantRecipe | None = None

    def open_targets(self, stack: ExitStack, target: Target | str | None, overrides: Sequence[str]) -> None:
        """Open, before anything is converted, what runs each format of the road."""
        from edgekd.target import connect

        wanted = [name for name in dict.fromkeys(self.route.formats) if name in HOST_PROFILES] if self.route.edges else []
        if target is not None and wanted:
            given = stack.enter_context(connect(target, overrides=overrides)) if isinstance(target, str) else target
            runs = {item.value for item in given.capabilities.formats}
            if not runs & set(wanted):
                raise UnsupportedModel(
                    f"the target {given.name!r} runs no format of this road", found=", ".join(sorted(runs)), allowed=", ".join(wanted), subject=given.name
                )
            self.targets |= {name: given for name in wanted if name in runs}
        for name in wanted:
            if name not in self.targets:
                self.targets[name] = stack.enter_context(connect(HOST_PROFILES[name]))

    def calibrate(self, calibration: Any, scheme: str | None, method: str) -> None:
        """The calibration set, laid out as in the source, and the recipe of the hop that quantizes."""
        from edgekd.quantize.calibrate import calibration_set
        from edgekd.quantize.recipes import SCHEMES, candidate_schemes, make_recipe

        last = self.route.formats[-1]
        arrays = self.source.arrays(calibration, "calibration")
        label = f"folder {Path(calibration).name}" if isinstance(calibration, (str, Path)) else "calibration"
        self.calibration = calibration_set(arrays, split=label)
        chosen = scheme
        if chosen is None:
            if last not in self.targets:
                raise ConfigError(f"nothing on the host runs {last}, so that no scheme is known to suit it", hint="pass scheme=", subject=last)
            fitting = [name for name in candidate_schemes(self.targets[last].capabilities) if SCHEMES[name].format == last]
            if not fitting:
                raise UnsupportedModel("the target runs no int8 of this format", found=self.targets[last].name, allowed=", ".join(SCHEMES), subject=last)
            chosen = fitting[0]
        self.recipe = make_recipe(chosen, method, self.calibration)
        self.say(f"calibrating scheme {chosen} by {method} on {self.recipe.calibration.size} samples")

    def convert(self, scratch: Path) -> StoredArtifact | None:
        """The artifact at the end of the road; `None` where a road without hops starts from a module."""
        from edgekd.registry import load

        here, spec, at = self.source.artifact, self.source.iospec, self.source.format
        inputs, calibration = self.inputs, self.calibration
        reference, skipped = self._outputs(at, here, inputs), at
        for number, edge in enumerate(self.route.edges):
            self.say(f"hop {number + 1} of {len(self.route.edges)}: {edge.converter}: started")
            folder = scratch / f"hop-{number}"
            folder.mkdir()
            quantizes = edge.precision is Precision.INT8
            asked = {**edge.options, **self.options.get(edge.converter, {})}
            if edge.environment and self.environments is not None:
                asked.setdefault("environments", str(self.environments))
            runner = self.targets.get(edge.source)
            request = ConvertRequest(
                source=self.source.module if here is None else here,
                folder=folder,
                iospec=spec,
                example=inputs,
                recipe=self.recipe if quantizes else None,
                calibration=calibration if quantizes else None,
                options=asked,
                infer=runner.runtime.infer if runner is not None and runner.capabilities.taps and quantizes else None,
            )
            before, made = spec, load("converters", edge.converter)().convert(request)
            if made.record.format.value != edge.target or made.record.precision is not edge.precision:
                raise ConfigError(
                    f"the converter {edge.converter!r} gave something else than it is registered for",
                    found=f"{made.record.format.value} {made.record.precision.value}",
                    allowed=f"{edge.target} {edge.precision.value}",
                    hint="repair the plug-in",
                    subject=edge.converter,
                )
            spec = made.record.iospec
            inputs = refit(inputs, before, made, changed=edge.source != edge.target)
            if calibration is not None:
                calibration = replace(calibration, inputs=refit(calibration.inputs, before, made, changed=edge.source != edge.target))
            if reference is not None:
                reference = refit(reference, before, made, changed=edge.source != edge.target, outputs=True)
            reference, skipped = self._compare(f"{skipped} -> {edge.target}", reference, self._outputs(edge.target, made, inputs), made)
            here = made
        return here

    def _outputs(self, at: str, model: StoredArtifact | None, inputs: Tensors) -> Tensors | None:
        """Outputs of the model as it stands; nothing where no runtime of the host runs this format, or there are no hops to compare."""
        if not self.route.edges:
            return None
        if model is None:
            return self.source.outputs(inputs)
        return self.targets[at].runtime.infer(model, inputs) if at in self.targets else None

    def _compare(self, hop: str, reference: Tensors | None, found: Tensors | None, made: StoredArtifact) -> tuple[Tensors | None, str]:
        """Compare a hop if both sides run; what the next one is compared with, and the name of its beginning."""
        if found is None:
            self.say(f"{hop}: nothing runs this format here; compared together with the next hop")
            self.notes.append(f"{hop}: no runtime on the host runs {made.record.format.value}")
            return reference, hop
        if reference is None:
            self.say(f"{hop}: not compared by edgekd, since nothing runs the source here")
            self.notes.append(f"{hop}: not compared, since no runtime on the host runs what comes before")
            return found, made.record.format.value
        depth = made.record.metadata.get("depth", "")
        label = hop if made.record.precision is Precision.FP32 else f"{hop} {made.record.precision.value}"
        parity = compare_hop(
            label,
            reference,
            found,
            precision=made.record.precision,
            depth=int(depth) if depth.isdigit() else BASE_DEPTH,
            limits=output_ranges(made) if made.record.precision is Precision.INT8 else None,
        )
        self.parity.append(parity)
        worst = min(parity.tensors, key=lambda tensor: tensor.sqnr_db)
        verdict = "within tolerance" if parity.passed else f"DIFFERS at {parity.first_bad}"
        self.say(f"{label}: {verdict} on {parity.samples} samples, signal to error {worst.sqnr_db:.1f} dB ({worst.name})")
        return found, made.record.format.value if made.record.precision is Precision.FP32 else f"{made.record.format.value} {made.record.precision.value}"


def _check_options(options: Options, route: Route) -> None:
    for name in options:
        if name not in route.converters:
            raise ConfigError(f"options are given for a converter that the road does not take: {name!r}", allowed=", ".join(route.converters), subject=name)


def _require(parity: Sequence[HopParity], route: Route) -> None:
    """Refuse a hop that differs; the message says how to get the file nevertheless."""
    try:
        require_parity(parity)
    except ParityRejected as error:
        raise ParityRejected(
            error.what,
            found=f"{error.found}; the road was {route}",
            hint="take another road with via, or write it nevertheless with allow_divergence (--allow-divergence)",
            subject=first_bad_hop(parity),
        ) from error


def _write(made: StoredArtifact, out: Path) -> StoredArtifact:
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

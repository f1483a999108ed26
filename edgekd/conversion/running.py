"""One road being run: hop by hop, each on the model of the one before, each compared on the same inputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from edgekd.artifact import StoredArtifact
from edgekd.contracts import CalibrationSet, ConvertRequest, Target, Tensors
from edgekd.conversion.bounds import Bound, asked_bound, module_bound, onnx_bound, require_bound
from edgekd.conversion.formats import HOST_PROFILES, TORCH, Route
from edgekd.conversion.inputs import Source, refit
from edgekd.conversion.processing import require_range
from edgekd.errors import ConfigError, ConversionRejected, UnsupportedModel
from edgekd.parity.compare import BASE_DEPTH, compare_hop
from edgekd.parity.graph import output_ranges
from edgekd.records import Format, HopParity, Precision, Processing, QuantRecipe

Say = Callable[[str], None]
Options = Mapping[str, Mapping[str, str | int | float | bool]]


class Run:
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
        self.bound: Bound | None = None
        self.bound_is_note = False
        self.file_notes: Mapping[str, str] = {}
        self.processing: Processing | None = None
        self.ran_on: dict[str, str] = {}

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
        if self.processing is not None:
            require_range(arrays, self.processing, "calibration")
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

    def take_up(self, parity: HopParity | None, notes: Sequence[str]) -> None:
        """Begin with what is known before the first hop: how the source with its processing inside compares, and lines that the result notes."""
        for line in notes:
            self.say(line)
        self.notes.extend(notes)
        if parity is not None:
            self.ran_on[Format.ONNX.value] = "ONNX Runtime in this process"
            self._add(parity)

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
                notes=self.file_notes,
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
            if self.bound is not None and edge.target == self.route.formats[-1]:
                self._hold_to_bound(made, self.bound, edge.converter)
            spec = made.record.iospec
            inputs = refit(inputs, before, made, changed=edge.source != edge.target)
            if calibration is not None:
                calibration = replace(calibration, inputs=refit(calibration.inputs, before, made, changed=edge.source != edge.target))
            if reference is not None:
                reference = refit(reference, before, made, changed=edge.source != edge.target, outputs=True)
            reference, skipped = self._compare(f"{skipped} -> {edge.target}", reference, self._outputs(edge.target, made, inputs), made)
            here = made
        return here

    def bound_transposes(self, limit: int | None, *, named: bool) -> None:
        """Set how many transpositions the file at the end may hold: `limit`, else for TFLite what the source asks for, where that can be counted.

        `named`: the road was named by the caller. What it writes beyond the source's own is then noted and not refused.
        """
        last = self.route.formats[-1]
        self.bound_is_note = named and limit is None
        if limit is not None:
            if last not in (Format.ONNX.value, Format.TFLITE.value):
                raise ConfigError(
                    "transpositions are counted in ONNX and TFLite files only", found=last, hint="leave max_transposes out", subject="max_transposes"
                )
            self.bound = asked_bound(limit)
        elif last == Format.TFLITE.value and self.source.format == TORCH:
            self.bound = module_bound(self.source.module, self.inputs, self.source.iospec)
        elif last == Format.TFLITE.value and self.source.format == Format.ONNX.value and self.source.artifact is not None:
            self.bound = onnx_bound(self.source.artifact)

    def _hold_to_bound(self, made: StoredArtifact, bound: Bound, converter: str) -> None:
        try:
            require_bound(made, bound, converter)
        except ConversionRejected as error:
            if not self.bound_is_note:
                raise
            self.notes.append(f"{error.what} (expected at most {error.allowed}): the road that was named writes them")
            self.say(self.notes[-1])

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
        self._add(parity)
        return found, made.record.format.value if made.record.precision is Precision.FP32 else f"{made.record.format.value} {made.record.precision.value}"

    def _add(self, parity: HopParity) -> None:
        self.parity.append(parity)
        worst = min(parity.tensors, key=lambda tensor: tensor.sqnr_db)
        verdict = "within tolerance" if parity.passed else f"DIFFERS at {parity.first_bad}"
        self.say(f"{parity.hop}: {verdict} on {parity.samples} samples, signal to error {worst.sqnr_db:.1f} dB ({worst.name})")

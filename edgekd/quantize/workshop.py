"""One source artifact on its way to int8: prepared once, observed once, then quantized in as many ways as asked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgekd.artifact import StoredArtifact
from edgekd.contracts import Array, CalibrationSet, Converter, ConvertRequest, Infer, Task, Tensors
from edgekd.errors import ConversionRejected
from edgekd.options import QuantizeOptions
from edgekd.quantize.calibrate import Stability, Statistics, observe
from edgekd.quantize.recipes import SCHEMES, make_recipe
from edgekd.records import QuantRecipe


@dataclass(frozen=True)
class Op:
    """A node of the prepared model that can stay in float."""

    name: str
    op_type: str


@dataclass(frozen=True)
class Made:
    """One quantized artifact with its recipe."""

    artifact: StoredArtifact
    recipe: QuantRecipe


class Workshop:
    """Quantizes one prepared model by recipe, and runs what it made on the target.

    `prepared` is the float model after pre-processing; its metadata lists what to observe and what can stay in float.
    """

    def __init__(
        self,
        source: StoredArtifact,
        *,
        prepare: Converter,
        converter: Converter,
        infer: Infer,
        calibration: CalibrationSet,
        options: QuantizeOptions,
        folder: Path,
    ) -> None:
        self.converter = converter
        self.infer = infer
        self.calibration = calibration
        self.options = options
        self.folder = folder
        example = {name: array[:1] for name, array in calibration.inputs.items()}
        self._example: Tensors = example
        request = ConvertRequest(source=source, folder=_made(folder / "prepared"), iospec=source.record.iospec, example=example)
        self.prepared = prepare.convert(request)
        self._sizes: dict[str, int] = json.loads(_told(self.prepared, "tensors"))
        self.ops = tuple(Op(name, kind) for name, kind in json.loads(_told(self.prepared, "ops")))
        self.statistics: Statistics = observe(infer, self.prepared, calibration.inputs, self._sizes, memory_mb=options.memory_mb)
        self._done: dict[str, Made] = {}
        self._ranges: dict[tuple[str, bool], dict[str, tuple[float, float]]] = {}

    def make(self, scheme: str, method: str, float_ops: Sequence[str] = (), op_rules: Mapping[str, str] | None = None) -> Made:
        """The model quantized by one recipe; the same recipe is made once. `op_rules` name kinds of operators of the prepared model.

        Raises:
            ConversionRejected: the quantizer refuses the model.
        """
        recipe = make_recipe(scheme, method, self.calibration, tuple(float_ops), op_rules)
        key = recipe.digest()
        if key not in self._done:
            name = f"{scheme}-{method}" + (f"-{hashlib.sha256(key.encode()).hexdigest()[:10]}" if float_ops or op_rules else "")
            request = ConvertRequest(
                source=self.prepared,
                folder=_made(self.folder / name),
                iospec=self.prepared.record.iospec,
                example=self._example,
                recipe=recipe,
                calibration=self.calibration,
                ranges=self.ranges(_ranged(recipe), method),
            )
            self._done[key] = Made(self.converter.convert(request), recipe)
        return self._done[key]

    def ranges(self, scheme: str, method: str) -> dict[str, tuple[float, float]]:
        """Activation ranges by a method, for what a scheme makes of them; computed once."""
        key = (method, SCHEMES[scheme].symmetric_activations if method == "mse" else False)
        if key not in self._ranges:
            self._ranges[key] = self.statistics.ranges(method, self.options.percentile, symmetric=key[1])
        return self._ranges[key]

    def stability(self, recipe: QuantRecipe) -> Stability | None:
        """How far the recipe's ranges depend on which samples calibrate; `None` where the scheme takes no ranges, or one sample calibrates."""
        if recipe.scheme == "dynamic_int8" and "static_int8" not in recipe.op_rules.values():
            return None
        symmetric = SCHEMES[_ranged(recipe)].symmetric_activations
        return self.statistics.stability(recipe.calibration.method, self.options.percentile, symmetric=symmetric)

    def outputs(self, model: StoredArtifact, inputs: Tensors) -> dict[str, Array]:
        """The model's outputs on the target."""
        return self.infer(model, inputs, ())

    def scores(self, made: Made, inputs: Tensors, targets: Any, task: Task) -> NDArray[np.float64]:
        """One score per item from the target's outputs, checked against the task first."""
        outputs = self.outputs(made.artifact, inputs)
        task.check(outputs, targets, "validation")
        return task.scores(outputs, targets)


def _ranged(recipe: QuantRecipe) -> str:
    """The scheme among the recipe's that takes activation ranges: where operators have a scheme of their own, `static_int8` is it."""
    return "static_int8" if recipe.scheme == "dynamic_int8" and "static_int8" in recipe.op_rules.values() else recipe.scheme


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _told(prepared: StoredArtifact, key: str) -> str:
    if key not in prepared.record.metadata:
        raise ConversionRejected(
            "the prepared model does not say what to calibrate",
            found=f"no metadata {key!r}",
            hint="a converter that prepares writes `tensors` and `ops`",
            subject=key,
        )
    return prepared.record.metadata[key]
